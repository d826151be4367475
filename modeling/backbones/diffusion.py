"""DiffusionBackbone: a short history of observations as one vector, the condition of Diffusion Policy.

Shapes: b batch, t observation history, v cameras, k keypoints, g width of the condition. Source: Chi et al. 2023
(arXiv 2303.04137), LeRobot's Diffusion Policy and InternManip's variant with CLIP, whose published parameter names are
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..._tokenizers import load_tokenizer, notice_instruction, read_instructions, require_fitting_tokenizer
from ...configuration.diffusion import DiffusionConfig
from ...errors import FeatureShapeError, InvalidConfigError
from ..freezing import PartlyFrozen
from ..inputs import model_inputs
from ..kernels import require_kernel
from ..layers.text_encoder import build_text_encoder
from ..seam import Features, PolicyInputs
from .diffusion_rgb import DiffusionRgbEncoder


class DiffusionBackbone(PartlyFrozen):
    """Encode states, cameras and, where configured, an instruction; observations carry history (b, t, …).

    Args:
        config: with input and output features set.
        tokenizer: of instructions that come as text; by default that of `config.language_model_name`, loaded when
            needed.

    Raises:
        InvalidConfigError: the config is inconsistent, has no features, or its text encoder cannot be read.
    """

    parameter_parts = {"tune_visual": ("rgb_encoder",), "tune_projector": ("language_projection",)}
    lora_targets = {"tune_visual": ("convolution",), "tune_projector": ("language_projection",)}
    quantizable = ("language_encoder.text_model",)
    stages = {"observation": "encode_observation"}
    no_split_modules = ("CLIPEncoderLayer",)
    draws = ("crop_offsets",)  # what encoding draws in training

    def __init__(self, config: DiffusionConfig, tokenizer: Callable | None = None):
        super().__init__()
        self.build_encoders(config, tokenizer)

    def build_encoders(self, config: DiffusionConfig, tokenizer: Callable | None = None) -> None:
        """Build what encodes an observation."""
        config.require_features()
        self.config = config
        self.tokenizer = tokenizer
        self._noticed: set[str] | None = None  # the instructions that were checked, once the tokenizer was
        cameras = list(config.image_features)
        if cameras and config.use_separate_rgb_encoder_per_camera:
            self.rgb_encoder = nn.ModuleList(DiffusionRgbEncoder(config, camera) for camera in cameras)
        elif cameras:
            self.rgb_encoder = DiffusionRgbEncoder(config)
        if config.reads_instruction:
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
        self.width = config.features_width

    @property
    def input_embeddings(self) -> nn.Module | None:
        """The embedding of the text encoder's tokens; None without one."""
        return self.language_encoder.get_input_embeddings() if self.config.reads_instruction else None

    def frozen_modules(self) -> list[nn.Module]:
        """Return the text encoder, of which only the projection after it is trained."""
        return [self.language_encoder] if self.config.reads_instruction else []

    def encode(self, inputs: PolicyInputs, crop_offsets: torch.Tensor | None = None) -> Features:
        """Return the condition as one token (b, 1, g); `crop_offsets` are those of `encode_images`."""
        observation = PolicyInputs(*inputs[:-1])._replace(embodiment_id=None).given()
        return Features(self.encode_observation(**observation, crop_offsets=crop_offsets)[:, None])

    # --- observation → condition ----------------------------------------------------------------------

    def read_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return model inputs, with instructions tokenized; one text for all becomes one row."""
        texts = batch.get("language", batch.get("task"))
        if self.config.reads_instruction and texts is not None and batch.get("input_ids") is None:
            tokens = self._tokens(read_instructions(texts))
            device = self.language_projection.weight.device
            batch = {**batch, **{name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}}
        return model_inputs(batch, self.config)

    @property
    def _can_be_checked(self) -> bool:
        """Whether the tokenizer is transformers', and not another function that returns tokens."""
        return isinstance(self.tokenizer, PreTrainedTokenizerBase)

    def _tokens(self, texts: list[str]) -> Mapping[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` (b, n) of instructions, checked as a processor does it."""
        length = self.config.max_instruction_tokens
        if self._noticed is None:  # loaded, or given after construction
            self.tokenizer = self.tokenizer or load_tokenizer(self.config.language_model_name)
            self._noticed = set()
            if self._can_be_checked:
                require_fitting_tokenizer(self.tokenizer, self.config)
        for text in set(texts) - self._noticed if self._can_be_checked else ():
            notice_instruction(self.tokenizer, text, text, length, self.tokenizer.num_special_tokens_to_add())
        self._noticed.update(texts)
        limit = {"max_length": length} if self._can_be_checked else {}
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt", **limit)

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
        require_kernel(self.language_encoder.config._attn_implementation, input_ids.device)
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
