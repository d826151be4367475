"""Which features and episodes of a dataset are read, and what their dimensions are called."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from ..configuration.features import ACTION, ENVIRONMENT_STATE, STATE
from ..errors import DatasetFormatError, DatasetIndexError, UnknownDatasetFeatureError, nearest
from .features import CAMERAS, INDEX_FEATURES, holds_depth
from .naming import how_to_rename, suggested_names
from .remedies import LEAVE_OUT_FEATURE, ONLY_EPISODES

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 65_536  # read together by whoever passes through a whole dataset

_READABLE = {
    *("float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
}


def choose_features(every: Mapping[str, dict], names: Sequence[str] | None, root: Path) -> dict[str, dict]:
    """Return the descriptions of the features called `names`, and of the index columns every sample has.

    Without names, all that can be a tensor or text: language annotations and depth maps are left out, with a warning.

    Raises:
        UnknownDatasetFeatureError: a name that does not exist or cannot be read.
        DatasetFormatError: what a policy needs has a dtype that cannot be read, or a camera no size.
    """
    every = {**every, **INDEX_FEATURES}
    problems = {name: problem for name, feature in every.items() if (problem := _unreadable(feature))}
    if names is None:
        for name, problem in problems.items():
            if name in (ACTION, STATE, ENVIRONMENT_STATE):
                raise DatasetFormatError(
                    f"{name} of {root} {problem}. Correct meta/info.json. {LEAVE_OUT_FEATURE} to do without."
                )
            warn_once(f"{name} of {root} is not read: it {problem}.")
        chosen = {name: feature for name, feature in every.items() if name not in problems}
    else:
        names = [names] if isinstance(names, str) else list(names)
        suggested = {new: old for old, new in suggested_names(every).items()}
        for name in names:
            if name not in every and name in suggested:
                raise UnknownDatasetFeatureError(
                    f"features names {name!r}, which {root} calls {suggested[name]!r}. Rename: "
                    f"{how_to_rename({old: new for new, old in suggested.items()})}."
                )
            check_known(name, every, "features")
            if name in problems:
                raise UnknownDatasetFeatureError(f"{name} of {root} {problems[name]}. {LEAVE_OUT_FEATURE}.")
        chosen = {name: feature for name, feature in every.items() if name in {*names, *INDEX_FEATURES}}
    for name, feature in chosen.items():
        if feature["dtype"] in CAMERAS and len(feature["shape"]) != 3:
            raise DatasetFormatError(
                f"The camera {name!r} has shape {feature['shape']}; expected [height, width, channels]. "
                f"{LEAVE_OUT_FEATURE}, or correct meta/info.json."
            )
    return chosen


def choose_episodes(numbers: np.ndarray, episodes: Sequence[int] | None) -> np.ndarray:
    """Return where the chosen ones are among the episodes called `numbers`, in order and each once; all by default.

    Raises:
        DatasetIndexError: an episode that does not exist, or none at all.
    """
    if episodes is None:
        return np.arange(len(numbers))
    try:
        chosen = sorted({int(episode) for episode in episodes})
    except (TypeError, ValueError) as error:
        raise DatasetIndexError(f"episodes={episodes!r} must be a list of the episodes' numbers.") from error
    unknown = np.setdiff1d(chosen, numbers).tolist()
    if not chosen or unknown:
        gaps = len(numbers) != numbers[-1] - numbers[0] + 1
        known = f"{numbers[0]} … {numbers[-1]}" + (f", {len(numbers)} of them" if gaps else "")
        raise DatasetIndexError(
            f"episodes={list(episodes)!r:.200} must name at least one episode, and only episodes {known}"
            + (f"; there is no {unknown[0]}." if unknown else f": {ONLY_EPISODES}.")
        )
    return np.searchsorted(numbers, chosen)


def samples_per_episode(lengths: Sequence[int], drop_n_last_frames: int) -> np.ndarray:
    """Return how many samples start in every episode, one at each of its frames but the last ones.

    Raises:
        DatasetIndexError: a negative number of frames to drop, or none is left.
    """
    left = np.maximum(np.asarray(lengths) - drop_n_last_frames, 0)
    if drop_n_last_frames < 0 or not left.sum():
        raise DatasetIndexError(
            f"drop_n_last_frames={drop_n_last_frames} must be at least 0 and leave some frames; the longest episode "
            f"has {max(lengths)}."
        )
    return left


def row_blocks(starts: np.ndarray, lengths: np.ndarray, size: int = ROWS_AT_ONCE) -> Iterator[np.ndarray]:
    """Yield the rows of episodes in their order, at most `size` at a time.

    Args:
        starts, lengths (`np.ndarray`): (episodes,) first row and number of rows of each.
    """
    ends = np.cumsum(lengths)
    for first in range(0, int(ends[-1]), size):
        positions = np.arange(first, min(first + size, int(ends[-1])))
        episodes = np.searchsorted(ends, positions, side="right")
        yield positions - (ends - lengths)[episodes] + starts[episodes]


def check_known(name: str, known: Iterable[str], argument: str) -> None:
    """Raise `UnknownDatasetFeatureError`, with the nearest names, unless `name` is `known`."""
    if name not in known:
        raise UnknownDatasetFeatureError(
            f"{argument} names {name!r}, which is not among the features read. {nearest(name, known)}"
        )


def named_dimensions(features: Mapping[str, Mapping], key: str, root: Path) -> dict[str, list[str] | None]:
    """Return feature → the names, or units, of its dimensions; None where there are none, or not as many.

    Args:
        features (`Mapping[str, Mapping]`): as declared.
        key (`str`): `names` or `units`.
        root (`Path`): the dataset's folder, for the warning.
    """
    named = {}
    for name, feature in features.items():
        found, shape = feature.get(key), feature["shape"]
        found = [found] * math.prod(shape) if key == "units" and isinstance(found, str) else flat_names(found)
        if found and len(shape) == 1 and len(found) != shape[0]:
            warn_once(f"{name} of {root} has {len(found)} {key} for {shape[0]} dimensions; they are not used.")
            found = None
        named[name] = found
    return named


def flat_names(names: object) -> list[str] | None:
    """Return names as one list; some datasets group them, as `{"motors": […]}` or in nested lists."""
    if names is None or isinstance(names, bool):
        return None
    if isinstance(names, Mapping):
        if all(isinstance(group, int) for group in names.values()):
            return sorted(names, key=names.get) or None
        names = list(names.values())
    if not isinstance(names, list | tuple):
        return [str(names)] if names != "" else None
    return [name for group in names for name in (flat_names(group) or [])] or None


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time only: a dataset is opened several times in a run."""
    logger.warning(message)


def _unreadable(feature: Mapping) -> str | None:
    """Return why a feature has no tensor form, None if it has one."""
    if holds_depth(feature):
        return "holds depth, not colours"
    if feature["dtype"] not in {*_READABLE, *CAMERAS, "string"}:
        return f"has dtype {feature['dtype']!r}, which has no tensor form"
    return None


def runs(numbers: Sequence[int]) -> str:
    """Return ascending numbers with consecutive ones joined: [0, 1, 2, 7] → 0-2, 7."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    parts = np.split(np.asarray(numbers), breaks)
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
