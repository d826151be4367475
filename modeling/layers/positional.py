"""Positional encodings: fixed sinusoids over one axis (time), two (an image), and of a timestep."""

import math

import torch
from torch import nn


def sinusoidal_1d(length: int, width: int) -> torch.Tensor:
    """Return (length, width) sinusoids: sine on even, cosine on odd channels (Vaswani et al. 2017)."""
    position = torch.arange(length, dtype=torch.float64, device="cpu")[:, None]  # (n, 1)
    channel = torch.arange(width, device="cpu")
    angle = position / 10000 ** (2 * (channel // 2) / width).double()  # (n, d)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()  # float64 until here, as published


def sinusoidal_2d(height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Return (h·w, channels) encodings of pixel positions, row-major: the y half, then the x half.

    Positions run from 1 and are scaled to (0, 2π], as in DETR's and ACT's image encoding.
    """
    half = channels // 2
    j = torch.arange(half, dtype=torch.float32, device=like.device)
    inverse_frequency = 10000 ** (2 * torch.div(j, 2, rounding_mode="floor") / half)  # (d/2,)

    def encode(size: int) -> torch.Tensor:
        position = torch.arange(1, size + 1, dtype=torch.float32, device=like.device)
        position = position / (size + 1e-6) * (2 * math.pi)  # (n,)
        angle = position[:, None] / inverse_frequency  # (n, d/2)
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)  # (n, d/2)

    y = encode(height)[:, None].expand(height, width, half)
    x = encode(width)[None, :].expand(height, width, half)
    return torch.cat([y, x], dim=-1).flatten(0, 1).to(like.dtype)  # (h·w, d)


def all_vectors(embedding: nn.Embedding, like: torch.Tensor) -> torch.Tensor:
    """Return all vectors (n, d) of an embedding, on the device of a tensor.

    It is called rather than read: that is when FSDP gathers its weight, and when an offloaded one is fetched.
    """
    return embedding(torch.arange(embedding.num_embeddings, device=like.device))


def encode_timesteps(
    timesteps: torch.Tensor, log_frequencies: torch.Tensor, cosine_first: bool = False
) -> torch.Tensor:
    """Return sines and cosines (n, width) of timesteps (n,), float32.

    Args:
        timesteps: (n,).
        log_frequencies: (width / 2,) float32, falling from 0 to about -log(10000). Each network has them as its
            authors compute them: in another order they are rounded otherwise, which 1000 steps make visible.
        cosine_first: cosines, then sines.
    """
    angles = timesteps[:, None].float() * log_frequencies.exp()  # (n, width / 2)
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)
