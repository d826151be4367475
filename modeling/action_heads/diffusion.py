"""DiffusionActionHead: observation encoders and a U-Net that denoises an action sequence.

Shapes: b batch, t observation history, h horizon, a action width, g width of the condition. Source: Chi et al. 2023
(arXiv 2303.04137), LeRobot's Diffusion Policy and InternManip's variant with CLIP, whose published parameter names are
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ...configuration.diffusion import DiffusionConfig
from ...errors import FeatureShapeError
from ..backbones.diffusion import DiffusionBackbone
from ..layers.unet1d import ConditionalUnet1d
from ..losses import fill_padded, mean_over
from ..samplers import NoiseSchedule, draw_noise
from ..seam import Draws, Features, PolicyInputs, checked_draw


class UnetActionHead(nn.Module):
    """Denoise an action sequence under one vector, the condition; of several feature tokens it takes the mean.

    Args:
        config: with output features set.
        features_width: g, of the backbone's features.

    Raises:
        InvalidConfigError: the config is inconsistent.
    """

    parameter_parts = {"tune_diffusion_model": ("unet",)}
    lora_targets = {"tune_diffusion_model": ("cond_encoder.1",)}  # how observations steer the denoising
    stages = {"condition": "unet.condition_films", "denoise": "denoise_step"}
    no_split_modules = ("ConditionalResidualBlock",)

    def __init__(self, config: DiffusionConfig, features_width: int):
        super().__init__()
        self.build_unet(config, features_width)

    def build_unet(self, config: DiffusionConfig, features_width: int) -> None:
        """Build what denoises a sequence."""
        self.config = config
        self.unet = ConditionalUnet1d(config, features_width)
        self.noise_schedule = NoiseSchedule(config)

    def errors(
        self, features: Features, inputs: PolicyInputs, actions: torch.Tensor, draws: Draws
    ) -> dict[str, torch.Tensor]:
        """Return `mse`, the squared error (b, h, a) of the predicted noise (or what `prediction_type` says).

        Args:
            features: the condition.
            inputs: not read.
            actions: (b, h, a) normalised labels, from the oldest observation on.
            draws: `noise` (b, h, a), and `time` (b,), timesteps from 0 to num_train_timesteps − 1.
        """
        self._check_shape(actions)
        schedule = self.noise_schedule
        noise = torch.randn_like(actions) if draws.noise is None else checked_draw("noise", draws.noise, actions.shape)
        b = len(actions)
        time = schedule.draw_time(b, actions.device) if draws.time is None else schedule.given_time(draws.time, b)
        noisy, wanted = schedule.mix(actions.float(), noise.float(), time)
        prediction = self.unet(noisy, time, _condition(features))  # (b, h, a)
        return {"mse": (prediction.float() - wanted) ** 2}

    def sample(self, features: Features, inputs: PolicyInputs, draws: Draws) -> torch.Tensor:
        """Return the whole denoised sequence (b, h, a), normalised; it begins at the oldest observation.

        Args:
            features: the condition.
            inputs: not read.
            draws: `noise` (b, h, a) to start from; `step_noise` (steps − 1, b, h, a), which DDPM adds on the way; the
                `generator` of both; `num_steps`, by default the config's `denoising_steps`.
        """
        condition, schedule = _condition(features), self.noise_schedule
        shape = (len(condition), self.config.horizon, self.config.action_dim)
        steps = self.config.denoising_steps if draws.num_steps is None else draws.num_steps
        timesteps, coefficients = schedule.times(steps, condition.device)
        draw = partial(draw_noise, shape, None, draws.generator, condition.device)
        # Everything but the network itself once per sequence. Actions stay in float32 between the steps.
        step_films = self.unet.step_films(timesteps)  # (steps, f)
        condition_films = self.unet.condition_films(condition)  # (b, f)
        noise = draw_noise(shape, draws.noise, draws.generator, condition.device)
        added = schedule.step_noises(shape, steps, draws.step_noise, draw)

        def step(x: torch.Tensor, i: int, noise: torch.Tensor | None) -> torch.Tensor:
            return self.denoise_step(x, step_films[i], condition_films, coefficients[i], noise)

        return schedule.integrate(noise, step, added)

    def denoise_step(
        self,
        actions: torch.Tensor,
        step_film: torch.Tensor,
        condition_films: torch.Tensor,
        coefficients: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return actions (b, h, a) one step less noisy; tensors only, so that it compiles into one graph once.

        Args:
            actions: (b, h, a), float32.
            step_film, condition_films: (f,) and (b, f), the two halves of the U-Net's FiLM.
            coefficients: (5,), a row of `NoiseSchedule.times`.
            noise: (b, h, a) to add, or None.
        """
        prediction = self.unet.denoise(actions.to(condition_films.dtype), step_film + condition_films)
        return self.noise_schedule.step(actions, prediction.float(), coefficients, noise)

    def _check_shape(self, actions: torch.Tensor) -> None:
        horizon, width = self.config.horizon, self.config.action_dim
        if tuple(actions.shape[1:]) != (horizon, width):
            raise FeatureShapeError("actions", tuple(actions.shape), f"(batch, {horizon}, {width})")


