"""What a dataset's features are for a policy: its inputs and its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..configuration.features import (
    ACTION,
    ENVIRONMENT_STATE,
    IMAGE_PREFIX,
    STATE,
    FeatureType,
    PolicyFeature,
)
from ..errors import UnknownDatasetFeatureError, nearest
from .features import CAMERAS, INDEX_FEATURES
from .naming import how_to_rename, suggested_names
from .selection import warn_once

_VECTORS = {STATE: FeatureType.STATE, ENVIRONMENT_STATE: FeatureType.ENV}


class PolicyFeatures(NamedTuple):
    """Name what a policy observes and what it returns, each by the dataset's own name."""

    inputs: dict[str, PolicyFeature]
    outputs: dict[str, PolicyFeature]


def policy_features(features: Mapping[str, Mapping]) -> PolicyFeatures:
    """Return the input and output features that a policy of this dataset has.

    Cameras become (c, h, w). Columns that are neither an observation nor `action` are left out; a warning names them,
    but for texts, index columns and `next.…`, which say what came of a step.

    Args:
        features (`Mapping[str, Mapping]`): name → `{"dtype": …, "shape": …}`, cameras as (h, w, c).

    Raises:
        UnknownDatasetFeatureError: an observation that no policy reads, or a camera or the actions under a name that
            no policy knows.
    """
    suggested = suggested_names(features)
    unread = [name for name, wanted in suggested.items() if wanted == ACTION or wanted.startswith(IMAGE_PREFIX)]
    if unread:
        raise UnknownDatasetFeatureError(
            f"No policy reads {', '.join(map(repr, unread))}: policies know {STATE!r}, {ENVIRONMENT_STATE!r}, "
            f"'{IMAGE_PREFIX}<camera>' and {ACTION!r}. Rename: {how_to_rename(suggested)}. Or leave one out "
            f"with features=[…] (train: --data.features)."
        )
    inputs, outputs, others = {}, {}, []
    for name, feature in features.items():
        shape = tuple(feature["shape"])
        if feature["dtype"] in CAMERAS:
            height, width, channels = shape
            inputs[name] = PolicyFeature(FeatureType.VISUAL, (channels, height, width))
        elif name in _VECTORS:
            inputs[name] = PolicyFeature(_VECTORS[name], shape)
        elif name == ACTION:
            outputs[name] = PolicyFeature(FeatureType.ACTION, shape)
        elif name.startswith("observation."):
            known = (*_VECTORS, "observation.images.<camera>")
            raise UnknownDatasetFeatureError(
                f"No policy reads the dataset's feature {name!r}. {nearest(name, known)} Leave it out: "
                f"LeRobotDataset(…, features=[…]), in a recipe inputs: […] (train: --data.features or --inputs)."
            )
        elif not (name in INDEX_FEATURES or name.startswith("next.") or feature["dtype"] == "string"):
            others.append(name)
    if others:
        remedy = {name: wanted for name, wanted in suggested.items() if name in others}
        warn_once(
            f"No policy reads {', '.join(map(repr, others))}, which is left out of the inputs."
            + (f" Rename: {how_to_rename(remedy)}." if remedy else "")
        )
    return PolicyFeatures(inputs, outputs)
