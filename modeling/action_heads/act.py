"""ACTActionHead: a VAE over action chunks (training only) and a transformer decoder that predicts one.

Shapes: b batch, n encoder tokens, h action horizon, a action width, d width, L latent width. Source: Zhao et al.
2023 (arXiv 2304.13705) and LeRobot's ACT, whose published parameter names are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ...configuration.act import ACTConfig
from ...errors import FeatureShapeError
from ..inputs import model_inputs
from ..layers.detr_transformer import Decoder, Encoder, LayerShape, start_xavier
from ..layers.positional import all_vectors, sinusoidal_1d
from ..precision import compute_dtype
from ..seam import Draws, Features, PolicyInputs, checked_draw


class ACTActionHead(nn.Module):
    """Encode a demonstrated chunk into a latent; decode encoder features into an action chunk.

    Args:
        config: with input and output features set.

    Raises:
        InvalidConfigError: the config is inconsistent or has no features.
    """

    parameter_parts = {"tune_diffusion_model": ("",)}
    lora_targets = {"tune_diffusion_model": ("linear1", "linear2")}
    modules_to_save = ("action_head",)
    stages = {"decoder": "forward"}
    no_split_modules = ("DecoderLayer",)

    def __init__(self, config: ACTConfig):
        super().__init__()
        config.require_features()
        self.config = config
        d = config.dim_model
        shape = LayerShape.from_config(config)
        if config.use_vae:
            self.vae_encoder_cls_embed = nn.Embedding(1, d)
            if config.state_dim:
                self.vae_encoder_robot_state_input_proj = nn.Linear(config.state_dim, d)
            self.vae_encoder_action_input_proj = nn.Linear(config.action_dim, d)
            self.vae_encoder = Encoder(config.n_vae_encoder_layers, shape)
            self.vae_encoder_latent_output_proj = nn.Linear(d, 2 * config.latent_dim)
            # Persistent, because published checkpoints hold it.
            self.register_buffer("vae_encoder_pos_enc", self.vae_positions())
        self.decoder = Decoder(config.n_decoder_layers, shape)
        self.decoder_pos_embed = nn.Embedding(config.chunk_size, d)
        self.action_head = nn.Linear(d, config.action_dim)
        for module in self.decoder.modules():
            module.start_weights = start_xavier

    def errors(
        self, features: Features, inputs: PolicyInputs, actions: torch.Tensor, draws: Draws
    ) -> dict[str, torch.Tensor]:
        """Return `l1`, the absolute error (b, h, a) of the chunk."""
        return {"l1": (self.sample(features, inputs, draws) - actions).abs()}

    def sample(self, features: Features, inputs: PolicyInputs, draws: Draws) -> torch.Tensor:
        """Return the chunk (b, h, a); nothing is drawn."""
        absent = None if features.mask is None else ~features.mask.bool()
        positions = torch.zeros_like(features.tokens[:1]) if features.positions is None else features.positions
        return self(features.tokens, positions, absent)

    @staticmethod
    def start_weights(module: ACTActionHead) -> None:
        """Fill the buffer, which transformers leaves empty on the meta device."""
        if module.config.use_vae:
            init.copy_(module.vae_encoder_pos_enc, module.vae_positions())

    def vae_positions(self) -> torch.Tensor:
        """Return the positions (1, 1 + [state] + h, d) of the VAE encoder's tokens."""
        n = 1 + bool(self.config.state_dim) + self.config.chunk_size
        return sinusoidal_1d(n, self.config.dim_model)[None]

    def encode_latent(
        self, batch: Mapping[str, Any], noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the latent sample and the distribution it was drawn from.

        Args:
            batch: under the dataset's or the model's names; `action` (b, h, a) is read while training.
            noise: (b, L) standard normal numbers of the draw; drawn here when None.

        Returns:
            `latent_sample` (b, L), `mu` (b, L), `log_sigma_x2` (b, L), the logarithm of the variance. Without
            VAE, without actions or in evaluation mode: zeros, None, None.
        """
        inputs = model_inputs(batch, self.config)
        if self.config.use_vae and self.training and "actions" in inputs:
            return self.sample_latent(inputs["actions"], inputs.get("action_is_pad"), inputs.get("state"), noise)
        like, dtype = PolicyInputs.of(inputs).first, compute_dtype(self.action_head)
        return torch.zeros(len(like), self.config.latent_dim, dtype=dtype, device=like.device), None, None

    def sample_latent(
        self,
        actions: torch.Tensor,
        action_is_pad: torch.Tensor | None,
        state: torch.Tensor | None,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw z ~ N(mu, sigma²) from the demonstrated actions (b, h, a); padded ones are masked."""
        b, h = actions.shape[:2]
        if h != self.config.chunk_size:
            expected = f"a horizon of chunk_size={self.config.chunk_size}"
            raise FeatureShapeError("actions", tuple(actions.shape), expected)
        tokens = [all_vectors(self.vae_encoder_cls_embed, actions).expand(b, 1, -1)]  # (b, 1, d)
        dtype = tokens[0].dtype  # batches come in float32
        if self.config.state_dim:
            tokens.append(self.vae_encoder_robot_state_input_proj(state.to(dtype))[:, None])  # (b, 1, d)
        observed = len(tokens)
        tokens.append(self.vae_encoder_action_input_proj(actions.to(dtype)))  # (b, h, d)
        x = torch.cat(tokens, dim=1)  # (b, 1 + [1] + h, d)
        mask = None
        if action_is_pad is not None:
            mask = torch.cat([action_is_pad.new_zeros(b, observed), action_is_pad], dim=1)  # True: not attended
        summary = self.vae_encoder(x, self.vae_encoder_pos_enc, mask)[:, 0]  # (b, d)
        mu, log_sigma_x2 = self.vae_encoder_latent_output_proj(summary).chunk(2, dim=-1)  # (b, L) each
        noise = torch.randn_like(mu) if noise is None else checked_draw("noise", noise, mu.shape)
        return mu + (log_sigma_x2 / 2).exp() * noise, mu, log_sigma_x2

    def decode_actions(
        self,
        encoder_out: torch.Tensor,
        batch_size: int,
        device: torch.device | str,
        encoder_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode encoder features into a normalised action chunk.

        Args:
            encoder_out: (n, b, d), from `ACTBackbone.encode_features`.
            batch_size: b.
            device: where the features are.
            encoder_positions: (n, 1, d), from `encode_features(..., return_positions=True)`. ACT adds them to
                the keys; None leaves the keys without positions.

        Returns:
            (b, h, a).
        """
        memory = encoder_out.to(device).transpose(0, 1)  # (b, n, d)
        if memory.shape[0] != batch_size:
            raise FeatureShapeError("encoder_out", tuple(encoder_out.shape), f"(tokens, {batch_size}, width)")
        positions = torch.zeros_like(memory[:1]) if encoder_positions is None else encoder_positions.transpose(0, 1)
        return self(memory, positions)

    def forward(
        self, features: torch.Tensor, positions: torch.Tensor, absent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the chunk (b, h, a) for features (b, n, d) at positions (1, n, d); `absent` (b, n) is not read."""
        queries = all_vectors(self.decoder_pos_embed, features)[None]  # (1, h, d)
        x = torch.zeros_like(queries).expand(features.shape[0], -1, -1)  # (b, h, d): DETR's empty queries
        return self.action_head(self.decoder(x, queries, features, positions, absent))
