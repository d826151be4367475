"""PublishedPolicy: what is peculiar to one policy in the checkpoints that other projects publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from ..configuration.features import STATE, FeatureType, PolicyFeature
from ..configuration.policy import PolicyConfig
from ..errors import CorruptFileError, MissingFileError
from ..modeling.policy import PolicyModel

logger = logging.get_logger(__name__)

Weights = Mapping[str, torch.Tensor]


def _all(weights: Weights, module: nn.Module) -> Weights:
    return weights


@dataclass(frozen=True)
class PublishedPolicy:
    """Say how a policy's published weights and config become ours.

    Args:
        policy_class: ours.
        components: prefix of a component's weights in the policy → its class, such as
            `{"action_head.": ACTActionHead}`.
        rename: published state dict → the same under our names; names that it does not know stay.
        fields: published config and renamed weights → fields of our config. The weights say what a published config
            only names.
        trim: renamed weights and the module that is to receive them → without those that it has no place for by its
            config.
    """

    policy_class: type[PolicyModel]
    components: Mapping[str, type[nn.Module]]
    rename: Callable[[Weights], dict[str, torch.Tensor]]
    fields: Callable[[Mapping[str, Any], Weights], dict[str, Any]]
    trim: Callable[[Weights, nn.Module], Weights] = _all

    def prefix_of(self, module: nn.Module) -> str | None:
        """Return the prefix of a module's weights in the policy, "" for the policy itself; None for a stranger."""
        if isinstance(module, self.policy_class):
            return ""
        return next((prefix for prefix, kind in self.components.items() if isinstance(module, kind)), None)


def known_fields(config: Mapping[str, Any], config_class: type[PolicyConfig]) -> dict[str, Any]:
    """Return the fields of a LeRobot config.json that our config has too; what only its training reads is left out."""
    fields = {name: value for name, value in config.items() if name in config_class.field_names()}
    inputs = {name: PolicyFeature.from_value(dict(value)) for name, value in config["input_features"].items()}
    # LeRobot reads one STATE feature, by its name; others of that type are listed and never used.
    fields["input_features"] = {n: f for n, f in inputs.items() if f.type is not FeatureType.STATE or n == STATE}
    left_out = sorted(set(config) - set(fields))
    logger.info(f"Fields of the published config.json that this library does not use: {', '.join(left_out)}")
    return fields


def build_policy(
    policy_class: type[PolicyModel],
    config: PolicyConfig,
    weights: Weights,
    source: str,
    dtype: torch.dtype | str | None,
) -> PolicyModel:
    """Return the policy of a config and its renamed weights, strictly, in eval mode; without `dtype` in float32."""
    config.name_or_path = source
    policy = policy_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype or torch.float32)
    policy.config.name_or_path = source
    return policy


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; they stay on disk until they are used.

    Raises:
        MissingFileError, CorruptFileError: it is absent, or not safetensors.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; it holds {listing(path.parent)}.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(path, "safetensors file", error) from error


def listing(folder: Path) -> str:
    """Return the names of what a folder holds, for messages."""
    return ", ".join(sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()) or "nothing"
