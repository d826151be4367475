"""Which features and episodes of a dataset are read, and what their dimensions are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from transformers.utils import logging

from ..errors import DatasetIndexError, UnknownDatasetFeatureError, nearest
from .features import CAMERAS, INDEX_FEATURES

logger = logging.get_logger(__name__)

_READABLE = {"float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64", "uint8"}


def choose_features(every: Mapping[str, dict], names: Sequence[str] | None) -> dict[str, dict]:
    """Return the descriptions of the features called `names`, and of the index columns every sample has.

    Without names, all that can be a tensor or text: language annotations and depth maps are left out.

    Raises:
        UnknownDatasetFeatureError: a name that does not exist or cannot be read.
    """
    every = {**every, **INDEX_FEATURES}
    readable = {name: feature for name, feature in every.items() if _is_readable(feature)}
    if names is None:
        return readable
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        check_known(name, every, "features")
        if name not in readable:
            raise UnknownDatasetFeatureError(
                f"{name!r} has dtype {every[name]['dtype']!r}, or holds depth, which cannot be read as a "
                f"tensor. Leave it out of features=[…]."
            )
    return {name: feature for name, feature in readable.items() if name in {*names, *INDEX_FEATURES}}


def choose_episodes(count: int, episodes: Sequence[int] | None) -> np.ndarray:
    """Return the chosen ones of `count` episodes, in order and each once; all of them without a choice.

    Raises:
        DatasetIndexError: an episode that does not exist, or none at all.
    """
    if episodes is None:
        return np.arange(count)
    chosen = np.unique(np.asarray(list(episodes), dtype=np.int64))
    if not chosen.size or chosen[0] < 0 or chosen[-1] >= count:
        raise DatasetIndexError(
            f"episodes={list(episodes)} must name at least one episode, and only episodes 0 … {count - 1}."
        )
    return chosen


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


def check_known(name: str, known: Iterable[str], argument: str) -> None:
    """Raise `UnknownDatasetFeatureError`, with the nearest names, unless `name` is `known`."""
    if name not in known:
        raise UnknownDatasetFeatureError(
            f"{argument} names {name!r}, which is not among the features read. {nearest(name, known)}"
        )


def dimension_labels(name: str, feature: Mapping, kind: str) -> list[str] | None:
    """Return the `names` or `units` of a feature's dimensions; None where there is not one for each, which is said.

    Converters write `["state"]` for a state of any width: then its dimensions have no names.
    """
    width = math.prod(feature["shape"])
    if kind == "units" and isinstance(feature.get(kind), str):
        return [feature[kind]] * width
    labels = flat_names(feature.get(kind))
    if labels is None or feature["dtype"] in CAMERAS or len(labels) == width:
        return labels
    logger.warning_once(
        f"{name} is {width} wide and meta/info.json has {len(labels)} {kind} for it: {', '.join(map(str, labels))}. "
        f"They are left out; its dimensions go by their number."
    )
    return None


def flat_names(names: object) -> list[str] | None:
    """Return names as one list; some datasets group them, as `{"motors": […]}` or in nested lists."""
    if not names:
        return None
    if isinstance(names, str):
        return [names]
    groups = list(names.values()) if isinstance(names, Mapping) else list(names)
    if isinstance(names, Mapping) and all(isinstance(group, int) for group in groups):
        return sorted(names, key=names.get)
    return [name for group in groups for name in (flat_names(group) or [])]


def _is_readable(feature: dict) -> bool:
    details = feature.get("info") or {}
    depth = details.get("is_depth_map") or details.get("video.is_depth_map")
    return feature["dtype"] in {*_READABLE, *CAMERAS, "string"} and not depth
