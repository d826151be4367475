"""The doors for published checkpoints: one layout per module of this room, found by its config.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UnknownPolicyError, WeightsMismatchError, nearest
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor
from . import gr00t, lerobot, openpi, transformers_pi0
from .act import ACT
from .diffusion import DIFFUSION
from .gr00t import GR00T_N1, GR00T_N1_5
from .pi0 import PI0
from .published_policy import PublishedPolicy

# The layouts of whole checkpoints.
LAYOUTS = (lerobot, openpi, transformers_pi0, gr00t)
# Whose names `load_published` can read.
POLICIES: tuple[PublishedPolicy, ...] = (ACT, DIFFUSION, PI0, GR00T_N1_5, GR00T_N1)


def published_layout(config: Mapping[str, Any]) -> Callable | None:
    """Return the reader of the layout that a config.json is written in, or None when it is ours."""
    return next((layout.read_checkpoint for layout in LAYOUTS if layout.is_config(config)), None)


def read_published(
    folder: str | os.PathLike, config: Mapping[str, Any], source: str | None = None, **overrides: Any
) -> tuple[PolicyModel, PolicyProcessor | None]:
    """Load a published checkpoint folder, strictly.

    Args:
        folder: holds config.json, weights and processors.
        config: the parsed config.json.
        source: what the user asked for, for messages; by default the folder.
        overrides: `dtype`, `tokenizer`, config fields to change, and `with_processor=False` where only the policy is
            wanted, which then needs no tokenizer.

    Returns:
        The policy, in eval mode, and its processor.
    """
    reader = published_layout(config)
    return reader(Path(folder), config, source or str(folder), **overrides)


def load_published(module: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
    """Load weights under their published names into a policy or one of its components, strictly.

    Args:
        module: a policy, a backbone or an action head.
        state_dict: under published names; for a component, the names of its siblings may be there too.

    Returns:
        `module`.

    Raises:
        UnknownPolicyError: nobody publishes such a module.
        WeightsMismatchError: weights are missing, unexpected or of another shape.
    """
    kind, part = _published_policy(module)
    renamed = kind.trim(kind.rename(state_dict), module)
    own = module.state_dict()
    if part:
        siblings = {name for name in renamed if name.startswith(tuple(kind.components))}
        renamed = {
            name.removeprefix(part): value
            for name, value in renamed.items()
            if name.startswith(part) or name not in siblings
        }
    mismatched = [
        (name, value.shape, own[name].shape)
        for name, value in renamed.items()
        if name in own and value.shape != own[name].shape
    ]
    missing, unexpected = own.keys() - renamed.keys(), renamed.keys() - own.keys()
    if missing or unexpected or mismatched:
        raise WeightsMismatchError(type(module).__name__, missing, unexpected, mismatched)
    module.load_state_dict(renamed)
    return module


def _published_policy(module: nn.Module) -> tuple[PublishedPolicy, str]:
    """Return whose names a module's weights are published under, and their prefix in the whole policy."""
    for kind in POLICIES:
        prefix = kind.prefix_of(module)
        if prefix is not None:
            return kind, prefix
    known = [part.__name__ for kind in POLICIES for part in (kind.policy_class, *kind.components.values())]
    name = type(module).__name__
    raise UnknownPolicyError(f"No published checkpoint is known that holds a {name}. {nearest(name, known)}")
