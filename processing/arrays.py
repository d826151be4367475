"""Arrays: read what people pass (numpy, torch, PIL, lists) as checked float32 tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..configuration.features import PolicyFeature
from ..errors import FeatureShapeError, FeatureValueError

# Modes of PIL in which numbers mean other colours than red, green, blue and opacity, or a place in a palette.
_OTHER_COLOURS = frozenset(("YCbCr", "HSV", "LAB", "CMYK", "P", "PA", "RGBX", "RGBa", "La"))


def to_tensor(name: str, value: Any) -> torch.Tensor:
    """Return `value` as a tensor on its own device, without copying where possible.

    Raises:
        FeatureValueError: it is not numeric.
    """
    if isinstance(value, torch.Tensor):
        return value.detach()
    if (mode := getattr(value, "mode", None)) in _OTHER_COLOURS and hasattr(value, "getbands"):
        raise FeatureValueError(
            f"{name} is a PIL picture of mode {mode}, whose channels are not red, green and blue. "
            f'Pass picture.convert("RGB").'
        )
    try:
        if isinstance(value, (list, tuple)) and value and not np.isscalar(value[0]):
            return torch.stack([to_tensor(name, item) for item in value])
        array = np.ascontiguousarray(value)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError, RuntimeError, OSError) as error:  # OSError: a truncated picture
        raise FeatureValueError(
            f"{name} is a {type(value).__name__} that cannot be read as numbers: {error}"
        ) from error


def read_vector(name: str, value: Any, width: int) -> torch.Tensor:
    """Return (…, width) float32; the width and that every number is finite are checked."""
    x = to_tensor(name, value)
    if x.is_complex():
        raise FeatureValueError(f"{name} holds complex numbers; a {width}-vector of real ones is expected.")
    x = x.to(torch.float32)
    if x.ndim == 0 or x.shape[-1] != width:
        raise FeatureShapeError(name, tuple(x.shape), f"a last dimension of {width}")
    require_finite(name, x)
    return x


def channels_first(name: str, x: torch.Tensor, feature: PolicyFeature, any_size: bool = False) -> torch.Tensor:
    """Return pictures (…, c, h, w), from HWC or CHW, as a view.

    Args:
        any_size: of a policy that resizes its pictures.

    Raises:
        FeatureShapeError: another size than the policy was trained with, or another number of channels.
    """
    channels, height, width = feature.shape
    if any_size and x.ndim >= 3 and channels in (x.shape[-3], x.shape[-1]):
        is_first = x.shape[-3] == channels and (x.shape[-1] != channels or tuple(x.shape[-3:]) == feature.shape)
        height, width = x.shape[-2:] if is_first else x.shape[-3:-1]
    if x.ndim < 3 or tuple(x.shape[-3:]) not in ((channels, height, width), (height, width, channels)):
        expected = f"(…, {channels}, {height}, {width}) or (…, {height}, {width}, {channels})"
        expected = f"{expected}; of any height and width" if any_size else expected
        raise FeatureShapeError(name, tuple(x.shape), expected)
    return x if tuple(x.shape[-3:]) == (channels, height, width) else x.movedim(-1, -3)


def read_image(name: str, value: Any, feature: PolicyFeature, any_size: bool = False) -> torch.Tensor:
    """Return (…, c, h, w) float32 in [0, 1], from HWC or CHW, uint8 or float in [0, 1].

    Args:
        any_size: of a policy that resizes its pictures.

    Raises:
        FeatureShapeError: another size than the policy was trained with, or another number of channels.
        FeatureValueError: pixels outside [0, 1], NaN, or another integer type than uint8.
    """
    x = channels_first(name, to_tensor(name, value), feature, any_size)
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(255)
    if not x.is_floating_point():
        raise FeatureValueError(f"{name} has type {x.dtype}; images are uint8 (0 to 255) or float (0 to 1).")
    x = x.to(torch.float32)
    require_finite(name, x)
    if x.numel() == 0:  # an empty batch
        return x
    low, high = x.aminmax()
    if low < -1e-3 or high > 1 + 1e-3:
        raise FeatureValueError(
            f"{name} has float pixels from {low:.4g} to {high:.4g}; float images lie in [0, 1]. "
            f"Pass uint8, or divide by 255; normalization is the processor's work."
        )
    return x


def read_mask(name: str, value: Any) -> torch.Tensor:
    """Return a boolean tensor; other types than bool are refused, since 0/1 floats hide mistakes."""
    mask = to_tensor(name, value)
    if mask.dtype != torch.bool:
        raise FeatureValueError(f"{name} has type {mask.dtype}; expected bool, True where a step is padding.")
    return mask


def require_finite(name: str, x: torch.Tensor) -> None:
    """Check that every number of a feature is finite.

    Raises:
        FeatureValueError: some are NaN or infinite; it names the dimensions.
    """
    finite = torch.isfinite(x)
    if not finite.all():
        bad = (~finite).reshape(-1, x.shape[-1]).any(dim=0).nonzero().flatten().tolist()
        where = f"dimensions {bad}" if x.shape[-1] <= 64 else f"{len(bad)} columns"
        raise FeatureValueError(f"{name} holds NaN or infinity in {where}; a policy never sees such values.")
