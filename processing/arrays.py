"""Arrays: read what people pass (numpy, torch, PIL, lists) as checked float32 tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..configuration.features import PolicyFeature
from ..errors import FeatureShapeError, FeatureValueError

# Modes of PIL in which numbers mean other colours than red, green, blue and opacity, or a place in a palette.
_OTHER_COLOURS = frozenset(("YCbCr", "HSV", "LAB", "CMYK", "P", "PA", "RGBX", "RGBa", "La"))
# What tensors can hold the numbers of an observation in; others, such as 8-bit floats, have hardly any arithmetic.
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_NUMBERS = frozenset((*_INTEGERS, *_FLOATS, torch.bool, torch.complex64, torch.complex128))
# The arrays of pictures that are read as they are.
_PIXEL_TYPES = frozenset(map(np.dtype, ("uint8", "float16", "float32", "float64")))

Array = torch.Tensor | np.ndarray


def to_tensor(name: str, value: Any) -> torch.Tensor:
    """Return `value` as a tensor on its own device, without copying where possible.

    Raises:
        FeatureValueError: it is not numeric.
    """
    if isinstance(value, torch.Tensor):
        return _require_numbers(name, value).detach()
    if (mode := getattr(value, "mode", None)) in _OTHER_COLOURS and hasattr(value, "getbands"):
        raise FeatureValueError(
            f"{name} is a PIL picture of mode {mode}, whose channels are not red, green and blue. "
            f'Pass picture.convert("RGB").'
        )
    try:
        if isinstance(value, (list, tuple)) and value and not np.isscalar(value[0]):
            return torch.stack([to_tensor(name, item) for item in value])
        array = np.asanyarray(value)
        if not isinstance(array, np.ma.MaskedArray) or not array.mask.any():
            return shared(np.asarray(array))
        error = "some of its values are masked"
    except FeatureValueError:
        raise
    except Exception as reason:  # whatever an object raises that is asked for its numbers, such as a truncated picture
        error = reason
    raise FeatureValueError(f"{name} is a {type(value).__name__} that cannot be read as numbers: {error}") from (
        error if isinstance(error, Exception) else None
    )


def shared(array: np.ndarray) -> torch.Tensor:
    """Return a tensor in the memory of an array; of one that is read-only or runs backwards, in memory of its own."""
    if array.ndim == 1 and array.flags.c_contiguous and array.flags.writeable:  # most of them, at every step
        return torch.from_numpy(array)
    if array.ndim > 1 and len(array) == 1:  # so that its order in memory is that of the only entry, copied or not
        return shared(array[0])[None]
    forwards = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    return torch.from_numpy(array if forwards and array.flags.writeable else array.copy(order="K"))


def read_vector(name: str, value: Any, width: int) -> torch.Tensor:
    """Return (…, width) float32; the width and that every number is finite are checked."""
    x = to_tensor(name, value)
    if x.is_complex():
        raise FeatureValueError(f"{name} holds complex numbers; a {width}-vector of real ones is expected.")
    if x.ndim == 0 or x.shape[-1] != width:
        raise FeatureShapeError(name, tuple(x.shape), f"a last dimension of {width}")
    x = x.to(torch.float32).contiguous()  # sums over another order in memory are others in their last bits
    require_finite(name, x)
    return x


def channels_first(name: str, x: Array, feature: PolicyFeature, any_size: bool = False) -> Array:
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
    given = tuple(x.shape[-3:])
    if x.ndim < 3 or not height * width or given not in ((channels, height, width), (height, width, channels)):
        expected = f"(…, {channels}, {height}, {width}) or (…, {height}, {width}, {channels})"
        expected = f"(…, {channels}, height, width) or (…, height, width, {channels})" if any_size else expected
        raise FeatureShapeError(name, tuple(x.shape), expected)
    if given == (channels, height, width):
        return x
    if isinstance(x, torch.Tensor):
        return x.movedim(-1, -3)
    return x.transpose(*range(x.ndim - 3), -1, -3, -2)  # as np.moveaxis, which takes five times as long


def read_image(name: str, value: Any, feature: PolicyFeature, any_size: bool = False) -> Array:
    """Return checked pictures (…, c, h, w) in the type in which they come, from HWC or CHW, without copying them.

    `pixels` converts them; most control steps only take a queued action, and need no more than this check.

    Args:
        any_size: of a policy that resizes its pictures.

    Returns:
        uint8, or float in [0, 1]; a numpy array stays one.

    Raises:
        FeatureShapeError: another size than the policy was trained with, or another number of channels.
        FeatureValueError: pixels outside [0, 1], NaN, or another integer type than uint8.
    """
    x = value if type(value) is np.ndarray and value.dtype in _PIXEL_TYPES else to_tensor(name, value)
    x = channels_first(name, x, feature, any_size)
    if isinstance(x, torch.Tensor) and not x.is_floating_point() and x.dtype != torch.uint8:
        raise FeatureValueError(f"{name} has type {x.dtype}; images are uint8 (0 to 255) or float (0 to 1).")
    if x.dtype in (torch.uint8, np.dtype("uint8")) or 0 in x.shape:  # 0: an empty batch
        return x
    low, high = (float(end) for end in (x.aminmax() if isinstance(x, torch.Tensor) else (x.min(), x.max())))
    if not math.isfinite(high - low):  # NaN is the lowest and highest of whatever holds it
        require_finite(name, pixels(x))
    if low < -1e-3 or high > 1 + 1e-3:
        raise FeatureValueError(
            f"{name} has float pixels from {low:.4g} to {high:.4g}; float images lie in [0, 1]. "
            f"Pass uint8, or divide by 255; normalization is the processor's work."
        )
    return x


def pixels(x: Array) -> torch.Tensor:
    """Return checked pictures as float32 in [0, 1]."""
    x = x if isinstance(x, torch.Tensor) else shared(x)
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.to(torch.float32)


def copied(x: Array) -> torch.Tensor:
    """Return a tensor in memory of its own."""
    return x.clone() if isinstance(x, torch.Tensor) else torch.from_numpy(x.copy(order="K"))


def stacked(arrays: Sequence[Array]) -> torch.Tensor:
    """Return arrays (b, …) of consecutive steps as one (b, t, …), on the last one's device."""
    tensors = [x if isinstance(x, torch.Tensor) else shared(x) for x in arrays]
    if len({x.dtype for x in tensors}) > 1:  # uint8, then float: 255 must not stand beside 1
        tensors = [pixels(x) for x in tensors]
    return torch.stack([x.to(tensors[-1].device) for x in tensors], dim=1)


