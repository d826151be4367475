"""The doors for published checkpoints: one layout per module of this room, found by its config.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import WeightsMismatchError
from ..modeling.policy import PolicyModel
from ..processing.processor import PolicyProcessor
from . import lerobot


def published_layout(config: Mapping[str, Any]) -> Callable | None:
    """Return the reader of the layout that a config.json is written in, or None when it is ours."""
    return lerobot.read_checkpoint if lerobot.is_config(config) else None


def read_published(
    folder: str | os.PathLike, config: Mapping[str, Any], source: str | None = None, **overrides: Any
) -> tuple[PolicyModel, PolicyProcessor]:
    """Load a published checkpoint folder, strictly.

    Args:
        folder: holds config.json, weights and processors.
        config: the parsed config.json.
        source: what the user asked for, for messages; by default the folder.
        overrides: `dtype`, and config fields to change.

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
        WeightsMismatchError: weights are missing, unexpected or of another shape.
    """
    renamed = lerobot.rename_act_weights(state_dict)
    own = module.state_dict()
    part = _component_prefix(module)
    if part:
        siblings = {name for name in renamed if name.startswith(("backbone.", "action_head."))}
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


def _component_prefix(module: nn.Module) -> str:
    if isinstance(module, PolicyModel):
        return ""
    return "backbone." if hasattr(module, "encode_features") else "action_head."
