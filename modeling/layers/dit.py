"""Transformers of GR00T: one that a timestep modulates, and one whose tokens attend to each other.

Shapes: b batch, m tokens, d their width, n features, c their width, k heads, e width of a head, t timesteps. The
architecture is that of Peebles & Xie 2023 (arXiv 2212.09748) with cross-attention to features; parameter names are
the published ones of GR00T, which are diffusers'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from ...configuration.flow_matching import DiTConfig, SelfAttentionTransformerConfig
from ..precision import compute_dtype
from .positional import encode_timesteps, sinusoidal_1d

TIME_CHANNELS = 256  # sines and cosines that a timestep is encoded by
OUTPUT_EPS = 1e-6  # of the last norm; that of the blocks' adaptive norms:
ADAPTIVE_EPS = 1e-5

# Keys and values (b, k, n, e) each; gain and shift, (b, d) each, or (d,) where all samples have the same timestep.
KeysValues = tuple[torch.Tensor, torch.Tensor]
Modulation = tuple[torch.Tensor, torch.Tensor]


def modulated_norm(x: torch.Tensor, modulation: Modulation, eps: float) -> torch.Tensor:
    """Return LN(x) · gain + shift for x (b, m, d)."""
    gain, shift = (part.to(x.dtype) for part in modulation)
    if gain.ndim == 1:
        return F.layer_norm(x, gain.shape, gain, shift, eps)
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=eps), gain[:, None])


# --- parts of a block -------------------------------------------------------------------------------------


class TimestepEmbedding(nn.Module):
    """Map the sines and cosines of a timestep to its embedding (t, d)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimestepEncoder(nn.Module):
    """Embed timesteps (t,) as (t, d)."""

    def __init__(self, width: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_CHANNELS, width)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = TIME_CHANNELS // 2
        steps = torch.arange(half, device=timesteps.device, dtype=torch.float32)
        waves = encode_timesteps(timesteps, steps * -math.log(10000) / (half - 1), cosine_first=True)  # (t, channels)
        return self.timestep_embedder(waves.to(compute_dtype(self.timestep_embedder)))


