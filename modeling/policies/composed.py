"""ComposedPolicy: any registered backbone with any registered action head that can read its features."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from ...configuration.composed import ComposedConfig
from ..components import build_action_head, build_backbone
from ..output import PolicyOutput
from ..policy import NO_DRAWS, PolicyModel
from ..registry import register_policy
from ..seam import Draws, Features, Labels, PolicyInputs


class StateProjection(nn.Linear):
    """Add the robot's state to every token of features that were made without it."""

    parameter_parts = {"tune_projector": ("",)}
    modules_to_save = ("",)

    def add_to(self, features: Features, state: torch.Tensor) -> Features:
        """Return the features with the state (b, s) in each token (b, n, d)."""
        return features._replace(tokens=features.tokens + self(state.to(self.weight.dtype))[:, None])


@register_policy("composed_policy")
class ComposedPolicy(PolicyModel):
    """Map an observation to a chunk of actions by a backbone and an action head that are chosen by their types.

    Where neither of them reads the robot's state, a layer between them adds it to the features.

    Args:
        config (`ComposedConfig`): with input and output features set.

    Raises:
        InvalidConfigError: backbone and head do not go together.
    """

    config_class = ComposedConfig
    supports_gradient_checkpointing = True
    components: ClassVar[tuple[str, ...]] = ("backbone", "state_projection", "action_head")

    def __init__(self, config: ComposedConfig):
        config.require_features()
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.action_head = build_action_head(config, self.backbone.width)
        reads_state = getattr(self.backbone, "reads_state", True) or getattr(self.action_head, "reads_state", False)
        if config.state_dim and not reads_state:
            self.state_projection = StateProjection(config.state_dim, self.backbone.width)
        self.post_init()

    def encode(self, inputs: PolicyInputs, draws: Draws = NO_DRAWS) -> Features:
        """Return the features of an observation, of its state too."""
        features = super().encode(inputs, draws)
        projection = getattr(self, "state_projection", None)
        return features if projection is None else projection.add_to(features, inputs.state)

    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        pixel_mask: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        environment_state: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        embodiment_id: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        action_is_pad: torch.Tensor | None = None,
        action_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        step_noise: torch.Tensor | None = None,
        crop_offsets: torch.Tensor | None = None,
        num_steps: int | None = None,
        return_loss: bool = True,
    ) -> PolicyOutput:
        """Return the training loss for `actions`; without them (or with `return_loss=False`) a chunk.

        Args:
            pixel_values, pixel_mask, state, environment_state, input_ids, attention_mask, embodiment_id: what the
                backbone's own policy takes.
            actions: (b, h, a) normalised labels.
            action_is_pad: (b, h) bool, True where a step lies beyond the episode.
            action_mask: (b, h, a) bool, False in dimensions that do not count.
            noise, time, step_noise, crop_offsets, num_steps: what the head's own policy takes.
            return_loss: predict instead when False.

        Returns:
            `PolicyOutput` with `loss` and `losses`, or with `actions` (b, h, a), normalised.
        """
        inputs = PolicyInputs(
            pixel_values, pixel_mask, state, environment_state, input_ids, attention_mask, embodiment_id
        )
        draws = Draws(noise, time, step_noise, crop_offsets, None, num_steps)
        return super().forward(inputs, Labels(actions, action_is_pad, action_mask), draws, return_loss)
