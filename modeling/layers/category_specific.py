"""Layers with weights of their own for each category, an embodiment say (Bjorck et al. 2025, arXiv 2503.14734).

Shapes: b batch, n tokens, c categories. Parameter names are the published ones of GR00T.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from .positional import encode_timesteps

# The category of each sample (b,), or the one that all samples are of: its weights are then read where they lie,
# while those of several categories are copied for every sample.
Categories = int | torch.Tensor
# Matrix and bias of a category, (in, out) and (out,), or of each sample's, (b, in, out) and (b, 1, out).
Affine = tuple[torch.Tensor, torch.Tensor]


def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Map (b, n, in) to (b, n, out)."""
    return F.linear(x, weight.T, bias) if weight.ndim == 2 else torch.baddbmm(bias, x, weight)


class CategorySpecificLinear(nn.Module):
    """Map (b, n, input_dim) to (b, n, output_dim) by the weights of each sample's category."""

    def __init__(self, num_categories: int, input_dim: int, output_dim: int):
        super().__init__()
        self.W = nn.Parameter(torch.empty(num_categories, input_dim, output_dim))
        self.b = nn.Parameter(torch.empty(num_categories, output_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights that keep the scale of what they map, and no bias.

        NVIDIA draws them with standard deviation 0.02, which suits its width of 1536 only: in a narrower network the
        tokens would vanish beside what attention adds to them.
        """
        nn.init.normal_(self.W, std=self.W.shape[1] ** -0.5)
        nn.init.zeros_(self.b)

    def forward(self, x: torch.Tensor | None, categories: Categories) -> torch.Tensor | Affine:
        """Return (b, n, output_dim); without tokens the weights that would map them."""
        shared = isinstance(categories, int)
        weights = self.W[categories], self.b[categories] if shared else self.b[categories].unsqueeze(1)
        return weights if x is None else affine(x, *weights)


class PreparedMLP(NamedTuple):
    """The weights of the categories at hand."""

    first: Affine
    last: Affine


class CategorySpecificMLP(nn.Module):
    """Map (b, n, input_dim) to (b, n, output_dim) by two layers with a ReLU between them."""

    def __init__(self, num_categories: int, input_dim: int, hidden_dim: int, output_dim: int):
        super().__init__()
        self.layer1 = CategorySpecificLinear(num_categories, input_dim, hidden_dim)
        self.layer2 = CategorySpecificLinear(num_categories, hidden_dim, output_dim)

    def forward(
        self, x: torch.Tensor, categories: Categories | None = None, prepared: PreparedMLP | None = None
    ) -> torch.Tensor:
        """Return (b, n, output_dim); `prepared` is what was prepared for the categories, instead of them."""
        if prepared is not None:
            return affine(F.relu(affine(x, *prepared.first)), *prepared.last)
        return self.layer2(F.relu(self.layer1(x, categories)), categories)

    def prepare(self, categories: Categories) -> PreparedMLP:
        """Return what calls for the same categories share."""
        return PreparedMLP(self.layer1(None, categories), self.layer2(None, categories))


class PreparedActionEncoder(NamedTuple):
    """The weights of the categories at hand, with the flow times worked in."""

    weight: torch.Tensor  # (action_dim, width) or (b, action_dim, width)
    biases: list[torch.Tensor]  # for each flow time (width,) or (b, 1, width)
    last: Affine

    def at(self, i: int) -> PreparedMLP:
        """Return the weights of the i-th flow time."""
        return PreparedMLP((self.weight, self.biases[i]), self.last)


class CategorySpecificActionEncoder(nn.Module):
    """Turn noisy actions (b, h, action_dim) and the code of their flow time into tokens (b, h, width)."""

    def __init__(self, num_categories: int, action_dim: int, width: int):
        super().__init__()
        self.W1 = CategorySpecificLinear(num_categories, action_dim, width)
        self.W2 = CategorySpecificLinear(num_categories, 2 * width, width)
        self.W3 = CategorySpecificLinear(num_categories, width, width)
        self.width = width

    def time_code(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the codes (t, width) of timesteps (t,), float32."""
        half = self.width // 2
        steps = torch.arange(half, device=timesteps.device, dtype=torch.float32)
        return encode_timesteps(timesteps, steps * (-math.log(10000) / half))

    def forward(
        self,
        actions: torch.Tensor,
        time_code: torch.Tensor | None = None,
        categories: Categories | None = None,
        prepared: PreparedMLP | None = None,
    ) -> torch.Tensor:
        """Return (b, h, width).

        Args:
            actions: (b, h, action_dim).
            time_code: (b, width).
            categories: (b,), or one for all.
            prepared: what was prepared for a flow time, instead of `time_code` and `categories`.
        """
        if prepared is not None:
            return affine(F.silu(affine(actions, *prepared.first)), *prepared.last)
        x = self.W1(actions, categories)  # (b, h, width)
        x = torch.cat([x, time_code[:, None].to(x.dtype).expand_as(x)], dim=-1)  # (b, h, 2 · width)
        return self.W3(F.silu(self.W2(x, categories)), categories)

    def prepare(self, time_codes: torch.Tensor, categories: Categories) -> PreparedActionEncoder:
        """Return what calls share besides the actions, for the codes (t, width) of flow times that samples share.

        Nothing bends between W1 and W2, so that they are one matrix, and what W2 makes of a flow time is a bias.
        """
        (weight, bias), (second, second_bias) = self.W1(None, categories), self.W2(None, categories)
        of_actions, of_time = second.chunk(2, dim=-2)  # (…, width, width) each
        bias = bias @ of_actions + second_bias + time_codes.to(of_time.dtype) @ of_time  # (t, width) or (b, t, width)
        biases = bias.unbind(0) if bias.ndim == 2 else bias.split(1, dim=1)
        return PreparedActionEncoder(weight @ of_actions, list(biases), self.W3(None, categories))
