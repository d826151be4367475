"""Image augmentation: random shifts and colours for the pictures of training batches.

Shapes: b batch, t observation history, c channels, h height, w width.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InvalidConfigError

# Weights of red, green and blue in perceived brightness (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """Vary the pictures of training batches at random; every variation is off by default.

    One draw is made per sample and camera. The frames of an observation history share it, which preserves motion.

    Args:
        shift (`int`, *optional*, defaults to 0): move by up to so many pixels along each axis, uncovered pixels
            repeating the edge: a random crop of the padded picture.
        brightness (`float`, *optional*, defaults to 0): multiply by a factor from 1 - x to 1 + x.
        contrast (`float`, *optional*, defaults to 0): the same, of the distance to the picture's mean grey.
        saturation (`float`, *optional*, defaults to 0): the same, of the distance to each pixel's grey.

    Raises:
        InvalidConfigError: a negative shift, or a brightness, contrast or saturation outside [0, 1].

    Source: shifts as in DrQ (Yarats et al. 2021, arXiv 2004.13649), colours as in torchvision's `ColorJitter`.
    """

    shift: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self):
        if self.shift < 0:
            raise InvalidConfigError(f"shift={self.shift} must be a number of pixels, at least 0.")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidConfigError(f"{name}={getattr(self, name)} must lie in [0, 1].")

    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return one camera's pictures (b, c, h, w) or (b, t, c, h, w), varied; dtype and range stay.

        Args:
            images: uint8, or float in [0, 1].
            generator: of the draws; torch's own by default.
        """
        batch = images.shape[0]
        if self.shift:
            offsets = torch.randint(-self.shift, self.shift + 1, (batch, 2), generator=generator)
            images = shift_images(images, offsets)
        factors = {name: getattr(self, name) for name in ("brightness", "contrast", "saturation")}
        if any(factors.values()):
            unit = {name: 2 * torch.rand(batch, generator=generator) - 1 for name in factors}  # in [-1, 1)
            images = jitter_colors(
                images, **{name: 1 + factors[name] * unit[name] for name in factors if factors[name]}
            )
        return images


def draws_for(images: torch.Tensor, seed: int) -> torch.Generator:
    """Return a generator that is determined by a seed and the pictures of a batch.

    A batch is therefore augmented in the same way in every worker process and in a resumed run. The next epoch
    shuffles the samples into other batches and gets other draws.
    """
    content = zlib.crc32(np.ascontiguousarray(images.numpy()))
    return torch.Generator().manual_seed((seed + content) % 2**63)


def shift_images(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Move pictures (b, …, c, h, w) by `offsets` (b, 2): pixels down and to the right; edges are repeated."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height) - offsets[:, :1]).clamp(0, height - 1)  # (b, h): where a row comes from
    columns = (torch.arange(width) - offsets[:, 1:]).clamp(0, width - 1)  # (b, w)
    moved = [image[..., y[:, None], x] for image, y, x in zip(images, rows, columns, strict=True)]
    return torch.stack(moved)


def jitter_colors(
    images: torch.Tensor,
    brightness: torch.Tensor | None = None,
    contrast: torch.Tensor | None = None,
    saturation: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply brightness, contrast and saturation of RGB pictures (b, …, 3, h, w), in this order.

    Args:
        images: uint8, or float in [0, 1]; values outside the range are clipped.
        brightness, contrast, saturation: factors (b,); 1 changes nothing, 0 gives black, one grey, no colour.
    """

    def spread(factor: torch.Tensor) -> torch.Tensor:
        return factor.reshape(-1, *[1] * (images.ndim - 1)).to(torch.float32)  # (b, 1, …, 1)

    is_bytes = images.dtype == torch.uint8
    x = images.to(torch.float32) / 255 if is_bytes else images.to(torch.float32)
    if brightness is not None:
        x = (x * spread(brightness)).clamp(0, 1)
    if contrast is not None:
        mean = _grey(x).mean(dim=(-2, -1), keepdim=True)  # (b, …, 1, 1, 1)
        x = (mean + (x - mean) * spread(contrast)).clamp(0, 1)
    if saturation is not None:
        grey = _grey(x)  # (b, …, 1, h, w)
        x = (grey + (x - grey) * spread(saturation)).clamp(0, 1)
    return (x * 255).round().to(torch.uint8) if is_bytes else x.to(images.dtype)


def _grey(x: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(_LUMA).reshape(3, 1, 1)
    return (x * weights).sum(dim=-3, keepdim=True)
