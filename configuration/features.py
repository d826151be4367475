"""Features: what an observation or an action is made of, and how it is normalised."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ..errors import InvalidConfigError, nearest
from .normalization import NormalizationMode as NormalizationMode

STATE = "observation.state"
ENVIRONMENT_STATE = "observation.environment_state"
IMAGE_PREFIX = "observation.images."
ONLY_IMAGE = "observation.image"  # what LeRobot's oldest datasets call their only camera
ACTION = "action"


def is_camera_name(name: str) -> bool:
    """Tell whether a feature may be a camera by its name."""
    return name.startswith(IMAGE_PREFIX) or name == ONLY_IMAGE


class FeatureType(str, Enum):
    """The kind of a feature; decides how it is normalised and where it enters the network."""

    STATE = "STATE"
    VISUAL = "VISUAL"
    ENV = "ENV"
    ACTION = "ACTION"


@dataclass(frozen=True)
class PolicyFeature:
    """Describe one feature: its kind and its shape without batch, history or horizon.

    Args:
        type (`FeatureType` or `str`): kind of the feature.
        shape (`tuple[int, ...]`): (width,) for vectors, (channels, height, width) for images.
    """

    type: FeatureType
    shape: tuple[int, ...]

    def __post_init__(self):
        kind = self.type.value if isinstance(self.type, FeatureType) else str(self.type).upper()
        if kind not in FeatureType.__members__:
            raise InvalidConfigError(
                f"Feature type {self.type!r} does not exist. {nearest(kind, FeatureType.__members__)}"
            )
        object.__setattr__(self, "type", FeatureType(kind))
        try:
            # A string or a set can be iterated too, but says no sizes in their order.
            shape = tuple(operator.index(size) for size in self.shape[:])
        except TypeError as error:
            raise InvalidConfigError(f"Feature shape {self.shape!r} is not a sequence of integers.") from error
        if not shape or any(size < 1 for size in shape):
            raise InvalidConfigError(f"Feature shape {shape} must hold at least one size, each at least 1.")
        if self.type is FeatureType.VISUAL and len(shape) != 3:
            raise InvalidConfigError(f"A camera's shape is (channels, height, width); got {shape}.")
        object.__setattr__(self, "shape", shape)

    @classmethod
    def from_value(cls, value: PolicyFeature | Mapping) -> PolicyFeature:
        """Return `value` itself, or the feature that a `{"type": …, "shape": …}` mapping describes."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and set(value) == {"type", "shape"}:
            return cls(type=value["type"], shape=value["shape"])
        raise InvalidConfigError(
            f"{value!r} is not a feature; write PolicyFeature(type=FeatureType.STATE, shape=(7,)) "
            f'or {{"type": "STATE", "shape": [7]}}.'
        )

    def to_dict(self) -> dict:
        """Return plain JSON values."""
        return {"type": self.type.value, "shape": list(self.shape)}
