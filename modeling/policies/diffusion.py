"""DiffusionPolicy: actions by denoising a sequence under observations (Chi et al. 2023, arXiv 2303.04137)."""

from __future__ import annotations

import torch

from ...configuration.diffusion import DiffusionConfig
from ..action_heads.diffusion import DiffusionActionHead
from ..output import PolicyOutput
from ..policy import PolicyModel
from ..registry import register_policy
from ..seam import Draws, Labels, PolicyInputs


@register_policy("diffusion_policy")
class DiffusionPolicy(PolicyModel):
    """Map a short history of observations to a sequence of actions by a diffusion model.

    Args:
        config (`DiffusionConfig`): with input and output features set.
    """

    config_class = DiffusionConfig
    components = ("diffusion",)

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.diffusion = DiffusionActionHead(config)  # backbone and head, under their published name
        self.post_init()

    @property
    def backbone(self) -> DiffusionActionHead:
        """What encodes observations: `diffusion`."""
        return self.diffusion

    @property
    def action_head(self) -> DiffusionActionHead:
        """What denoises actions: `diffusion`."""
        return self.diffusion

    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        pixel_mask: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        environment_state: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        action_is_pad: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        step_noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        crop_offsets: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> PolicyOutput:
        """Return the training loss for `actions`; without them (or with `return_loss=False`) a sampled sequence.

        Args:
            pixel_values: (b, t, v, c, h, w) normalised images; a list of (b, t, c, h, w) where sizes differ.
            pixel_mask: (b, v) bool, False where an optional camera is absent.
            state: (b, t, s).
            environment_state: (b, t, e).
            input_ids: (b, n) of the instruction.
            attention_mask: (b, n), 0 where a token is padding.
            actions: (b, h, a) normalised labels, from the oldest observation on.
            action_is_pad: (b, h) bool, True where a step lies outside the episode; read when the config's `loss_over`
                is `"real"`.
            noise: (b, h, a), of the labels in training, else to start from; drawn when None.
            step_noise: (steps − 1, b, h, a), of DDPM's steps; drawn when None.
            time: (b,) timesteps of training; drawn when None.
            crop_offsets: (calls, 2) of training's crops, see `DiffusionActionHead.encode_images`; drawn when None.
            return_loss: sample instead when False.

        Returns:
            `PolicyOutput` with `loss`, `losses` (`mse`), or with `actions` (b, h, a). Training predicts no
            sequence: that takes as many passes as there are denoising steps.
        """
        inputs = PolicyInputs(pixel_values, pixel_mask, state, environment_state, input_ids, attention_mask)
        draws = Draws(noise, time, step_noise, crop_offsets)
        return super().forward(inputs, Labels(actions, action_is_pad), draws, return_loss)