class DiffusionActionHead(DiffusionBackbone, UnetActionHead):
    """Encode observations and denoise an action sequence under them: backbone and head in one, as published.

    A batch holds the dataset's names or the model's, see `model_inputs`; observations carry history (b, t, …).
    Instructions are `language` (or `task`), a list of texts or one text for all, or `input_ids` and
    `attention_mask`. All random numbers can be given: `noise`, `step_noise`, `time`, `crop_offsets`.

    Args:
        config: with input and output features set.
        tokenizer: of the instructions; by default that of `config.language_model_name`, loaded when needed.

    Raises:
        InvalidConfigError: the config is inconsistent, has no features, or its text encoder cannot be read.
    """

    parameter_parts = DiffusionBackbone.parameter_parts | UnetActionHead.parameter_parts
    lora_targets = DiffusionBackbone.lora_targets | UnetActionHead.lora_targets
    stages = DiffusionBackbone.stages | UnetActionHead.stages
    no_split_modules = DiffusionBackbone.no_split_modules + UnetActionHead.no_split_modules

    def __init__(self, config: DiffusionConfig, tokenizer: Callable | None = None):
        nn.Module.__init__(self)  # once, for both
        self.build_encoders(config, tokenizer)
        self.build_unet(config, self.width)

    def compute_loss(
        self,
        batch: Mapping[str, Any],
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        crop_offsets: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return `loss`, the mean squared error of the predicted noise (or what `prediction_type` says).

        Args:
            batch: observations, `action` (b, h, a) normalised, and where padding is to be left out of the loss
                `action_is_pad` (b, h) bool.
            noise: (b, h, a) standard normal; drawn when None.
            time: (b,) timesteps from 0 to num_train_timesteps − 1; drawn when None.
            crop_offsets: (calls, 2), see `encode_images`.
        """
        given = self.read_batch(batch)
        inputs, over = PolicyInputs.of(given), self.config.loss_over
        actions, is_pad = given["actions"], given.get("action_is_pad")
        self._check_shape(actions)
        if is_pad is not None and over == "real":
            actions = fill_padded(actions, is_pad)
        features = self.encode(inputs, crop_offsets)
        error = self.errors(features, inputs, actions, Draws(noise=noise, time=time))["mse"]
        return {"loss": mean_over(error, is_pad, over=over)}

    def generate_all_actions(
        self,
        batch: Mapping[str, Any],
        noise: torch.Tensor | None = None,
        step_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
    ) -> torch.Tensor:
        """Return the whole denoised sequence (b, h, a), normalised; it begins at the oldest observation.

        Args:
            batch: observations.
            noise, step_noise, generator, num_steps: see `sample`.
        """
        inputs = PolicyInputs.of(self.read_batch(batch))
        draws = Draws(noise=noise, step_noise=step_noise, generator=generator, num_steps=num_steps)
        features = self.encode(inputs)
        return self.sample(features, inputs, draws).to(features.tokens.dtype)

    def generate_actions(self, batch: Mapping[str, Any], **draws: Any) -> torch.Tensor:
        """Return the actions to execute (b, n_action_steps, a), from the current step on; see the method above."""
        return self.generate_all_actions(batch, **draws)[:, self.config.executed_steps]


def _condition(features: Features) -> torch.Tensor:
    """Return the features (b, n, g) as one vector (b, g): the mean of the real tokens."""
    tokens, mask = features.tokens, features.mask
    if tokens.shape[1] == 1:
        return tokens[:, 0]
    if mask is None:
        return tokens.mean(dim=1)
    real = mask.bool()[:, :, None]
    return torch.where(real, tokens, 0).sum(dim=1) / real.sum(dim=1).clamp(min=1)
