"""Normalization: the one table of modes, and the parts of a state or an action (arm, gripper, …) that take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from ..errors import InvalidConfigError, nearest


@dataclass(frozen=True)
class Mode:
    """Describe one way to turn raw values into network values.

    Args:
        form: the arithmetic, see `processing.normalization`. `spread`: (x − first) / second. `ends`: from
            [first, second] to [-1, 1]. `magnitude`: x / max(|first|, |second|). `threshold`: 1 above 0.5, else 0.
            `sin_cos`: sines, then cosines, which has no inverse. `identity`: x.
        words: what it does, for cards.
        statistics: those it needs, as `(first, second)`.
        clip: whether network values are cut off at ±1.
        constant: what becomes of a dimension that did not move in training. `shift`, LeRobot's rule: it is shifted
            by its recorded value and not divided; ε is added to the spread of the others. `zero` and `keep`,
            NVIDIA's rules: it becomes 0, or stays as it is. Unnormalised, it takes its recorded value.
        of_part: the mode by NVIDIA's rules that replaces this one where a policy normalises by parts.
    """

    form: Literal["identity", "spread", "ends", "magnitude", "threshold", "sin_cos"]
    words: str
    statistics: tuple[str, ...] = ()
    clip: bool = False
    constant: Literal["shift", "zero", "keep"] = "shift"
    of_part: str | None = None


# Capitals: the modes of whole features, by LeRobot's rules. Small letters: the modes of parts, by NVIDIA's.
MODES: dict[str, Mode] = {
    "IDENTITY": Mode("identity", "none", of_part="identity"),
    "MEAN_STD": Mode("spread", "to mean 0, standard deviation 1", ("mean", "std"), of_part="mean_std"),
    "MIN_MAX": Mode("ends", "training range to [-1, 1]", ("min", "max"), of_part="min_max"),
    "QUANTILES": Mode("ends", "1st–99th percentile to [-1, 1]", ("q01", "q99"), of_part="q99"),
    "QUANTILE10": Mode("ends", "10th–90th percentile to [-1, 1]", ("q10", "q90")),
    "identity": Mode("identity", "none"),
    "mean_std": Mode("spread", "to mean 0, standard deviation 1", ("mean", "std"), constant="keep"),
    "min_max": Mode("ends", "training range to [-1, 1]", ("min", "max"), constant="zero"),
    "q99": Mode("ends", "1st–99th percentile to [-1, 1], cut off", ("q01", "q99"), clip=True, constant="keep"),
    "scale": Mode("magnitude", "divided by the largest magnitude in training", ("min", "max"), constant="zero"),
    "binary": Mode("threshold", "to 1 above 0.5, else to 0"),
    "sin_cos": Mode("sin_cos", "to sine and cosine"),
}
PART_MODES = {name: mode for name, mode in MODES.items() if name.islower()}
# Every statistic that some mode needs.
STATISTICS = tuple(dict.fromkeys(which for mode in MODES.values() for which in mode.statistics))


class _ModeOfType(str, Enum):
    """What `NormalizationMode` has beside its members."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics this mode needs, in the order (offset, other end)."""
        return MODES[self.value].statistics


NormalizationMode = _ModeOfType("NormalizationMode", {n: n for n in MODES if n.isupper()}, module=__name__)
NormalizationMode.__doc__ = """How raw values of a feature type become network values: the rows of `MODES` in capitals.

`MEAN_STD` gives zero mean and unit spread; the others map a range to [-1, 1]: `MIN_MAX` the whole one, `QUANTILES` the
1st to 99th percentile, `QUANTILE10` the 10th to 90th.
"""


@dataclass(frozen=True)
class Part:
    """Describe one part of a feature; a feature without parts is one part.

    Args:
        name: such as `left_arm`.
        width: its dimensions.
        mode: how it is normalised, a row of `MODES`.
    """

    name: str
    width: int
    mode: str

    @property
    def model_width(self) -> int:
        """Its dimensions as the network sees them: of an angle, sine and cosine."""
        return 2 * self.width if MODES[self.mode].form == "sin_cos" else self.width


def read_parts(feature: str, parts: Mapping[str, Mapping[str, Any]], width: int) -> list[Part]:
    """Return the parts of a feature from `{name: {"width": …, "mode": …}}`.

    Raises:
        InvalidConfigError: a part is described wrongly, or together they are not as wide as the feature.
    """
    read = []
    for name, values in parts.items():
        if not isinstance(values, Mapping) or set(values) != {"width", "mode"}:
            raise InvalidConfigError(
                f"Part {name!r} of {feature} is {values!r}; write {{'width': 6, 'mode': 'min_max'}}."
            )
        part = Part(name, values["width"], values["mode"])
        if part.mode not in PART_MODES:
            raise InvalidConfigError(
                f"Part {name!r} of {feature} has mode {part.mode!r}. {nearest(str(part.mode), PART_MODES)}"
            )
        if not isinstance(part.width, int) or part.width < 1:
            raise InvalidConfigError(f"Part {name!r} of {feature} has width {part.width!r}; it is at least 1.")
        if feature == "action" and PART_MODES[part.mode].form == "sin_cos":
            raise InvalidConfigError(f"Part {name!r} of {feature} has mode {part.mode!r}, which has no inverse.")
        read.append(part)
    total = sum(part.width for part in read)
    if total != width:
        widths = ", ".join(f"{part.name} {part.width}" for part in read)
        raise InvalidConfigError(f"{feature} has width {width}, but its parts have {total} together: {widths}.")
    return read


def one_part(feature: str, width: int, mode: NormalizationMode | str) -> Part:
    """Return the only part of a feature without parts, of a policy that normalises by parts.

    Raises:
        InvalidConfigError: there is no such mode by NVIDIA's rules.
    """
    name = NormalizationMode(mode).value
    if MODES[name].of_part is None:
        known = ", ".join(known for known, row in MODES.items() if row.of_part)
        raise InvalidConfigError(f"A policy that normalises by parts has no mode {name}. Available: {known}.")
    return Part(short_name(feature), width, MODES[name].of_part)


def short_name(feature: str) -> str:
    """Return NVIDIA's name of a feature: `state` or `action`."""
    return feature.removeprefix("observation.")
