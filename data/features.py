"""The features of a dataset, as declared in `meta/info.json`, in one form for all writers.

Notation: c channels, h height, w width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

NUMBERS = ("float32", "float64", "int32", "int64", "bool")  # what can be recorded
CAMERAS = ("video", "image")

# The columns every dataset has beside its own features, in LeRobot's order.
INDEX_FEATURES = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}

CAMERA_AXES = ["height", "width", "channels"]
_CHANNELS = ("channel", "channels", "c")

# What writers call a dtype: Arrow's and C's names beside NumPy's.
_SPELLINGS = {
    "float": "float32",
    "single": "float32",
    "double": "float64",
    "half": "float16",
    "halffloat": "float16",
    "int": "int64",
    "long": "int64",
    "boolean": "bool",
    "bool_": "bool",
    "str": "string",
    "text": "string",
    "utf8": "string",
    "large_string": "string",
}
_LIBRARIES = ("torch.", "numpy.", "np.", "jnp.", "tf.")
_DEEP_GREY = re.compile(r"gray(9|1\d|f)")  # ffmpeg's grey formats of more than 8 bits


def declared_features(features: Mapping[str, dict]) -> dict[str, dict]:
    """Return the features of an info.json in the one form that is used in this package, whoever wrote them.

    The dtype is NumPy's name, `video`, `image` or `string`. The shape is a list of sizes, [1] of a single number and
    (h, w, c) of a camera: LeRobot declares (h, w, c), openpi's converters (c, h, w), both with and without `names`.
    """
    return {name: _declared(feature) for name, feature in features.items()}


def _declared(feature: Mapping) -> dict:
    dtype = standard_dtype(feature["dtype"])
    shape = [int(size) for size in np.atleast_1d(feature["shape"])] or [1]
    declared = dict(feature) | {"dtype": dtype, "shape": shape}
    return camera_channels_last(declared) if dtype in CAMERAS else declared


def standard_dtype(dtype: str) -> str:
    """Return NumPy's name of a number type however it is spelled; any other name in small letters."""
    name = dtype.strip().lower()
    name = next((name.removeprefix(library) for library in _LIBRARIES if name.startswith(library)), name)
    if name in _SPELLINGS:
        return _SPELLINGS[name]
    try:
        return np.dtype(name).name if np.dtype(name).kind in "fiub" else name
    except (TypeError, ValueError, SyntaxError):
        return name


def pictures_in_colour(features: Mapping[str, dict]) -> dict[str, dict]:
    """Return the features as they are read: grey pictures and those with opacity in three colours too."""
    return {
        name: feature | {"shape": [*feature["shape"][:2], 3]}
        if feature["dtype"] in CAMERAS and len(feature["shape"]) == 3
        else feature
        for name, feature in features.items()
    }


def holds_depth(feature: Mapping) -> bool:
    """Tell whether a camera is declared to hold distances instead of colours, by any version of the format."""
    for details in (feature, feature.get("info"), feature.get("video_info")):
        if not isinstance(details, Mapping):
            continue
        if details.get("is_depth_map") or details.get("video.is_depth_map"):
            return True
        if has_deep_grey(details.get("video.pix_fmt")):
            return True
    return False


def has_deep_grey(pixel_format: object) -> bool:
    """Tell whether ffmpeg's pixel format holds grey levels of more than eight bits, as depth is stored."""
    return _DEEP_GREY.match(str(pixel_format)) is not None


def camera_channels_last(feature: Mapping) -> dict:
    """Return the declaration of one camera with its shape as (h, w, c); a grey one may lack c."""
    shape = list(feature["shape"])
    if len(shape) == 2:
        return dict(feature) | {"shape": [*shape, 1], "names": list(CAMERA_AXES)}
    if len(shape) != 3 or not _channels_come_first(shape, feature.get("names")):
        return dict(feature)
    return dict(feature) | {"shape": [*shape[1:], shape[0]], "names": list(CAMERA_AXES)}


def _channels_come_first(shape: list[int], names: object) -> bool:
    # The sizes decide where they can, since some datasets name their axes wrongly.
    first, last = shape[0] in (1, 3, 4), shape[-1] in (1, 3, 4)
    if first != last:
        return first
    return isinstance(names, list) and len(names) == 3 and str(names[0]).lower() in _CHANNELS
