"""Adaptive RMSNorm: a condition, such as the flow time, scales, shifts and gates instead of weights (π0.5).

Shapes: w width of the tokens and of the condition. A modulation (…, 3 w) is scale, shift and gate, one behind the
other. Source: openpi's `adarms`, after Peebles & Xie 2023 (arXiv 2212.09748).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers import initialization as init


class AdaptiveRMSNorm(nn.Module):
    """Apply x / rms(x) · scale + shift in float32; it has no weights of its own.

    Args:
        width: w.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x (b, n, w), normalised, and the gate of what a block adds to x, both in the type of x.

        Args:
            x: (b, n, w).
            modulation: (b, 1, 3 w), or (3 w,) for all alike, see `ExpertModulation`.
        """
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normal = F.rms_norm(x.float(), (self.width,), eps=self.eps)
        return torch.addcmul(shift, normal, scale).type_as(x), gate.type_as(x)


class ExpertModulation(nn.Module):
    """Compute the modulations of all norms of a Gemma from one condition.

    They stand outside the layers: for sampling they are computed once for all steps, and a layer that is sharded or
    recomputed holds no weights that are read outside its own pass.

    Args:
        width: w.
        layers: of the Gemma, each with two norms; one more follows the last.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(LayerModulation(width) for _ in range(layers))
        self.norm = modulating_linear(width)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        """Return the modulations (…, (6 layers + 3) · w), in the order of the norms, for a condition (…, w).

        Their scales are complete: 1 + what the linear layers say. The gates are not.
        """
        norms = [norm for layer in self.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        raw = torch.stack([norm(condition) for norm in (*norms, self.norm)], dim=-2)  # (…, 2 layers + 1, 3 w)
        scale, rest = raw.split((condition.shape[-1], 2 * condition.shape[-1]), dim=-1)
        return torch.cat([1.0 + scale, rest], dim=-1).flatten(-2)


class LayerModulation(nn.Module):
    """Hold what modulates the two norms of one layer."""

    def __init__(self, width: int):
        super().__init__()
        self.input_layernorm = modulating_linear(width)
        self.post_attention_layernorm = modulating_linear(width)


def modulating_linear(width: int) -> nn.Linear:
    """Return a linear layer that makes a modulation (…, 3 w) of a condition (…, w)."""
    linear = nn.Linear(width, 3 * width)
    linear.start_weights = start_modulation
    return linear


def start_modulation(linear: nn.Linear) -> None:
    """Start without any influence of the condition, and with gates that are not shut, as LeRobot does."""
    init.zeros_(linear.weight)
    bound = linear.in_features**-0.5
    init.uniform_(linear.bias, -bound, bound)
