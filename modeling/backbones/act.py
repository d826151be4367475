"""ACTBackbone: latent, states and cameras as one sequence of tokens, fused by a transformer encoder.

Shapes: b batch, v cameras, n tokens, d width, L latent width. Source: Zhao et al. 2023 (arXiv 2304.13705) and
LeRobot's ACT, whose published parameter names are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...configuration.act import ACTConfig
from ..inputs import model_inputs
from ..layers.detr_transformer import Encoder, LayerShape, start_xavier
from ..layers.positional import all_vectors, sinusoidal_2d
from ..layers.resnet import build_resnet
from ..precision import compute_dtype
from ..seam import Features, PolicyInputs


class ACTBackbone(nn.Module):
    """Encode an observation and a latent style variable into features.

    Args:
        config: with input and output features set.

    Raises:
        InvalidConfigError: the config is inconsistent or has no features.
    """

    parameter_parts = {
        "tune_visual": ("image_encoder",),
        "tune_projector": (
            "encoder_img_feat_input_proj",
            "encoder_latent_input_proj",
            "encoder_robot_state_input_proj",
            "encoder_env_state_input_proj",
            "encoder_1d_feature_pos_embed",
        ),
        "tune_diffusion_model": ("encoder",),
    }
    # Attention has none: torch's fused module holds queries, keys and values in one matrix, which peft would merge and
    # take apart again at every pass.
    lora_targets = {
        "tune_visual": ("convolution",),
        "tune_projector": ("_input_proj",),
        "tune_diffusion_model": ("linear1", "linear2"),
    }
    quantizable = ("encoder",)
    stages = {"observation": "forward"}
    no_split_modules = ("EncoderLayer",)

    def __init__(self, config: ACTConfig):
        super().__init__()
        config.require_features()
        self.config = config
        self.width = d = config.dim_model
        if config.image_features:
            self.image_encoder = build_resnet(
                config.vision_backbone,
                config.vision_config,
                config.pretrained_backbone_weights,
                config.vision_norm,
            )
            self.encoder_img_feat_input_proj = nn.Conv2d(self.image_encoder.config.hidden_sizes[-1], d, kernel_size=1)
        self.encoder_latent_input_proj = nn.Linear(config.latent_dim, d)
        if config.state_dim:
            self.encoder_robot_state_input_proj = nn.Linear(config.state_dim, d)
        if config.environment_state_dim:
            self.encoder_env_state_input_proj = nn.Linear(config.environment_state_dim, d)
        n_vectors = 1 + bool(config.state_dim) + bool(config.environment_state_dim)
        self.encoder_1d_feature_pos_embed = nn.Embedding(n_vectors, d)
        self.encoder = Encoder(config.n_encoder_layers, LayerShape.from_config(config))
        for module in self.encoder.modules():
            module.start_weights = start_xavier

    def encode(self, inputs: PolicyInputs, latent: torch.Tensor | None = None) -> Features:
        """Return the features of an observation under a latent style (b, L); None is the mean style, zeros."""
        dtype = compute_dtype(self.encoder_latent_input_proj)
        inputs = inputs.in_dtype(dtype)
        if latent is None:
            like = inputs.first
            latent = torch.zeros(len(like), self.config.latent_dim, dtype=dtype, device=like.device)
        tokens, positions, absent = self(
            latent, inputs.state, inputs.environment_state, inputs.pixel_values, inputs.pixel_mask
        )
        return Features(tokens, None if absent is None else ~absent, positions)

    def encode_features(
        self, batch: Mapping[str, Any], latent_sample: torch.Tensor, return_positions: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode a batch under the dataset's names (or the model's).

        Args:
            batch: see `model_inputs`; normalised.
            latent_sample: (b, L); zeros at inference.
            return_positions: also return the tokens' positions, which `ACTActionHead.decode_actions` adds to
                its keys.

        Returns:
            Features (n, b, d), token-major as in the paper's code; with `return_positions` also (n, 1, d).
        """
        inputs = model_inputs(batch, self.config)
        names = ("state", "environment_state", "pixel_values", "pixel_mask")
        features, positions, _ = self(latent_sample, **{name: inputs.get(name) for name in names})
        features, positions = features.transpose(0, 1), positions.transpose(0, 1)
        return (features, positions) if return_positions else features

    def forward(
        self,
        latent: torch.Tensor,
        state: torch.Tensor | None = None,
        environment_state: torch.Tensor | None = None,
        pixel_values: torch.Tensor | list[torch.Tensor] | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return features (b, n, d), positions (1, n, d) and a mask (b, n), True at tokens of absent cameras.

        Tokens, in order: latent, state, environment state, the pixels of each camera's feature map row by row.
        """
        vectors = [self.encoder_latent_input_proj(latent)]  # (b, d)
        if self.config.state_dim:
            vectors.append(self.encoder_robot_state_input_proj(state))
        if self.config.environment_state_dim:
            vectors.append(self.encoder_env_state_input_proj(environment_state))
        tokens = [torch.stack(vectors, dim=1)]  # (b, 1..3, d)
        positions = [all_vectors(self.encoder_1d_feature_pos_embed, latent)]  # (1..3, d)
        camera_tokens = []
        if self.config.image_features:
            for feature_map in self.encode_images(pixel_values):  # (b, d, h, w)
                camera_tokens.append(feature_map.shape[2] * feature_map.shape[3])
                tokens.append(feature_map.flatten(2).transpose(1, 2))  # (b, h·w, d)
                positions.append(sinusoidal_2d(*feature_map.shape[2:], self.config.dim_model, like=feature_map))
        x = torch.cat(tokens, dim=1)  # (b, n, d)
        p = torch.cat(positions, dim=0)[None]  # (1, n, d)
        absent = None
        if pixel_mask is not None:
            cameras = (~pixel_mask).split(1, dim=1)  # (b, 1) each
            spread = [camera.expand(-1, width) for camera, width in zip(cameras, camera_tokens, strict=True)]
            absent = torch.cat([pixel_mask.new_zeros(len(x), len(vectors)), *spread], dim=1)  # (b, n)
        return self.encoder(x, p, absent), p, absent

    def encode_images(self, pixel_values: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
        """Return one feature map (b, d, h, w) per camera; cameras of one size share a pass through the ResNet.

        Args:
            pixel_values: (b, v, c, h, w), or per camera (b, c, h, w) where sizes differ.
        """
        views = list(pixel_values.unbind(1)) if isinstance(pixel_values, torch.Tensor) else list(pixel_values)
        maps: dict[int, torch.Tensor] = {}
        for size in dict.fromkeys(view.shape[1:] for view in views):
            group = [i for i, view in enumerate(views) if view.shape[1:] == size]
            images = torch.cat([views[i] for i in group]) if len(group) > 1 else views[group[0]]  # (g·b, c, h, w)
            # In the order that convolutions compute in, and in which the maps below are tokens without a copy.
            images = images.contiguous(memory_format=torch.channels_last)
            encoded = self.encoder_img_feat_input_proj(self.image_encoder(images).last_hidden_state)
            maps |= dict(zip(group, encoded.chunk(len(group)), strict=True))  # (b, d, h, w) each
        return [maps[i] for i in range(len(views))]
