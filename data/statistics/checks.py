"""Check a dataset's statistics before a policy is normalised by them.

Notation: c channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...errors import DatasetFormatError
from ..checks import is_for_policies, not_finite
from ..features import CAMERAS
from ..layouts.json_files import recompute
from ..layouts.metadata import DatasetMetadata, Statistics
from ..table.frame_table import FrameTable

# How far statistics may contradict each other, relative to the range and to the largest value: writers compute them in
# float32 and estimate quantiles.
_OF_RANGE, _OF_VALUE = 0.1, 1e-3
_FAR = 100.0  # how many times another range than that of the data cannot be a matter of some episodes more or less


def checked_statistics(metadata: DatasetMetadata, table: FrameTable, features: Mapping[str, Mapping]) -> Statistics:
    """Return the statistics of `features`, those of cameras as (3, 1, 1).

    Only the features that a policy may read are checked. A feature without any is left out.

    Raises:
        DatasetFormatError: there are none at all, some are not finite, of another width than their feature, or cannot
            be of the same numbers; the message names the feature, and the episode if the data themselves are wrong.
    """
    checked = {}
    for name, values in metadata.load_statistics().items():
        if name not in features:
            continue
        if not is_for_policies(name) and features[name]["dtype"] not in CAMERAS:
            checked[name] = values
            continue
        if not values:
            raise _impossible(metadata, name, "some episodes have none")
        infinite = [key for key, value in values.items() if not np.all(np.isfinite(value))]
        rows = table.not_finite(name, tuple(features[name]["shape"])) if infinite and name in table else ()
        if len(rows):
            raise not_finite(metadata, name, rows)
        values = _of_shape(metadata, name, features[name], values)
        problem = f"{', '.join(infinite)} is not finite" if infinite else _contradiction(features[name], values)
        if (
            not problem
            and name in table
            and {"min", "max"} <= values.keys()
            and features[name]["dtype"] not in CAMERAS
        ):
            problem = _other_range(table, name, values["min"], values["max"])
        if problem:
            raise _impossible(metadata, name, problem)
        checked[name] = values
    return checked


def _of_shape(metadata: DatasetMetadata, name: str, feature: Mapping, values: dict) -> dict[str, np.ndarray]:
    """Return the statistics of one feature in its shape; a camera's in three channels, as its pictures are read."""
    of_camera = feature["dtype"] in CAMERAS
    width = int(np.prod(feature["shape"]))
    shaped = {}
    for key, value in values.items():
        if key == "count":
            shaped[key] = value
        elif of_camera and value.size in (1, 3, 4):  # grey, colours, colours and opacity
            shaped[key] = np.broadcast_to(value.reshape(-1, 1, 1)[:3], (3, 1, 1)).copy()
        elif not of_camera and value.size == width:
            shaped[key] = value.reshape(feature["shape"])
        else:
            expected = "one value per channel" if of_camera else f"{width} values"
            raise _impossible(metadata, name, f"{key} has {value.size} values (shape {value.shape}), not {expected}")
    return shaped


def _contradiction(feature: Mapping, values: Mapping[str, np.ndarray]) -> str | None:
    """Return why these cannot be statistics of the same numbers; None if they can."""
    exact = {key: value.astype(np.float64).reshape(-1) for key, value in values.items() if key != "count"}
    if not {"min", "max"} <= exact.keys():
        return None
    low, high = exact["min"], exact["max"]
    room = _OF_RANGE * np.abs(high - low) + _OF_VALUE * np.maximum(np.abs(low), np.abs(high))

    def first(wrong: np.ndarray, *keys: str) -> str | None:
        if not wrong.any():
            return None
        i = int(wrong.argmax())
        named = ", ".join(f"{key} {exact[key][i]:.6g}" for key in dict.fromkeys((*keys, "min", "max")))
        return f"dimension {i} has {named}"

    problem = first(low > high, "min")
    for key in exact.keys() - {"min", "max", "std"}:
        problem = problem or first((exact[key] < low - room) | (exact[key] > high + room), key)
    if "std" in exact:
        count = float(np.max(values.get("count", np.zeros(1)), initial=0))
        largest = (high - low) / 2 * np.sqrt(count / (count - 1) if count > 1 else 2)  # some divide by n - 1
        problem = problem or first((exact["std"] < 0) | (exact["std"] > largest + room), "std")
    for lower, upper in (("q01", "q99"), ("q10", "q90")):
        if {lower, upper} <= exact.keys():
            problem = problem or first(exact[lower] > exact[upper], lower, upper)
    if feature["dtype"] in CAMERAS and problem is None:
        problem = first((low < -_OF_VALUE) | (high > 1 + _OF_VALUE), "min")
        problem = problem and f"{problem}; those of a camera lie in [0, 1]"
    return problem


def _other_range(table: FrameTable, name: str, low: np.ndarray, high: np.ndarray) -> str | None:
    """Return where the data have another range by far than the one recorded; None if they have not."""
    least, largest = (end.reshape(-1) for end in table.extremes(name, low.shape))
    low, high = (end.astype(np.float64).reshape(-1) for end in (low, high))
    size, room = high - low, _FAR * (high - low)
    beyond = (size > 0) & ((least < low - room) | (largest > high + room))
    # Of a part of a dataset the range may be any part of the whole's.
    shrunk = (size > _FAR * (largest - least)) & (largest > least) if table.is_whole else np.zeros_like(beyond)
    wrong = beyond | shrunk
    if not wrong.any():
        return None
    i = int(wrong.argmax())
    return (
        f"dimension {i} has min {low[i]:.6g}, max {high[i]:.6g}, and the data lie between {least[i]:.6g} and "
        f"{largest[i]:.6g}"
    )


def _impossible(metadata: DatasetMetadata, name: str, problem: str) -> DatasetFormatError:
    return DatasetFormatError(
        f"The statistics of {name} in {metadata.root} cannot be those of its data: {problem}. "
        f"{recompute(metadata.root)}"
    )
