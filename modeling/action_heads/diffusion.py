"""DiffusionActionHead: observation encoders and a U-Net that denoises an action sequence.

Shapes: b batch, t observation history, v cameras, h horizon, a action width, g width of the condition. Source: Chi
et al. 2023 (arXiv 2303.04137), LeRobot's Diffusion Policy and InternManip's variant with CLIP, whose published
parameter names are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..._tokenizers import load_tokenizer
from ...configuration.diffusion import DiffusionConfig
from ...errors import FeatureShapeError, InvalidConfigError
from ..backbones.diffusion_rgb import DiffusionRgbEncoder
from ..inputs import model_inputs
from ..layers.masking import fill_padded, masked_mean
from ..layers.noise_schedule import NoiseSchedule
from ..layers.text_encoder import build_text_encoder
from ..layers.unet1d import ConditionalUnet1d

_OBSERVATION = ("state", "environment_state", "pixel_values", "pixel_mask", "input_ids", "attention_mask")


class DiffusionActionHead(nn.Module):
    """Denoise an action sequence, conditioned on observations and, where configured, on an instruction.

    A batch holds the dataset's names or the model's, see `model_inputs`; observations carry history (b, t, …).
    Instructions are `language` (or `task`), a list of texts or one text for all, or `input_ids` and
    `attention_mask`. All random numbers can be given: `noise`, `step_noise`, `time`, `crop_offsets`.

    Args:
        config: with input and output features set.
        tokenizer: of the instructions; by default that of `config.language_model_name`, loaded when needed.

    Raises:
        InvalidConfigError: the config is inconsistent, has no features, or its text encoder cannot be had.
    """

    def __init__(self, config: DiffusionConfig, tokenizer: Callable | None = None):
        super().__init__()
        config.require_features()
        self.config = config
        self.tokenizer = tokenizer
        cameras = list(config.image_features)
        if cameras and config.use_separate_rgb_encoder_per_camera:
            self.rgb_encoder = nn.ModuleList(DiffusionRgbEncoder(config, camera) for camera in cameras)
        elif cameras:
            self.rgb_encoder = DiffusionRgbEncoder(config)
        vision_width = 2 * config.spatial_softmax_num_keypoints * len(cameras)
        width = config.robot_state_dim + vision_width + (config.environment_state_dim or 0)
        if config.reads_instruction:
            width += config.language_projection_dim
            self.language_encoder = build_text_encoder(config.language_model_name, config.language_config)
            # Whatever the name meant, the checkpoint says what the encoder is, and needs nothing else to be read.
            config.language_config = config.language_config or self.language_encoder.config
            embedding = self.language_encoder.config.projection_dim
            if config.language_embedding_dim not in (None, embedding):
                raise InvalidConfigError(
                    f"language_embedding_dim={config.language_embedding_dim}, but {config.language_model_name!r} "
                    f"gives {embedding}. Leave language_embedding_dim out."
                )
            self.language_projection = nn.Linear(embedding, config.language_projection_dim)
            self.language_dropout = nn.Dropout(config.language_dropout_prob)
        self.unet = ConditionalUnet1d(config, width * config.n_obs_steps)
        self.noise_schedule = NoiseSchedule(config)

    def train(self, mode: bool = True) -> DiffusionActionHead:
        """Set training mode; the frozen text encoder stays in evaluation mode."""
        super().train(mode)
        if self.config.reads_instruction:
            self.language_encoder.eval()
        return self

    # --- observation → condition ----------------------------------------------------------------------

    def read_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return model inputs, with instructions tokenized; one text for all becomes one row."""
        texts = batch.get("language", batch.get("task"))
        if self.config.reads_instruction and texts is not None and batch.get("input_ids") is None:
            self.tokenizer = self.tokenizer or load_tokenizer(self.config.language_model_name)
            texts = [texts] if isinstance(texts, str) else list(texts)
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            device = self.language_projection.weight.device
            batch = {**batch, **{name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}}
        return model_inputs(batch, self.config)

    def encode_observation(
        self,
        state: torch.Tensor | None = None,
        environment_state: torch.Tensor | None = None,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        crop_offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the condition (b, g): per step state, cameras, environment state, instruction; then flattened.

        Args:
            state: (b, t, s), without history (b, s); the others alike.
            environment_state: (b, t, e).
            pixel_values: (b, t, v, c, h, w), or per camera (b, t, c, h, w) where sizes differ.
            pixel_mask: (b, v) bool, False where an optional camera is absent: its features are zero.
            input_ids, attention_mask: (b, n), or (1, n) for all.
            crop_offsets: (calls, 2), see `encode_images`.
        """
        parts = []
        if self.config.state_dim:
            parts.append(self._with_history("state", state, 1))  # (b, t, s)
        if self.config.image_features:
            features = self.encode_images(pixel_values, crop_offsets)  # (b, t, v, 2k)
            if pixel_mask is not None:
                features = torch.where(pixel_mask[:, None, :, None], features, 0)
            parts.append(features.flatten(2))
        if self.config.environment_state_dim:
            parts.append(self._with_history("environment_state", environment_state, 1))  # (b, t, e)
        if self.config.reads_instruction:
            b, t = parts[0].shape[:2]
            if len(input_ids) not in (1, b):
                raise FeatureShapeError(
                    "input_ids", tuple(input_ids.shape), f"one instruction, or one for each of {b}"
                )
            sentence = self.encode_language(input_ids, attention_mask)  # (b or 1, language width)
            parts.append(sentence[:, None].expand(b, t, -1))
        return torch.cat(parts, dim=-1).flatten(1)  # (b, t, g / t) → (b, g)

    def encode_images(
        self, pixel_values: torch.Tensor | list[torch.Tensor], crop_offsets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the cameras' features (b, t, v, 2k).

        Args:
            pixel_values: (b, t, v, c, h, w), or per camera (b, t, c, h, w) where sizes differ.
            crop_offsets: (calls, 2) where each call of an encoder crops: one call per camera with separate encoders,
                else one per size of image.
        """
        views = list(pixel_values.unbind(-4)) if isinstance(pixel_values, torch.Tensor) else pixel_values
        views = [self._with_history("pixel_values", view, 3) for view in views]  # (b, t, c, h, w) each
        b, t = views[0].shape[:2]
        if self.config.use_separate_rgb_encoder_per_camera:
            calls = [(encoder, [i]) for i, encoder in enumerate(self.rgb_encoder)]
        else:
            sizes = dict.fromkeys(view.shape[2:] for view in views)
            calls = [(self.rgb_encoder, [i for i, view in enumerate(views) if view.shape[2:] == s]) for s in sizes]
        if crop_offsets is not None and tuple(crop_offsets.shape) != (len(calls), 2):
            raise FeatureShapeError("crop_offsets", tuple(crop_offsets.shape), f"({len(calls)}, 2)")
        features: dict[int, torch.Tensor] = {}
        for call, (encoder, group) in enumerate(calls):
            images = torch.cat([views[i] for i in group]).flatten(0, 1)  # (cameras · b · t, c, h, w)
            encoded = encoder(images, None if crop_offsets is None else crop_offsets[call])
            features |= dict(zip(group, encoded.view(len(group), b, t, -1), strict=True))
        return torch.stack([features[i] for i in range(len(views))], dim=2)

    def encode_language(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the instructions' vectors (b, language width) for tokens (b, n)."""
        with torch.no_grad():
            sentence = self.language_encoder(input_ids, attention_mask=attention_mask).text_embeds  # (b, embedding)
        return self.language_dropout(self.language_projection(sentence))

    def _with_history(self, name: str, x: torch.Tensor, dimensions: int) -> torch.Tensor:
        """Return (b, t, …); with t = 1, that dimension may be absent."""
        t = self.config.n_obs_steps
        given = tuple(x.shape)
        if t == 1 and x.ndim == dimensions + 1:
            x = x[:, None]
        if x.ndim != dimensions + 2 or x.shape[1] != t:
            raise FeatureShapeError(name, given, f"(batch, {t}, …): n_obs_steps={t} observations each")
        return x

    # --- training -------------------------------------------------------------------------------------

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
        inputs = self.read_batch(batch)
        observation = {name: inputs.get(name) for name in _OBSERVATION}
        condition = self.encode_observation(**observation, crop_offsets=crop_offsets)
        actions, is_pad = inputs["actions"], inputs.get("action_is_pad")
        if tuple(actions.shape[1:]) != (self.config.horizon, self.config.action_dim):
            expected = f"(batch, {self.config.horizon}, {self.config.action_dim})"
            raise FeatureShapeError("actions", tuple(actions.shape), expected)
        if not self.config.do_mask_loss_for_padding:
            is_pad = None
        elif is_pad is not None:
            # Convolutions carry padded steps into real ones: what stands there must not be chance.
            actions = fill_padded(actions, is_pad)
        noise = torch.randn_like(actions) if noise is None else noise
        if time is None:
            time = torch.randint(self.config.num_train_timesteps, (len(actions),), device=actions.device)
        noisy, target = self.noise_schedule.add_noise(actions.float(), noise.float(), time)
        prediction = self.unet(noisy.to(actions.dtype), time, condition)  # (b, h, a)
        return {"loss": masked_mean((prediction.float() - target) ** 2, is_pad)}

    # --- prediction -----------------------------------------------------------------------------------

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
            noise: (b, h, a) to start from; drawn when None.
            step_noise: (steps − 1, b, h, a) added on the way by DDPM; drawn when None.
            generator: of the draws.
            num_steps: denoising steps; by default `config.denoising_steps`.
        """
        inputs = self.read_batch(batch)
        condition = self.encode_observation(**{name: inputs.get(name) for name in _OBSERVATION})
        return self.sample(condition, noise, step_noise, generator, num_steps)

    def generate_actions(self, batch: Mapping[str, Any], **draws: Any) -> torch.Tensor:
        """Return the actions to execute (b, n_action_steps, a), from the current step on; see the method above."""
        return self.executed(self.generate_all_actions(batch, **draws))

    def executed(self, sequence: torch.Tensor) -> torch.Tensor:
        """Return the steps of a sequence (b, h, a) that are executed: from the current one, n_action_steps."""
        now = self.config.n_obs_steps - 1
        return sequence[:, now : now + self.config.n_action_steps]

    def sample(
        self,
        condition: torch.Tensor,
        noise: torch.Tensor | None = None,
        step_noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
    ) -> torch.Tensor:
        """Return the sequence (b, h, a) that is denoised under a condition (b, g); draws as above."""
        device, dtype = condition.device, condition.dtype
        shape = (len(condition), self.config.horizon, self.config.action_dim)
        num_steps = self.config.denoising_steps if num_steps is None else num_steps
        timesteps, coefficients = self.noise_schedule.steps(num_steps, device)
        draws = len(timesteps) - 1 if self.noise_schedule.draws_noise else 0
        for name, given, expected in (("noise", noise, shape), ("step_noise", step_noise, (draws, *shape))):
            if given is not None and tuple(given.shape) != expected:
                raise FeatureShapeError(name, tuple(given.shape), f"{expected}")

        def draw() -> torch.Tensor:
            where = device if generator is None else generator.device
            return torch.randn(shape, generator=generator, device=where).to(device)

        # Once per sequence: everything but the network itself. Actions stay in float32 between the steps.
        step_films = self.unet.step_films(timesteps)  # (steps, f)
        condition_films = self.unet.condition_films(condition)  # (b, f)
        actions = draw() if noise is None else noise.to(device, torch.float32)
        for i in range(len(timesteps)):
            extra = None
            if i < draws:
                extra = draw() if step_noise is None else step_noise[i].to(device, torch.float32)
            actions = self.denoise_step(actions, step_films[i], condition_films, coefficients[i], extra)
        return actions.to(dtype)

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
            coefficients: (5,), a row of `NoiseSchedule.steps`.
            noise: (b, h, a) to add, or None.
        """
        prediction = self.unet.denoise(actions.to(condition_films.dtype), step_film + condition_films)
        return self.noise_schedule.step(actions, prediction.float(), coefficients, noise)
