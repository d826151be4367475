"""What a dataset's features are for a policy: its inputs and its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..configuration.features import ACTION, ENVIRONMENT_STATE, STATE, FeatureType, PolicyFeature
from ..errors import DatasetFormatError, UnknownDatasetFeatureError, nearest
from .features import CAMERAS

_VECTORS = {STATE: FeatureType.STATE, ENVIRONMENT_STATE: FeatureType.ENV}


class PolicyFeatures(NamedTuple):
    """Name what a policy observes and what it returns, each by the dataset's own name."""

    inputs: dict[str, PolicyFeature]
    outputs: dict[str, PolicyFeature]


def policy_features(features: Mapping[str, Mapping]) -> PolicyFeatures:
    """Return the input and output features that a policy of this dataset has.

    Cameras become (c, h, w). Columns that are neither an observation nor `action`, such as `next.reward`, are left
    out.

    Args:
        features (`Mapping[str, Mapping]`): name → `{"dtype": …, "shape": …}`, cameras as (h, w, c).

    Raises:
        UnknownDatasetFeatureError: an observation that no policy reads.
        DatasetFormatError: a camera whose shape is not (h, w, c).
    """
    inputs, outputs = {}, {}
    for name, feature in features.items():
        shape = tuple(feature["shape"])
        if feature["dtype"] in CAMERAS:
            if len(shape) != 3:
                raise DatasetFormatError(
                    f"The camera {name!r} has shape {list(shape)}; expected [height, width, channels]. Leave it out "
                    f"with features=[…], or correct meta/info.json."
                )
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
                f"LeRobotDataset(…, features=[…]), in a recipe inputs: […]."
            )
    return PolicyFeatures(inputs, outputs)
