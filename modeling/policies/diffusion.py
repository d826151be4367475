"""DiffusionPolicy: actions by denoising a sequence under observations (Chi et al. 2023, arXiv 2303.04137)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.diffusion import DiffusionConfig
from ..action_heads.diffusion import DiffusionActionHead
from ..layers.spatial_softmax import SpatialSoftmax, pixel_positions
from ..policy import LABELS, PolicyModel, PolicyOutput
from ..registry import register_policy


@register_policy("diffusion_policy")
class DiffusionPolicy(PolicyModel):
    """Map a short history of observations to a sequence of actions by a diffusion model.

    Args:
        config (`DiffusionConfig`): with input and output features set.
    """

    config_class = DiffusionConfig
    parameter_parts = {
        "tune_visual": ("diffusion.rgb_encoder",),
        "tune_projector": ("diffusion.language_projection",),
        "tune_diffusion_model": ("diffusion.unet",),
    }
    lora_targets = {
        "tune_visual": ("convolution",),
        "tune_projector": ("language_projection",),
        "tune_diffusion_model": ("cond_encoder.1",),  # how observations steer the denoising
    }
    stages = {
        "observation": "diffusion.encode_observation",
        "condition": "diffusion.unet.condition_films",
        "denoise": "diffusion.denoise_step",
    }
    _no_split_modules = ["ConditionalResidualBlock", "CLIPEncoderLayer"]

    def __init__(self, config: DiffusionConfig):
        super().__init__(config)
        self.diffusion = DiffusionActionHead(config)  # under its published name
        self.post_init()

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
            action_is_pad: (b, h) bool, True where a step lies outside the episode; read when
                `do_mask_loss_for_padding`.
            noise: (b, h, a), of the labels in training, else to start from; drawn when None.
            step_noise: (steps − 1, b, h, a), of DDPM's steps; drawn when None.
            time: (b,) timesteps of training; drawn when None.
            crop_offsets: (calls, 2) of training's crops, see `DiffusionActionHead.encode_images`; drawn when None.
            return_loss: sample instead when False.

        Returns:
            `PolicyOutput` with `loss`, `losses` (`mse`), or with `actions` (b, h, a). Training predicts no
            sequence: that takes as many passes as there are denoising steps.
        """
        observation = self._observed(pixel_values, pixel_mask, state, environment_state, input_ids, attention_mask)
        if actions is not None:
            self.check_actions(actions, action_is_pad)
        if actions is None or not return_loss:
            return PolicyOutput(actions=self.diffusion.generate_all_actions(observation, noise, step_noise))
        labels = {"actions": actions, "action_is_pad": action_is_pad}
        loss = self.diffusion.compute_loss(observation | labels, noise, time, crop_offsets)["loss"]
        return PolicyOutput(loss=loss, losses={"mse": loss})

    @torch.no_grad()
    def predict_action_chunk(
        self,
        *,
        noise: torch.Tensor | None = None,
        step_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Return the normalised actions to execute (b, n_action_steps, a), from the current step on.

        Args:
            noise: (b, h, a) to start from, over the whole horizon; drawn when None.
            step_noise: (steps − 1, b, h, a) added on the way by DDPM; drawn when None.
            generator: of the draws.
            num_steps: denoising steps; by default `num_inference_steps`, or those of training.
            inputs: as in `forward`; labels among them are ignored.
        """
        observation = {name: value for name, value in inputs.items() if name not in LABELS}
        return self.diffusion.generate_actions(
            self._observed(**observation),
            noise=noise,
            step_noise=step_noise,
            generator=generator,
            num_steps=num_steps,
        )

    def freeze_parts(self) -> None:
        """Freeze the text encoder, of which only the projection after it is trained."""
        if self.config.reads_instruction:
            self.diffusion.language_encoder.requires_grad_(False)

    def _observed(
        self,
        pixel_values: Any = None,
        pixel_mask: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        environment_state: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        return self.check_inputs(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            state=state,
            environment_state=environment_state,
            input_ids=input_ids,
            attention_mask=attention_mask,
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpatialSoftmax):
            init.copy_(module.pos_grid, pixel_positions(*module.size))
