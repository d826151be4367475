"""Spatial softmax: where in the picture each feature is (Finn et al. 2016, arXiv 1509.06113)."""

import torch
from torch import nn
from transformers import initialization as init


class SpatialSoftmax(nn.Module):
    """Reduce feature maps to keypoints: the expected position under a softmax over the pixels.

    Args:
        channels: of the feature map.
        keypoints: k; a 1 × 1 convolution brings the channels to as many heat maps.
        size: (height, width) of the feature map.
    """

    def __init__(self, channels: int, keypoints: int, size: tuple[int, int]):
        super().__init__()
        self.size = tuple(size)
        self.nets = nn.Conv2d(channels, keypoints, kernel_size=1)
        # Persistent, because published checkpoints hold it.
        self.register_buffer("pos_grid", pixel_positions(*self.size))

    @staticmethod
    def start_weights(module: "SpatialSoftmax") -> None:
        """Fill the buffer, which transformers leaves empty on the meta device."""
        init.copy_(module.pos_grid, pixel_positions(*module.size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the keypoints' (x, y) in [-1, 1], (b, k, 2), for a feature map (b, c, h, w)."""
        heat = self.nets(features).flatten(2).softmax(dim=-1)  # (b, k, h·w)
        size = tuple(features.shape[2:])
        grid = self.pos_grid if size == self.size else pixel_positions(*size, like=features)
        return (heat.to(grid.dtype) @ grid).to(heat.dtype)  # (b, k, 2)


def pixel_positions(height: int, width: int, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return (x, y) of every pixel, row by row, from -1 to 1: (h·w, 2)."""
    options = {} if like is None else {"device": like.device, "dtype": like.dtype}
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, **options), torch.linspace(-1, 1, width, **options), indexing="ij"
    )
    return torch.stack([x.flatten(), y.flatten()], dim=1)
