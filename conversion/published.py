"""Load weights under their published names into a policy or one of its components."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import UnknownPolicyError, nearest
from ..modeling.loading import require_finite, require_same_tensors, require_weight_types
from .published_policy import PublishedPolicy, published_policies, refuse_lora


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
        CheckpointError: some are LoRA's.
        WeightsValueError: some are NaN, infinite, or no floating-point numbers.
    """
    kind, part = _published_policy(module)
    refuse_lora("The state dict", state_dict)
    renamed = kind.trim(kind.rename(state_dict), module)
    if part:
        siblings = {name for name in renamed if name.startswith(tuple(kind.components))}
        renamed = {
            name.removeprefix(part): value
            for name, value in renamed.items()
            if name.startswith(part) or name not in siblings
        }
    shapes = {name: tuple(value.shape) for name, value in renamed.items()}
    name, own = type(module).__name__, module.state_dict()
    require_same_tensors(name, shapes, own)
    require_weight_types(name, {key: value.dtype for key, value in renamed.items()}, own)
    require_finite(name, renamed)
    module.load_state_dict(renamed)
    return module


def _published_policy(module: nn.Module) -> tuple[PublishedPolicy, str]:
    """Return whose names a module's weights are published under, and their prefix in the whole policy."""
    for kind in published_policies():
        prefix = kind.prefix_of(module)
        if prefix is not None:
            return kind, prefix
    known = [part.__name__ for kind in published_policies() for part in (kind.policy_class, *kind.components.values())]
    name = type(module).__name__
    raise UnknownPolicyError(f"No published checkpoint is known that holds a {name}. {nearest(name, known)}")
