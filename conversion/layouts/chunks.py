"""ACT as a toy project writes it: config.json with `chunks_version`, statistics in it, weights under `net.`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoint import Checkpoint, Layout, register_layout
from ...configuration.act import ACTConfig
from ...configuration.strict import completed
from ...modeling.loading import read_weights
from ...modeling.policies.act import ACTPolicy
from ...processing.processor import PolicyProcessor
from ..published_policy import build_policy


def is_config(config: Mapping[str, Any]) -> bool:
    """Tell the project's config.json by its version."""
    return "chunks_version" in config


def read_checkpoint(
    checkpoint: Checkpoint,
    *,
    loading: Mapping[str, Any],
    processor_fields: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    with_processor: bool = True,
    **overrides: Any,
) -> tuple[Any, PolicyProcessor | None]:
    """Load policy and processor; arguments as in the other layouts."""
    config = ACTConfig.from_dict(checkpoint.config["policy"], **overrides)
    weights = {name.removeprefix("net."): x for name, x in read_weights(checkpoint.folder, checkpoint.variant).items()}
    policy = build_policy(ACTPolicy, config, weights, checkpoint, loading)
    if not with_processor:
        return policy, None
    fields = completed({"statistics": checkpoint.config["statistics"]}, processor_fields or {})
    return policy, PolicyProcessor.from_config(config, **fields)


register_layout(Layout(name="Chunks", matches=is_config, policy_class=lambda config: ACTPolicy, read=read_checkpoint))
