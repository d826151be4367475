"""PaddingProcessor: states and actions of any robot, padded with zeros to the widths that one network has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ..configuration.features import ACTION, STATE
from ..configuration.policy import PolicyConfig
from ..errors import FeatureShapeError, InvalidConfigError
from .language import LanguageProcessor


class PaddingProcessor(LanguageProcessor):
    """Pad normalised states and actions to the network's widths, and take the padding off its chunks.

    `action_mask` (b, h, a) says which dimensions of the labels are real.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the policy's language model.
        max_state_dim (`int`, *optional*, defaults to 32): width of the network's states.
        max_action_dim (`int`, *optional*, defaults to 32): width of its actions.
        kwargs: what `LanguageProcessor` takes.

    Raises:
        InvalidConfigError: the robot's states or actions are wider.
    """

    compared_fields: ClassVar[tuple[str, ...]] = (
        *LanguageProcessor.compared_fields,
        "max_state_dim",
        "max_action_dim",
    )

    # transformers finds what has files of its own, the tokenizer, by the names in this signature.
    def __init__(self, tokenizer=None, max_state_dim=32, max_action_dim=32, **kwargs):
        super().__init__(tokenizer=tokenizer, **kwargs)
        self.max_state_dim = max_state_dim
        self.max_action_dim = max_action_dim
        for name, limit in (("max_state_dim", max_state_dim), ("max_action_dim", max_action_dim)):
            feature = STATE if name == "max_state_dim" else ACTION
            width = self.model_width(feature)
            if width > limit:
                raise InvalidConfigError(f"{feature} is {width} wide, the network's {name} is {limit}.")

    @classmethod
    def from_config(cls, config: PolicyConfig, statistics: Mapping | None = None, **kwargs: Any) -> PaddingProcessor:
        """Build the processor of a policy's config; see `LanguageProcessor.from_config`."""
        widths = {"max_state_dim": config.max_state_dim, "max_action_dim": config.max_action_dim}
        return super().from_config(config, statistics, **widths, **kwargs)

    def model_width(self, name: str) -> int:
        """Return how wide a vector is before it is padded; 0 where the robot has none."""
        feature = (self.input_features | self.output_features).get(name)
        return feature.shape[0] if feature else 0

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return what the network sees: vectors normalised and padded (…, width)."""
        x = super().encode(name, x)
        widths = {STATE: self.max_state_dim, ACTION: self.max_action_dim}
        return F.pad(x, (0, widths[name] - x.shape[-1])) if name in widths else x

    def _labels(self, *args: Any) -> dict[str, torch.Tensor]:
        labels = super()._labels(*args)
        real = torch.arange(self.max_action_dim) < self.output_features[ACTION].shape[0]  # (a,)
        return labels | {"action_mask": real.expand_as(labels["actions"]).clone()}

    def decode_actions(self, chunk: torch.Tensor, state: Any = None) -> torch.Tensor:
        """Return a predicted chunk (…, padded width) in robot units, without its padding; see `PolicyProcessor`."""
        if chunk.shape[-1] != self.max_action_dim:
            expected = f"a last dimension of {self.max_action_dim}, padding included"
            raise FeatureShapeError("The predicted chunk", tuple(chunk.shape), expected)
        return super().decode_actions(chunk[..., : self.output_features[ACTION].shape[0]], state)
