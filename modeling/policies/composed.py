"""ComposedPolicy: any registered backbone with any registered action head that can read its features."""

from __future__ import annotations

import torch

from ...configuration.composed import ComposedConfig
from ..components import build_action_head, build_backbone
from ..output import PolicyOutput
from ..policy import PolicyModel
from ..registry import register_policy
from ..seam import Draws, Labels, PolicyInputs


@register_policy("composed_policy")
class ComposedPolicy(PolicyModel):
    """Map an observation to a chunk of actions by a backbone and an action head that are chosen by their types.

    Args:
        config (`ComposedConfig`): with input and output features set.

    Raises:
        InvalidConfigError: backbone and head do not go together.
    """

    config_class = ComposedConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: ComposedConfig):
        config.require_features()
        super().__init__(config)
        self.backbone = build_backbone(config)
        self.action_head = build_action_head(config, self.backbone.width)
        self.post_init()

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