class AdaLayerNorm(nn.Module):
    """Normalise tokens, with gain and shift that a timestep's embedding decides."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def modulation(self, embedding: torch.Tensor) -> Modulation:
        """Return gain and shift (t, d) for the embeddings (t, d) of timesteps."""
        scale, shift = self.linear(F.silu(embedding)).chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x: torch.Tensor, modulation: Modulation) -> torch.Tensor:
        return modulated_norm(x, modulation, ADAPTIVE_EPS)


class SinusoidalPositionalEmbedding(nn.Module):
    """Add the sinusoids of their positions to tokens (b, m, d)."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("pe", sinusoidal_1d(length, width)[None])  # saved, as published

    def reset_parameters(self) -> None:
        """Fill the buffer again: a model built without storage has lost its values."""
        init.copy_(self.pe, sinusoidal_1d(*self.pe.shape[1:]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.pe[:, : x.shape[1]].to(x.dtype)


class Attention(nn.Module):
    """Let tokens (b, m, d) attend to features (b, n, c), or to each other where there are none."""

    def __init__(self, heads: int, head_dim: int, context_dim: int | None, dropout: float, bias: bool):
        super().__init__()
        self.heads = heads
        width = heads * head_dim
        context_dim = context_dim or width
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_dim, width, bias=bias)
        self.to_v = nn.Linear(context_dim, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, n, d) → (b, k, n, e)

    def keys_values(self, context: torch.Tensor) -> KeysValues:
        """Return keys and values (b, k, n, e) of features (b, n, c)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(
        self,
        x: torch.Tensor,
        keys_values: KeysValues | None = None,
        mask: torch.Tensor | None = None,
        last: int = 0,
    ) -> torch.Tensor:
        """Return (b, m, d), or only the `last` tokens; `mask` (b, 1, 1, n) is True where a feature may be seen."""
        k, v = self.keys_values(x) if keys_values is None else keys_values
        x = x[:, -last:]  # all of them where it is 0
        x = F.scaled_dot_product_attention(self._split(self.to_q(x)), k, v, attn_mask=mask)  # (b, k, m, e)
        linear, dropout = self.to_out
        return dropout(linear(x.transpose(1, 2).flatten(2)))


class GELUProjection(nn.Module):
    """Project to a wider space, through a GELU."""

    def __init__(self, width: int, inner: int, approximate: str):
        super().__init__()
        self.proj = nn.Linear(width, inner)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Project to four times the width and back."""

    def __init__(self, width: int, activation: str, dropout: float, final_dropout: bool):
        super().__init__()
        first = GELUProjection(width, 4 * width, "tanh" if activation == "gelu-approximate" else "none")
        last = [nn.Dropout(dropout)] if final_dropout else []
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(4 * width, width), *last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


# --- a block ----------------------------------------------------------------------------------------------


class PreparedBlock(NamedTuple):
    """What of a block does not depend on its tokens."""

    modulation: Modulation | None  # None: the norm has weights of its own
    keys_values: KeysValues | None  # None: the tokens attend to each other


class TransformerBlock(GradientCheckpointingLayer):
    """Pass tokens through attention and feed-forward, each with its norm and residual.

    Args:
        config: widths, dropout, activation.
        adaptive: whether a timestep modulates the first norm.
        context_dim: width of the features; None where tokens attend to each other.
        affine, eps: of the norms without modulation.
    """

    def __init__(
        self,
        config: SelfAttentionTransformerConfig,
        adaptive: bool = False,
        context_dim: int | None = None,
        affine: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        d, dropout, final = config.width, config.dropout, config.final_dropout
        self.norm1 = AdaLayerNorm(d) if adaptive else nn.LayerNorm(d, eps, affine)
        self.pos_embed = None
        if config.positional_embeddings:
            self.pos_embed = SinusoidalPositionalEmbedding(config.max_num_positional_embeddings, d)
        self.attn1 = Attention(
            config.num_attention_heads, config.attention_head_dim, context_dim, dropout, config.attention_bias
        )
        self.final_dropout = nn.Dropout(dropout if final else 0.0)
        self.norm3 = nn.LayerNorm(d, eps, affine)
        self.ff = FeedForward(d, config.activation_fn, dropout, final)
        self.adaptive = adaptive

    def forward(
        self,
        x: torch.Tensor | None,
        embedding: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        prepared: PreparedBlock | None = None,
        last: int = 0,
    ) -> torch.Tensor | PreparedBlock:
        """Return the tokens (b, m, d); without tokens what can be computed without them, for the next calls.

        Args:
            x: (b, m, d), or None.
            embedding: (b, d) of the timestep of each sample; (t, d) where x is None.
            context: (b, n, c) features to attend to.
            mask: (b, 1, 1, keys) bool, True where one may be seen.
            prepared: what was prepared, instead of `embedding` and `context`.
            last: how many tokens to return, from the end; 0: all.
        """
        if prepared is None:
            modulation = self.norm1.modulation(embedding) if self.adaptive else None
            prepared = PreparedBlock(modulation, None if context is None else self.attn1.keys_values(context))
        if x is None:
            return prepared
        y = self.norm1(x, prepared.modulation) if self.adaptive else self.norm1(x)
        if self.pos_embed is not None:
            y = self.pos_embed(y)
        x = x[:, -last:] + self.final_dropout(self.attn1(y, prepared.keys_values, mask, last))
        return x + self.ff(self.norm3(x))


# --- stacks of blocks -------------------------------------------------------------------------------------


class PreparedDiT(NamedTuple):
    """What of a transformer does not depend on its tokens, for all timesteps (t,) or for one."""

    blocks: list[PreparedBlock]
    output: Modulation
    mask: torch.Tensor | None

    def at(self, i: int) -> PreparedDiT:
        """Return what the i-th timestep needs."""
        blocks = [PreparedBlock(_at(block.modulation, i), block.keys_values) for block in self.blocks]
        return PreparedDiT(blocks, _at(self.output, i), self.mask)


class DiT(nn.Module):
    """Pass tokens through blocks that a timestep modulates, and that attend to features.

    Args:
        config (`DiTConfig`): widths and depth.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        d = config.width
        self.timestep_encoder = TimestepEncoder(d)
        # Which blocks attend to features; the tokens of the others attend to each other.
        self.crosses = [not (config.interleave_self_attention and i % 2) for i in range(config.num_layers)]
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                config,
                adaptive=config.norm_type == "ada_norm",
                context_dim=config.cross_attention_dim if crosses else None,
                affine=config.norm_elementwise_affine,
                eps=config.norm_eps,
            )
            for crosses in self.crosses
        )
        self.proj_out_1 = nn.Linear(d, 2 * d)
        self.proj_out_2 = nn.Linear(d, config.output_dim)

    def forward(
        self,
        x: torch.Tensor,
        features: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return (b, m, output_dim).

        Args:
            x: (b, m, d) tokens.
            features: (b, n, c).
            timesteps: (b,).
            mask: (b, 1, 1, n) bool, True where a feature may be seen; None: all may.
        """
        embedding = self.timestep_encoder(timesteps)  # (b, d)
        for block, crosses in zip(self.transformer_blocks, self.crosses, strict=True):
            x = block(x, embedding, *((features, mask) if crosses else (None, None)))
        return self._output(x, self._output_modulation(embedding))

    def prepare(
        self, features: torch.Tensor, timesteps: torch.Tensor, mask: torch.Tensor | None = None
    ) -> PreparedDiT:
        """Return what `step` needs besides the tokens, for timesteps (t,) that all samples share.

        Blocks are called, not reached into: whoever shards weights gathers them when a block is called.
        """
        embedding = self.timestep_encoder(timesteps)  # (t, d)
        blocks = [
            block(None, embedding, features if crosses else None)
            for block, crosses in zip(self.transformer_blocks, self.crosses, strict=True)
        ]
        return PreparedDiT(blocks, self._output_modulation(embedding), mask)

    def step(self, x: torch.Tensor, prepared: PreparedDiT, last: int) -> torch.Tensor:
        """Return (b, last, output_dim) of the last of tokens (b, m, d), with what was prepared for one timestep.

        What nobody reads is not computed: in the last block, the other tokens are seen but see nothing.
        """
        returned = [0] * (len(self.transformer_blocks) - 1) + [last]
        for block, ready, m in zip(self.transformer_blocks, prepared.blocks, returned, strict=True):
            x = block(x, None, None, None if ready.keys_values is None else prepared.mask, ready, m)
        return self._output(x, prepared.output)

    def _output_modulation(self, embedding: torch.Tensor) -> Modulation:
        shift, scale = self.proj_out_1(F.silu(embedding)).chunk(2, dim=-1)  # in the other order than a block's
        return 1 + scale, shift

    def _output(self, x: torch.Tensor, modulation: Modulation) -> torch.Tensor:
        return self.proj_out_2(modulated_norm(x, modulation, OUTPUT_EPS))


def _at(modulation: Modulation | None, i: int) -> Modulation | None:
    return None if modulation is None else (modulation[0][i], modulation[1][i])


class SelfAttentionTransformer(nn.Module):
    """Let tokens (b, n, d) attend to each other, block after block; there is no last norm.

    Args:
        config (`SelfAttentionTransformerConfig`): widths and depth.
    """

    def __init__(self, config: SelfAttentionTransformerConfig):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return (b, n, d); `mask` (b, 1, 1, n) is True where a token may be seen."""
        for block in self.transformer_blocks:
            x = block(x, None, None, mask)
        return x
