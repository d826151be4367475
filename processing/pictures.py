"""Pictures: how a policy's cameras are resized, cropped and scaled, and what stands in for an absent one.

Shapes: b batch, t observation history, v cameras, c channels, h height, w width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ..configuration.features import FeatureType
from ..configuration.policy import stack_views
from ..errors import InvalidConfigError
from .arrays import pixels
from .observation import Observation
from .part import ProcessorPart
from .robots import Robots


@dataclass(kw_only=True)
class Pictures(ProcessorPart):
    """Normalise pictures, and leave their size as it is.

    Args:
        robots: whose statistics normalise them.
    """

    robots: Robots

    resizes: ClassVar[bool] = False  # whether pictures of any size become those that the network sees

    @property
    def cameras(self) -> list[str]:
        """The cameras, in the order in which the network sees them."""
        return [name for name, feature in self.inputs.items() if feature.type is FeatureType.VISUAL]

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return a camera's pictures (…, c, h, w) in [0, 1] as the network sees them."""
        return self.prepare(self.robots.normalizer(name).normalize(x))

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Return normalised pictures in the network's size and scale."""
        return x

    def absent(self, name: str) -> torch.Tensor:
        """Return what stands in for an absent camera's picture (c, h, w); the network does not attend to it."""
        return torch.zeros(self.inputs[name].shape)

    def encode_views(self, observation: Observation, with_mask: bool) -> dict[str, Any]:
        """Return `pixel_values` (b, v, c, h, w), with history (b, t, v, c, h, w), and the mask where it is wanted.

        Args:
            observation: cameras may be absent from it, or from some of its batch.
            with_mask: whether `pixel_mask` (b, v) says which cameras are there.
        """
        inputs: dict[str, Any] = {}
        cameras, leading = self.cameras, observation.leading
        if cameras:
            views = []
            for name in cameras:
                view = self.encode(name, pixels(observation[name])) if name in observation else None
                if view is None or name in observation.present:
                    absent = self.absent(name)
                    absent = absent.expand(*leading, *absent.shape)
                    here = observation.has(name).reshape(-1, *[1] * (absent.ndim - 1))  # (b, 1, …)
                    view = absent if view is None else torch.where(here, view, absent)
                views.append(view)
            inputs["pixel_values"] = stack_views(views)
        if with_mask:
            inputs["pixel_mask"] = torch.stack([observation.has(name) for name in cameras], dim=1)  # (b, v)
        return inputs


@dataclass(kw_only=True)
class PaddedPictures(Pictures):
    """Resize pictures with their aspect kept and black beside them, and bring them from [0, 1] to [-1, 1].

    Args:
        image_resolution (`tuple[int, int]`, *optional*, defaults to (224, 224)): height and width of the pictures that
            the network sees.
        image_padding (`str`, *optional*, defaults to `"centered"`): or `"top_left"`, black above and to the left only.
    """

    image_resolution: tuple[int, int] | list[int] = (224, 224)
    image_padding: str = "centered"

    config_fields: ClassVar[tuple[str, ...]] = ("image_resolution", "image_padding")
    resizes: ClassVar[bool] = True

    def __post_init__(self):
        self.image_resolution = list(self.image_resolution)

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Return pictures (…, 3, height, width) in [-1, 1]."""
        return resize_with_padding(x, *self.image_resolution, centered=self.image_padding == "centered") * 2 - 1

    def absent(self, name: str) -> torch.Tensor:
        """Return a black picture (3, height, width): -1 everywhere."""
        return torch.full((3, *self.image_resolution), -1.0)


@dataclass(kw_only=True)
class CroppedPictures(Pictures):
    """Crop pictures to their centre, resize them to a square without their aspect, and bring them to [-1, 1].

    Args:
        image_size (`int`, *optional*, defaults to 224): height and width of the pictures that the network sees.
        image_crop_scale (`float`, *optional*, defaults to 0.95): the share of height and of width that is kept.

    Raises:
        InvalidConfigError: an impossible size.
    """

    image_size: int = 224
    image_crop_scale: float = 0.95

    resizes: ClassVar[bool] = True

    config_fields: ClassVar[tuple[str, ...]] = ("image_size", "image_crop_scale")

    def __post_init__(self):
        if self.image_size < 1:
            raise InvalidConfigError(f"image_size={self.image_size} must be at least 1.")

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Return pictures (…, 3, size, size) in [-1, 1]."""
        return from_bytes(crop_and_resize(x, self.image_crop_scale, self.image_size))

    def absent(self, name: str) -> torch.Tensor:
        """Return a black picture (3, size, size): -1 everywhere."""
        return torch.full((3, self.image_size, self.image_size), -1.0)


def resize_with_padding(images: torch.Tensor, height: int, width: int, centered: bool = True) -> torch.Tensor:
    """Return pictures (b, c, h, w) in [0, 1] at another size, their aspect kept and the rest black.

    The black is on both sides, or, not `centered`, above and to the left.

    Bilinear and without smoothing, as openpi's PyTorch port and LeRobot do, so that trained weights see what they
    were trained on. Source: openpi's `resize_with_pad`.
    """
    h, w = images.shape[-2:]
    if (h, w) == (height, width):
        return images
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))  # of a picture that is a line, a line
    resized = F.interpolate(images, size=(new_h, new_w), mode="bilinear", align_corners=False).clamp(0, 1)
    top, left = height - new_h, width - new_w
    if centered:
        top, left = top // 2, left // 2
    return F.pad(resized, (left, width - new_w - left, top, height - new_h - top))


def crop_and_resize(pictures: torch.Tensor, crop_scale: float, size: int) -> torch.Tensor:
    """Return pictures (b, 3, h, w) in [0, 1] as uint8 (b, 3, size, size): their centre, resized without its aspect.

    Bilinear with smoothing; what lies between two levels is cut off, not rounded, as it was in training. Source:
    NVIDIA's Isaac-GR00T, `VideoCrop` and `VideoResize`.
    """
    h, w = pictures.shape[-2:]
    height, width = max(1, int(h * crop_scale)), max(1, int(w * crop_scale))
    top, left = round((h - height) / 2), round((w - width) / 2)
    x = pictures[..., top : top + height, left : left + width]
    if (height, width) != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return (x * 255).to(torch.uint8)


def from_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures as float32 in [-1, 1]."""
    return (pictures.to(torch.float32) / 255 - 0.5) / 0.5
