"""Robots: what a processor knows of the robots it serves: statistics, parts of state and action, slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..configuration.features import ACTION, STATE, FeatureType, NormalizationMode, PolicyFeature
from ..configuration.normalization import Part, one_part, read_parts, short_name
from ..configuration.typed_values import to_field_type
from ..errors import CheckpointError, EmbodimentError, MissingStatisticsError
from .arrays import to_tensor
from .fragile import fragile_dimensions
from .normalization import Normalizer, whole_statistics
from .part import ProcessorPart, as_mapping


@dataclass(kw_only=True)
class Robots(ProcessorPart):
    """Normalise every feature by the statistics of one robot, the only one or the one that is chosen.

    Args:
        normalization_mapping (`dict[str, str]`): normalization mode per feature type.
        statistics (`dict[str, dict[str, list]]`): per feature what its mode needs (`mean` and `std`, …), of the
            only robot.
        normalization_eps (`float`, *optional*, defaults to 1e-8): ε of `Normalizer`.
        embodiments (`dict[str, dict]`, *optional*): robot → its statistics, of several; then `statistics` is None.
        embodiment (`str`, *optional*): the robot in use.
        embodiment_features (`dict[str, dict]`, *optional*): robot → feature → its `shape`, and of a vector the `names`
            and `units` of its dimensions, of several robots whose features differ. `input_features` and
            `output_features` then hold every vector at its widest, and the cameras of all.
        optional_cameras: cameras that may be absent: no dataset has statistics of one that no robot has.

    Raises:
        MissingStatisticsError: a feature is to be normalised and its statistics are absent or do not fit.
        EmbodimentError: `embodiment` is none of the embodiments.
    """

    normalization_mapping: dict[str, str] | None = None
    statistics: dict[str, dict[str, list]] | None = None
    normalization_eps: float = 1e-8
    embodiments: dict[str, dict] | None = None
    embodiment: str | None = None
    embodiment_features: dict[str, dict[str, dict[str, Any]]] | None = None
    optional_cameras: Sequence[str] = ()

    def __post_init__(self):
        self.embodiment_features = dict(as_mapping("embodiment_features", self.embodiment_features)) or None
        given = as_mapping("normalization_mapping", self.normalization_mapping)
        modes = to_field_type(given, dict[str, NormalizationMode])
        self.normalization_mapping = {
            to_field_type(kind, FeatureType).value: mode.value for kind, mode in modes.items()
        }
        several = as_mapping("embodiments", self.embodiments)
        self._robot = None  # whose features are meant; while none is chosen, the widest
        chosen, used = self.embodiment, {}
        for name, values in several.items():
            self._robot = name
            used[name] = self.used(values)
        self.embodiments, self._robot = used or None, None
        self._require_described()
        self.statistics = None if self.embodiments else self.used(as_mapping("statistics", self.statistics))
        self._normalizers: dict[str, Normalizer] | None = None
        if not self.embodiments:
            self._normalizers = self._build(self.statistics)
        elif chosen is not None or len(self.embodiments) == 1:
            self.choose(chosen or next(iter(self.embodiments)))

    @property
    def features(self) -> dict[str, PolicyFeature]:
        """Inputs and outputs, vectors as wide as those of the robot in use."""
        own = (self.embodiment_features or {}).get(self._robot, {})
        return {
            name: replace(feature, shape=own[name]["shape"]) if len(feature.shape) == 1 and name in own else feature
            for name, feature in (self.inputs | self.outputs).items()
        }

    def described(self, kind: str) -> dict[str, list[str] | None] | None:
        """Return feature → the `names` or `units` of its dimensions, of the robot in use; None where not recorded."""
        own = (self.embodiment_features or {}).get(self._robot)
        return own and {name: own[name].get(kind) for name in self.features if name in own}

    def _require_described(self) -> None:
        """Check that features are described of the robots that there are statistics of.

        Raises:
            EmbodimentError: one of the two is missing.
        """
        described = self.embodiment_features or {}
        for name in described:
            if name not in (self.embodiments or {}):
                raise EmbodimentError(name, self.embodiments or ())
        for name in self.embodiments or {}:
            if described and name not in described:
                raise EmbodimentError(name, described, "features")

    def used(self, statistics: Mapping[str, Mapping]) -> dict[str, dict[str, list]]:
        """Return the statistics of the policy's features as plain lists, which JSON keeps exactly."""
        for name, values in statistics.items():
            if not isinstance(values, Mapping):
                raise MissingStatisticsError(
                    f"The statistics of {name} are {values!r}; expected a mapping such as {{'mean': […], 'std': […]}}."
                )
        return {
            name: {which: to_tensor(name, value).tolist() for which, value in statistics[name].items()}
            for name in self.features
            if name in statistics
        }

    def choose(self, name: str) -> None:
        """Use the statistics of one of the robots.

        Raises:
            EmbodimentError: there are none of it.
        """
        if name not in (self.embodiments or {}):
            raise EmbodimentError(name, self.embodiments or ())
        before, self._robot = self._robot, name
        try:
            self._normalizers = self._build(self.embodiments[name])
        except Exception:
            self._robot = before
            raise
        self.embodiment = name

    def normalizer(self, name: str) -> Normalizer:
        """Return the normalizer of a feature.

        Raises:
            EmbodimentError: there are several robots and none is chosen.
            MissingStatisticsError: an optional camera has none, and its mode needs some.
        """
        if self._normalizers is None:
            raise EmbodimentError(None, self.embodiments)
        return self._normalizers[name] if name in self._normalizers else self._normalizer_of(name, None)

    def statistics_in_use(self, name: str) -> Mapping[str, list]:
        """Return the statistics of a feature for the robot in use, empty where there are none."""
        whole = self.embodiments.get(self.embodiment) if self.embodiments else self.statistics
        return (whole or {}).get(name, {})

    def mode(self, feature: PolicyFeature) -> NormalizationMode:
        """Return how features of this type are normalised; a type without a mode raises."""
        if feature.type.value not in self.normalization_mapping:
            raise CheckpointError(
                f"No normalization mode for {feature.type.value} features; the mapping has "
                f"{self.normalization_mapping}. Say 'IDENTITY' where values are to pass unchanged."
            )
        return NormalizationMode(self.normalization_mapping[feature.type.value])

    def parts(self, name: str) -> list[Part]:
        """Return the parts of a feature, in the order in which they stand in it: here, itself."""
        feature = self.features[name]
        return [Part(short_name(name), feature.shape[0], self.mode(feature).value)]

    def model_width(self, name: str) -> int:
        """Return how wide a vector is once it is normalised, 0 where the robot has none."""
        return sum(part.model_width for part in self.parts(name)) if name in self.features else 0

    def state_part_widths(self) -> dict[str, int]:
        """Return the names under which the state may come in parts, with their widths: here, none."""
        return {}

    def fragile_dimensions(self, dimension_names: Mapping[str, Any]) -> list[str]:
        """Return what `processing.fragile` says of the vectors of the robot in use."""
        statistics = self.embodiments.get(self.embodiment, {}) if self.embodiments else self.statistics
        sentences = []
        for name, feature in self.features.items():
            if len(feature.shape) == 1:
                known = (statistics.get(name), self.normalization_eps, dimension_names.get(name))
                sentences += fragile_dimensions(name, feature, self.parts(name), *known)
        return sentences

    def _build(self, statistics: Mapping[str, Mapping]) -> dict[str, Normalizer]:
        return {
            name: self._normalizer_of(name, statistics.get(name))
            for name in self.features
            if name in statistics or name not in (self.optional_cameras or ())
        }

    def _normalizer_of(self, name: str, statistics: Mapping | None) -> Normalizer:
        trailing = len(self.features[name].shape) - 1
        return Normalizer(name, self.parts(name), statistics, self.normalization_eps, trailing)