def read_mask(name: str, value: Any) -> torch.Tensor:
    """Return a boolean tensor; other types than bool are refused, since 0/1 floats hide mistakes."""
    mask = to_tensor(name, value)
    if mask.dtype != torch.bool:
        raise FeatureValueError(f"{name} has type {mask.dtype}; expected bool, True where a step is padding.")
    return mask


def _require_numbers(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return a tensor that holds numbers in memory."""
    kinds = {"meta": x.is_meta, "nested": x.is_nested, "sparse": x.layout is not torch.strided}
    kind = next((kind for kind, it_is in kinds.items() if it_is), None)
    if kind or x.dtype not in _NUMBERS:
        raise FeatureValueError(
            f"{name} is a {kind or x.dtype} tensor that cannot be read as numbers; pass an ordinary one, such as "
            f"float32, on the CPU or an accelerator."
        )
    return x


def require_finite(name: str, x: torch.Tensor) -> None:
    """Check that every number of a feature is finite.

    Raises:
        FeatureValueError: some are NaN or infinite; it names the dimensions.
    """
    if math.isfinite(x.sum()):  # the sum of finite numbers may be infinite, that of others is never finite
        return
    finite = torch.isfinite(x)
    if not finite.all():
        bad = (~finite).reshape(-1, x.shape[-1]).any(dim=0).nonzero().flatten().tolist()
        where = f"dimensions {bad}" if x.shape[-1] <= 64 else f"{len(bad)} columns"
        raise FeatureValueError(f"{name} holds NaN or infinity in {where}; a policy never sees such values.")
