"""Layers with weights of their own for each category, an embodiment say (Bjorck et al. 2025, arXiv 2503.14734).

Shapes: b batch, n tokens, c categories. Parameter names are the published ones of GR00T.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from .positional import encode_timesteps

# The category of each sample (b,), or the one that all samples are of: its weights are then read where they lie,
# while those of several categories are copied for every sample.
Categories = int | torch.Tensor


class CategorySpecificLinear(nn.Module):
    """Map (b, n, input_dim) to (b, n, output_dim) by the weights of each sample's category."""

    def __init__(self, num_categories: int, input_dim: int, output_dim: int):
        super().__init__()
        self.W = nn.Parameter(torch.empty(num_categories, input_dim, output_dim))
        self.b = nn.Parameter(torch.empty(num_categories, output_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as published: with standard deviation 0.02, and no bias."""
        nn.init.normal_(self.W, std=0.02)
        nn.init.zeros_(self.b)

    def forward(self, x: torch.Tensor, categories: Categories) -> torch.Tensor:
        """Return (b, n, output_dim)."""
        return torch.matmul(x, self.W[categories]) + self.b[categories].unsqueeze(-2)


class CategorySpecificMLP(nn.Module):
    """Map (b, n, input_dim) to (b, n, output_dim) by two layers with a ReLU between them."""

    def __init__(self, num_categories: int, input_dim: int, hidden_dim: int, output_dim: int):
        super().__init__()
        self.layer1 = CategorySpecificLinear(num_categories, input_dim, hidden_dim)
        self.layer2 = CategorySpecificLinear(num_categories, hidden_dim, output_dim)

    def forward(self, x: torch.Tensor, categories: Categories) -> torch.Tensor:
        """Return (b, n, output_dim)."""
        return self.layer2(F.relu(self.layer1(x, categories)), categories)


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

    def forward(self, actions: torch.Tensor, time_code: torch.Tensor, categories: Categories) -> torch.Tensor:
        """Return (b, h, width).

        Args:
            actions: (b, h, action_dim).
            time_code: (b, width), or (1, width) where all flow times are the same.
            categories: (b,), or one for all.
        """
        x = self.W1(actions, categories)  # (b, h, width)
        x = torch.cat([x, time_code[:, None].expand_as(x)], dim=-1)  # (b, h, 2 · width)
        return self.W3(F.silu(self.W2(x, categories)), categories)
