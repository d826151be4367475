"""What is recorded: feature declarations and frames, checked, and the parquet types of their columns."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import numpy as np

from ...errors import DatasetFormatError, InvalidFrameError, nearest
from ..features import CAMERA_AXES, CAMERAS, INDEX_FEATURES, NUMBERS, camera_channels_last
from ..statistics.computing import channels_last


def recorded_features(features: Mapping[str, Mapping], use_videos: bool = True) -> dict[str, dict]:
    """Return the features as `meta/info.json` describes them: cameras as (h, w, c), index columns last.

    Args:
        features (`Mapping[str, Mapping]`): name → `{"dtype": …, "shape": […], "names": […], "units": […]}`;
            names and units may be left out.
        use_videos (`bool`, *optional*, defaults to True): without, cameras are PNG in the data files.

    Raises:
        DatasetFormatError: a name, dtype, shape, or number of names or units that cannot be recorded.
    """
    if not features:
        raise DatasetFormatError('features must name what is recorded, such as {"action": {"dtype": "float32", …}}.')
    return {name: _recorded_feature(name, dict(feature), use_videos) for name, feature in features.items()} | {
        name: dict(feature) for name, feature in INDEX_FEATURES.items()
    }


def _recorded_feature(name: str, feature: dict, use_videos: bool) -> dict:
    if name in INDEX_FEATURES or name == "task" or "/" in name:
        raise DatasetFormatError(
            f"A feature cannot be called {name!r}: the writer itself adds {', '.join(INDEX_FEATURES)} and "
            f"the task, and '/' separates folders. Choose another name."
        )
    dtype, shape = feature.get("dtype"), tuple(feature.get("shape") or ())
    if dtype not in NUMBERS + CAMERAS:
        raise DatasetFormatError(f"{name} has dtype {dtype!r}. {nearest(str(dtype), NUMBERS + CAMERAS)}")
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
        raise DatasetFormatError(f"{name} has shape {list(shape)}; expected sizes of at least 1, such as [7].")
    if dtype in CAMERAS:
        camera = camera_channels_last(feature)
        if len(shape) != 3 or camera["shape"][-1] != 3:
            raise DatasetFormatError(f"{name} has shape {list(shape)}; expected [height, width, 3].")
        stored = dtype if use_videos else "image"
        return camera | {"dtype": stored, "shape": list(camera["shape"]), "names": list(CAMERA_AXES)}
    for key in ("names", "units"):
        if feature.get(key) is not None and len(feature[key]) != shape[0]:
            raise DatasetFormatError(f"{name} has {len(feature[key])} {key} for {shape[0]} dimensions.")
    return feature | {"dtype": dtype, "shape": list(shape), "names": feature.get("names")}


def checked_frame(frame: Mapping, features: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """Return one frame as arrays of the recorded types and shapes, images as (h, w, 3).

    Raises:
        InvalidFrameError: a feature is missing, unknown, of another shape or type, or not finite.
    """
    recorded = {name: feature for name, feature in features.items() if name not in INDEX_FEATURES}
    for name in frame:
        if name not in recorded:
            raise InvalidFrameError(f"The frame has {name!r}, which is not recorded. {nearest(name, recorded)}")
    missing = [name for name in recorded if name not in frame]
    if missing:
        raise InvalidFrameError(f"The frame lacks {', '.join(missing)}. Given: {', '.join(frame) or 'nothing'}.")
    return {name: _checked_value(name, frame[name], feature) for name, feature in recorded.items()}


def _checked_value(name: str, value: object, feature: dict) -> np.ndarray:
    shape = tuple(feature["shape"])
    array = np.asarray(value)
    if feature["dtype"] in CAMERAS:
        # The recorded height and width decide the layout, not a guess from the channels.
        array = array if array.shape == shape else channels_last(array)
    elif array.shape == () and shape == (1,):
        array = array.reshape(1)
    if array.shape != shape:
        raise InvalidFrameError(f"{name} has shape {np.shape(value)}; it is recorded as {shape}.")
    if feature["dtype"] in CAMERAS:
        return channels_last(array)
    if not np.can_cast(array.dtype, feature["dtype"], casting="same_kind"):
        raise InvalidFrameError(f"{name} is {array.dtype}; it is recorded as {feature['dtype']}.")
    array = array.astype(feature["dtype"])
    if not np.all(np.isfinite(array)):
        wrong = np.argwhere(~np.isfinite(array)).tolist()
        raise InvalidFrameError(f"{name} is not finite at {wrong}: {array.tolist()}. Skip the frame or the episode.")
    return array


def parquet_features(features: Mapping[str, dict]) -> datasets.Features:
    """Return the columns of the data files, typed as 🤗 datasets expects them; videos have none."""
    columns = {}
    for name, feature in features.items():
        shape, dtype = tuple(feature["shape"]), feature["dtype"]
        if dtype == "video":
            continue
        if dtype == "image":
            columns[name] = datasets.Image()
        elif shape == (1,):
            columns[name] = datasets.Value(dtype)
        elif len(shape) == 1:
            columns[name] = datasets.List(datasets.Value(dtype), length=shape[0])
        elif len(shape) <= 5:
            kind = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D, 5: datasets.Array5D}[len(shape)]
            columns[name] = kind(shape=shape, dtype=dtype)
        else:
            raise DatasetFormatError(f"{name} has {len(shape)} dimensions; parquet files here hold at most 5.")
    return datasets.Features(columns)
