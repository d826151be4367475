"""DETR's transformer: positions are added to queries and keys of every layer, never to values.

Shapes: b batch, n memory tokens, m query tokens, d width. Source: Carion et al. 2020 (arXiv 2005.12872), in the
form that ACT and LeRobot use; parameter names are theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers import initialization as init

from ...configuration.act import ACTConfig

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class LayerShape:
    """Describe every layer of a stack.

    Args:
        dim: d, width of the tokens.
        heads: of the attention.
        hidden: width between the two linear maps of the feed-forward.
        activation: between them; one of `ACTIVATIONS`.
        dropout: in attention, feed-forward and on both results.
        pre_norm: normalise before attention and feed-forward instead of after.
    """

    dim: int
    heads: int
    hidden: int
    activation: str
    dropout: float
    pre_norm: bool

    @classmethod
    def from_config(cls, config: ACTConfig) -> LayerShape:
        """Return the one shape that all layers of an ACT policy have."""
        return cls(
            config.dim_model,
            config.n_heads,
            config.dim_feedforward,
            config.feedforward_activation,
            config.dropout,
            config.pre_norm,
        )


def start_xavier(module: nn.Module) -> None:
    """Start a module's own matrices as the paper's code starts encoder and decoder; torch's defaults elsewhere."""
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            init.xavier_uniform_(parameter)


class Attention(nn.MultiheadAttention):
    """Attend with one fused kernel at inference, and with an explicit softmax where gradients are wanted.

    The fused kernels recompute exp(score − logsumexp) in their backward pass. Where image features make scores
    of 10⁴ and more, as ACT's first layer does, float32 leaves an error in that exponent and gradients come out
    tens of times too large; the explicit softmax keeps its result and has no such error.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__(dim, heads, dropout=dropout, batch_first=True)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map queries (b, m, d), keys and values (b, n, d) → (b, m, d); masked keys (b, n) are True."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (b, heads, n, e)
            for x, weight, bias in zip((q, k, v), weights, biases, strict=True)
        )
        bias, dropout = None, self.dropout if self.training else 0.0
        if key_padding_mask is not None:
            bias = torch.zeros_like(key_padding_mask, dtype=q.dtype).masked_fill(key_padding_mask, -torch.inf)
            bias = bias[:, None, None]  # (b, 1, 1, n)
        if torch.is_grad_enabled():
            scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(2, 3)  # (b, heads, m, n)
            scores = scores if bias is None else scores + bias
            out = F.dropout(scores.softmax(dim=-1), dropout) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # called, where torch's own forward reads its weight


class FeedForward(nn.Module):
    """Hold what both kinds of layer share: the two linear maps and their dropout."""

    def __init__(self, shape: LayerShape):
        super().__init__()
        self.linear1 = nn.Linear(shape.dim, shape.hidden)
        self.linear2 = nn.Linear(shape.hidden, shape.dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.activation = ACTIVATIONS[shape.activation]
        self.pre_norm = shape.pre_norm

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (b, n, d) → (b, n, d)."""
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class EncoderLayer(FeedForward):
    """Self-attention, then a feed-forward; the norm stands before or after each."""

    def __init__(self, shape: LayerShape):
        super().__init__(shape)
        self.self_attn = Attention(shape.dim, shape.heads, shape.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(shape.dim), nn.LayerNorm(shape.dim)
        self.dropout1, self.dropout2 = nn.Dropout(shape.dropout), nn.Dropout(shape.dropout)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, key_padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        def attend(x: torch.Tensor) -> torch.Tensor:
            q = x + positions  # (b, n, d)
            return self.dropout1(self.self_attn(q, q, x, key_padding_mask))

        if self.pre_norm:
            x = x + attend(self.norm1(x))
            return x + self.dropout2(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + attend(x))
        return self.norm2(x + self.dropout2(self.feed_forward(x)))


class DecoderLayer(FeedForward):
    """Self-attention over the queries, cross-attention to the memory, a feed-forward."""

    def __init__(self, shape: LayerShape):
        super().__init__(shape)
        self.self_attn = Attention(shape.dim, shape.heads, shape.dropout)
        self.multihead_attn = Attention(shape.dim, shape.heads, shape.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(shape.dim) for _ in range(3))
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(shape.dropout) for _ in range(3))

    def forward(
        self,
        x: torch.Tensor,
        query_positions: torch.Tensor,
        memory: torch.Tensor,
        memory_positions: torch.Tensor,
        memory_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        def attend_self(x: torch.Tensor) -> torch.Tensor:
            q = x + query_positions  # (b, m, d)
            return self.dropout1(self.self_attn(q, q, x))

        def attend_memory(x: torch.Tensor) -> torch.Tensor:
            q, k = x + query_positions, memory + memory_positions  # (b, m, d), (b, n, d)
            return self.dropout2(self.multihead_attn(q, k, memory, memory_padding_mask))

        if self.pre_norm:
            x = x + attend_self(self.norm1(x))
            x = x + attend_memory(self.norm2(x))
            return x + self.dropout3(self.feed_forward(self.norm3(x)))
        x = self.norm1(x + attend_self(x))
        x = self.norm2(x + attend_memory(x))
        return self.norm3(x + self.dropout3(self.feed_forward(x)))


class Encoder(nn.Module):
    """A stack of encoder layers; with pre-norm, a last norm."""

    def __init__(self, layers: int, shape: LayerShape):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(layers))
        self.norm = nn.LayerNorm(shape.dim) if shape.pre_norm else nn.Identity()

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, key_padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, positions, key_padding_mask)  # (b, n, d)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers and a last norm."""

    def __init__(self, layers: int, shape: LayerShape):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(layers))
        self.norm = nn.LayerNorm(shape.dim)

    def forward(
        self,
        x: torch.Tensor,
        query_positions: torch.Tensor,
        memory: torch.Tensor,
        memory_positions: torch.Tensor,
        memory_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, query_positions, memory, memory_positions, memory_padding_mask)  # (b, m, d)
        return self.norm(x)