@dataclass(kw_only=True)
class RobotsInParts(Robots):
    """Normalise state and action part by part, of robots that have a slot each in the network.

    Args:
        state_parts (`dict[str, dict]`, *optional*): part → `{"width": …, "mode": …}`, in the order in which they stand
            in the state. By default one part, in the mode of its feature type.
        action_parts (`dict[str, dict]`, *optional*): the same of the action.
        embodiment_ids (`dict[str, int]`): robot → the slot that its projectors have in the network.
        kwargs: what `Robots` takes; `embodiment` is needed. Statistics may be those of parts, see `whole_statistics`.

    Raises:
        EmbodimentError: the robot has no slot.
        InvalidConfigError: parts or widths that cannot be.
    """

    state_parts: dict[str, dict[str, Any]] | None = None
    action_parts: dict[str, dict[str, Any]] | None = None
    embodiment_ids: dict[str, int] | None = None

    config_fields: ClassVar[tuple[str, ...]] = ("state_parts", "action_parts", "embodiment_ids")

    def __post_init__(self):
        self.embodiment_ids = dict(as_mapping("embodiment_ids", self.embodiment_ids))
        if self.embodiment is not None or not self.embodiments:  # of several, one may be chosen later
            self._require_slot(self.embodiment)
        super().__post_init__()

    def parts(self, name: str) -> list[Part]:
        """Return the parts of a feature, in the order in which they stand in it."""
        feature = self.features[name]
        if name not in (STATE, ACTION):
            return super().parts(name)
        given = self.state_parts if name == STATE else self.action_parts
        width = feature.shape[0]
        return read_parts(name, given, width) if given else [one_part(name, width, self.mode(feature))]

    def used(self, statistics: Mapping[str, Mapping]) -> dict[str, dict[str, list]]:
        """Return the statistics of the policy's features as plain lists, those of parts joined."""
        whole = {
            name: whole_statistics(name, self.parts(name), statistics)
            for name in (STATE, ACTION)
            if name in self.features
        }
        others = {name: values for name, values in statistics.items() if name not in whole}
        return super().used(others | {name: values for name, values in whole.items() if values})

    def choose(self, name: str) -> None:
        """Use the slot and the statistics of one of the robots.

        Raises:
            EmbodimentError: it has no slot, or there are no statistics of it.
        """
        self._require_slot(name)
        if self.embodiments:
            super().choose(name)
        elif name != self.embodiment:
            raise EmbodimentError(name, [self.embodiment])

    @property
    def slot(self) -> int:
        """The slot of the robot in use; raises `EmbodimentError` while none of several is chosen."""
        if self.embodiment is None:
            raise EmbodimentError(None, self.embodiments)
        return self.embodiment_ids[self.embodiment]

    def state_part_widths(self) -> dict[str, int]:
        """Return the names under which the state may come in parts, `state.<part>`, with their widths."""
        return {f"state.{part.name}": part.width for part in self.parts(STATE)}

    def _require_slot(self, name: str | None) -> None:
        if name not in self.embodiment_ids:
            raise EmbodimentError(name, self.embodiment_ids, "slots")
