"""The policies of this library: one row each, as names, so that reading the table imports nothing.

A row is all that a policy needs beside its own files. A policy from outside registers itself by `register_policy`.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Name what belongs to one policy.

    Args:
        title: what it is called in text.
        config, policy: module and class, such as `"configuration.act:ACTConfig"`.
        processor: the same; None for the general one, which reads an instruction where the config says so.
    """

    title: str
    config: str
    policy: str
    processor: str | None = None


FAMILIES: dict[str, Family] = {
    "act_policy": Family(
        "ACT",
        "configuration.act:ACTConfig",
        "modeling.policies.act:ACTPolicy",
    ),
    "diffusion_policy": Family(
        "Diffusion",
        "configuration.diffusion:DiffusionConfig",
        "modeling.policies.diffusion:DiffusionPolicy",
    ),
    "pi0_policy": Family(
        "π0",
        "configuration.pi0:PI0PolicyConfig",
        "modeling.policies.pi0:PI0Policy",
        "processing.pi0:PI0PolicyProcessor",
    ),
    "pi05_policy": Family(
        "π0.5",
        "configuration.pi05:PI05PolicyConfig",
        "modeling.policies.pi05:PI05Policy",
        "processing.pi05:PI05PolicyProcessor",
    ),
    "gr00t_n1_5": Family(
        "GR00T N1.5",
        "configuration.gr00t_n1_5:GR00TN1_5Config",
        "modeling.policies.gr00t_n1_5:GR00TN1_5Policy",
        "processing.gr00t:GR00TN1_5Processor",
    ),
    "gr00t_n1": Family(
        "GR00T N1",
        "configuration.gr00t_n1:GR00TN1Config",
        "modeling.policies.gr00t_n1:GR00TN1Policy",
        "processing.gr00t:GR00TN1Processor",
    ),
    "composed_policy": Family(
        "Composed Policy",
        "configuration.composed:ComposedConfig",
        "modeling.policies.composed:ComposedPolicy",
    ),
}

# What policies are called in text; `register_policy` adds those from outside.
TITLES: dict[str, str] = {model_type: family.title for model_type, family in FAMILIES.items()}


def title_of(model_type: str) -> str:
    """Return what a policy is called in text."""
    return TITLES.get(model_type) or model_type.removesuffix("_policy").replace("_", " ")
