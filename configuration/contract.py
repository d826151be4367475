"""Contract: what goes into a policy and what comes out of it, as data for processors, cards and reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidConfigError
from .features import ACTION, STATE, FeatureType, PolicyFeature
from .normalization import MODES, PART_MODES, Part, one_part, read_parts

# How many training ranges a state may lie outside of its range. Millimetres for metres are a factor of 1000, and no
# robot leaves the space of its demonstrations a hundredfold; degrees for radians (57) are warned of.
OBSERVATION_LIMIT = 100.0


@dataclass(frozen=True)
class Dimension:
    """Describe one number of a state or an action; what was not recorded is None.

    Args:
        name, unit: such as `gripper` and `m`.
        low, high: its lowest and highest value in training, in the robot's units; of a relative action those of the
            differences.
        normalization: a row of `MODES`.
        relative_to: the dimension of the state whose difference the network predicts, such as
            `observation.state 0`; the robot gets the sum.
    """

    name: str | None = None
    unit: str | None = None
    low: float | None = None
    high: float | None = None
    normalization: str | None = None
    relative_to: str | None = None


@dataclass(frozen=True)
class ContractEntry:
    """Describe one feature.

    Args:
        name: in an observation, or `action`.
        kind: `STATE`, `VISUAL`, `ENV` or `ACTION`.
        shape: (width,) or (channels, height, width).
        parts: of a vector, in their order; one, or none where the normalization was not recorded.
        optional: whether an observation may lack it.
        dimensions: one per number of a vector; none of a camera.
        mode: how a camera is normalised.
    """

    name: str
    kind: FeatureType
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    optional: bool = False
    dimensions: tuple[Dimension, ...] = ()
    mode: str | None = None

    @property
    def direction(self) -> str:
        """`in` or `out`."""
        return "out" if self.kind is FeatureType.ACTION else "in"

    @property
    def is_camera(self) -> bool:
        """Whether it is a picture."""
        return self.kind is FeatureType.VISUAL

    @property
    def width(self) -> int:
        """The number of values in one observation or action."""
        return math.prod(self.shape)

    @property
    def is_relative(self) -> bool:
        """Whether the network predicts some of its values as differences to the state."""
        return any(dimension.relative_to for dimension in self.dimensions)

    @property
    def normalization(self) -> str | None:
        """The mode, or the mode of each part: `arm (2) min_max, grip (1) binary`."""
        if self.parts and self.parts[0].mode in PART_MODES:
            return ", ".join(f"{part.name} ({part.width}) {part.mode}" for part in self.parts)
        return self.parts[0].mode if self.parts else self.mode

    @property
    def normalization_words(self) -> str | None:
        """What the mode does, or that of each part."""
        if len(self.parts) > 1:
            return "; ".join(f"{part.name} {MODES[part.mode].words}" for part in self.parts)
        mode = self.parts[0].mode if self.parts else self.mode
        return MODES[mode].words if mode else None

    @property
    def absolute_range(self) -> list[tuple[float, float]] | None:
        """Lowest and highest value per dimension, infinite where it is relative; None where not recorded."""
        if any(dimension.low is None or dimension.high is None for dimension in self.dimensions):
            return None
        return [
            (-math.inf, math.inf) if dimension.relative_to else (dimension.low, dimension.high)
            for dimension in self.dimensions
        ]


@dataclass(frozen=True)
class Contract:
    """Hold what a policy expects and returns; `print(processor.contract())` shows it.

    Args:
        entries: inputs, then outputs.
        embodiment: which robot it is for, of policies that know several.
        reads_instruction: whether it reads a task in words.
        instruction_tokens: the longest instruction that it reads whole.
    """

    entries: Sequence[ContractEntry]
    embodiment: str | None = None
    reads_instruction: bool = False
    instruction_tokens: int | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Contract:
        """Build the contract from a processor's saved fields, the content of processor_config.json.

        Fields that are absent were not recorded.

        Raises:
            InvalidConfigError: names, units, ranges or parts do not fit the feature that they describe.
        """
        fields = of_robot(fields)
        inputs, outputs = (_mapping(fields, name) for name in ("input_features", "output_features"))
        return cls(
            [_entry(name, PolicyFeature.from_value(feature), fields) for name, feature in (inputs | outputs).items()],
            fields.get("embodiment"),
            "max_instruction_tokens" in fields,
            fields.get("max_instruction_tokens"),
        )

    @property
    def inputs(self) -> list[ContractEntry]:
        """What an observation holds."""
        return [entry for entry in self.entries if entry.direction == "in"]

    @property
    def outputs(self) -> list[ContractEntry]:
        """What the policy returns."""
        return [entry for entry in self.entries if entry.direction == "out"]

    def __str__(self) -> str:
        lines = [f"Embodiment: {self.embodiment}"] if self.embodiment else []
        for entry in self.entries:
            optional = ", optional" if entry.optional else ""
            arrow = "→" if entry.direction == "in" else "←"
            lines.append(
                f"{arrow} {entry.name}  {entry.shape}  {entry.normalization or 'normalization not recorded'}{optional}"
            )
            lines += [_line(index, dimension) for index, dimension in enumerate(entry.dimensions)]
        if self.instruction_tokens is not None:
            lines.append(f"→ task  the instruction in words, at most {self.instruction_tokens} tokens")
        return "\n".join(lines)


def of_robot(fields: Mapping[str, Any], robot: str | None = None) -> dict[str, Any]:
    """Return a processor's saved fields for one of the robots that it knows, with that robot's features.

    Args:
        fields: of all robots.
        robot: by default the one in use; without one, vectors are as wide as the widest robot's.
    """
    robot = fields.get("embodiment") if robot is None else robot
    described = _mapping(fields, "embodiment_features").get(robot)
    fields = dict(fields) | {"embodiment": robot}
    if described is None:
        return fields
    for kind in ("input_features", "output_features"):
        fields[kind] = {
            name: {**_plain_feature(feature), "shape": described[name]["shape"]} if name in described else feature
            for name, feature in _mapping(fields, kind).items()
            # A camera of other robots only is none of this one's.
            if name in described or PolicyFeature.from_value(feature).type is not FeatureType.VISUAL
        }
    for kind, key in (("dimension_names", "names"), ("units", "units")):
        fields[kind] = {name: entry.get(key) for name, entry in described.items()}
    return fields


def _plain_feature(feature: PolicyFeature | Mapping[str, Any]) -> dict[str, Any]:
    return feature.to_dict() if isinstance(feature, PolicyFeature) else dict(feature)


def vector_entry(
    name: str,
    feature: PolicyFeature,
    parts: Sequence[Part] = (),
    names: Sequence[str] | None = None,
    units: Sequence[str] | str | None = None,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    relative_to: Sequence[str | None] | None = None,
) -> ContractEntry:
    """Return the entry of a state or an action from one list per column; a `str` is the unit of all dimensions.

    Raises:
        InvalidConfigError: a list has another length than the feature is wide.
    """
    width = math.prod(feature.shape)
    if isinstance(units, str):
        units = [units] * width
    columns = {
        "names": _column(name, "names", names, width),
        "units": _column(name, "units", units, width),
        "lowest values": _column(name, "lowest values", low, width),
        "highest values": _column(name, "highest values", high, width),
        "modes": _column(name, "modes", [p.mode for p in parts for _ in range(p.width)] or None, width),
        "references": _column(name, "references", relative_to, width),
    }
    dimensions = tuple(Dimension(*values) for values in zip(*columns.values(), strict=True))
    return ContractEntry(name, feature.type, feature.shape, tuple(parts), dimensions=dimensions)


def _entry(name: str, feature: PolicyFeature, fields: Mapping[str, Any]) -> ContractEntry:
    optional = name in (fields.get("optional_cameras") or ())
    mode = _mapping(fields, "normalization_mapping").get(feature.type.value)
    if feature.type is FeatureType.VISUAL:
        return ContractEntry(name, feature.type, feature.shape, optional=optional, mode=mode)
    names, units, statistics = (
        _mapping(fields, field).get(name) for field in ("dimension_names", "units", "statistics")
    )
    if fields.get("embodiments"):
        statistics = (fields["embodiments"].get(fields.get("embodiment")) or {}).get(name)
    statistics = statistics or {}
    references = None
    if name == ACTION and fields.get("relative_to") is not None:
        state_names = _mapping(fields, "dimension_names").get(STATE)
        references = [
            index if index is None else f"{STATE} {state_names[index] if state_names else index}"
            for index in fields["relative_to"]
        ]
    return vector_entry(
        name,
        feature,
        _parts(name, feature.shape[0], mode, fields),
        names,
        units,
        statistics.get("min"),
        statistics.get("max"),
        references,
    )


def _parts(name: str, width: int, mode: str | None, fields: Mapping[str, Any]) -> list[Part]:
    """Return the parts of a vector: those that are named, or itself; a processor without the field knows no parts."""
    field = {STATE: "state_parts", ACTION: "action_parts"}.get(name)
    if fields.get(field):
        return read_parts(name, fields[field], width)
    if mode is None:
        return []
    return [one_part(name, width, mode) if field in fields else Part(name, width, mode)]


def _line(index: int, dimension: Dimension) -> str:
    text = f"    {index:>3}  {dimension.name or 'unnamed':<28} [{dimension.unit or 'unit not recorded'}]"
    if dimension.low is not None and dimension.high is not None:
        text += f"  {dimension.low:.4g} … {dimension.high:.4g}"
        text += " as a difference" if dimension.relative_to else ""
    return text + (f"  relative to {dimension.relative_to}" if dimension.relative_to else "")


def _mapping(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise InvalidConfigError(f"A processor's {name} is a mapping; got {value!r}.")
    return value or {}


def _column(name: str, kind: str, values: Iterable[Any] | None, width: int) -> list[Any]:
    if values is None:
        return [None] * width
    values = list(values)
    if len(values) != width:
        listed = ", ".join(map(str, values))
        raise InvalidConfigError(f"{name} has {width} dimensions but {len(values)} {kind}: {listed}.")
    return values
