"""The features of a dataset, as declared in `meta/info.json`, in one form for all writers.

Notation: c channels, h height, w width.
"""

from __future__ import annotations

from collections.abc import Mapping

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


def cameras_channels_last(features: Mapping[str, dict]) -> dict[str, dict]:
    """Return the declared features with the shape of every camera as (h, w, c), the only order used in this package.

    Writers differ: LeRobot declares (h, w, c), openpi's converters (c, h, w), both with and without `names`.
    """
    return {
        name: camera_channels_last(feature) if feature["dtype"] in CAMERAS else feature
        for name, feature in features.items()
    }


def camera_channels_last(feature: Mapping) -> dict:
    """Return the declaration of one camera with its shape as (h, w, c)."""
    shape = list(feature["shape"])
    if len(shape) != 3 or not _channels_come_first(shape, feature.get("names")):
        return dict(feature)
    return dict(feature) | {"shape": [*shape[1:], shape[0]], "names": list(CAMERA_AXES)}


def _channels_come_first(shape: list[int], names: object) -> bool:
    # The sizes decide where they can, since some datasets name their axes wrongly.
    first, last = shape[0] in (1, 3), shape[-1] in (1, 3)
    if first != last:
        return first
    return isinstance(names, list) and len(names) == 3 and str(names[0]).lower() in _CHANNELS
