"""Parts of a state or an action (arm, gripper, …), each normalised in its own way, as GR00T was trained.

Shapes: a feature is (…, width); its parts stand in it one after the other, in their declared order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration.features import ACTION, NormalizationMode
from ..errors import InvalidConfigError, MissingStatisticsError, nearest
from .arrays import to_tensor

# What each mode needs to know of the training data.
MODES: dict[str, tuple[str, ...]] = {
    "min_max": ("min", "max"),
    "q99": ("q01", "q99"),
    "mean_std": ("mean", "std"),
    "scale": ("min", "max"),
    "binary": (),
    "sin_cos": (),
    "identity": (),
}
# The mode of a feature that is one part, by the mode of its type.
_MODE_OF_TYPE = {
    NormalizationMode.MIN_MAX: "min_max",
    NormalizationMode.QUANTILES: "q99",
    NormalizationMode.MEAN_STD: "mean_std",
    NormalizationMode.IDENTITY: "identity",
}
_KINDS = ("min", "max", "mean", "std", "q01", "q99")


@dataclass(frozen=True)
class Part:
    """Describe one part of a feature.

    Args:
        name: such as `"left_arm"`.
        width: its dimensions.
        mode: how it is normalised, one of `MODES`.
    """

    name: str
    width: int
    mode: str

    @property
    def model_width(self) -> int:
        """Its dimensions as the network sees them: of an angle, sine and cosine."""
        return 2 * self.width if self.mode == "sin_cos" else self.width


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
        if part.mode not in MODES:
            raise InvalidConfigError(f"Part {name!r} of {feature} has mode {part.mode!r}. {nearest(part.mode, MODES)}")
        if not isinstance(part.width, int) or part.width < 1:
            raise InvalidConfigError(f"Part {name!r} of {feature} has width {part.width!r}; it is at least 1.")
        if feature == ACTION and part.mode == "sin_cos":
            raise InvalidConfigError(f"Part {name!r} of {feature} has mode 'sin_cos', which has no way back.")
        read.append(part)
    total = sum(part.width for part in read)
    if total != width:
        widths = ", ".join(f"{part.name} {part.width}" for part in read)
        raise InvalidConfigError(f"{feature} has width {width}, but its parts have {total} together: {widths}.")
    return read


def one_part(name: str, width: int, mode: NormalizationMode) -> dict[str, dict[str, Any]]:
    """Return the parts of a feature that has none apart: itself.

    Raises:
        InvalidConfigError: parts know no such mode.
    """
    if mode not in _MODE_OF_TYPE:
        known = ", ".join(known.value for known in _MODE_OF_TYPE)
        raise InvalidConfigError(f"A policy that normalises by parts knows no {mode.value}. Available: {known}.")
    return {name: {"width": width, "mode": _MODE_OF_TYPE[mode]}}


class PartsNormalizer:
    """Map a feature between raw and normalised values, part by part.

    `min_max`: 2(x − min) / (max − min) − 1. `q99`: the same between the 1st and 99th percentile, cut off at ±1.
    `mean_std`: (x − mean) / std. `scale`: x / max(|min|, |max|). `binary`: 1 above 0.5, else 0, both ways.
    `sin_cos`: sines, then cosines; of states only. `identity`: x.

    A dimension that did not move in training becomes 0 with `min_max` and `scale`, and stays as it is with `q99` and
    `mean_std`; on the way back it takes its recorded value. These are NVIDIA's rules, for which GR00T's weights were
    trained; `Normalizer` has LeRobot's.

    Args:
        name: the feature's, for messages.
        parts: in the order in which they stand in it.
        statistics: `{"min": …}` etc. of the whole feature.

    Raises:
        MissingStatisticsError: statistics that a mode needs are absent, not finite or of another width.
    """

    def __init__(self, name: str, parts: Sequence[Part], statistics: Mapping | None):
        self.parts = list(parts)
        self.width = sum(part.width for part in parts)
        self._values: list[tuple[torch.Tensor, ...]] = []
        start = 0
        for part in self.parts:
            needed = [self._statistic(name, part, statistics or {}, which) for which in MODES[part.mode]]
            values = tuple(value[start : start + part.width] for value in needed)
            if part.mode in ("min_max", "q99", "mean_std"):
                self._check_order(name, part, *values)
            self._values.append(values)
            start += part.width

    def _statistic(self, name: str, part: Part, statistics: Mapping, which: str) -> torch.Tensor:
        if which not in statistics:
            raise MissingStatisticsError(
                f"Part {part.name!r} of {name} is normalised with {part.mode}, which needs "
                f"{' and '.join(MODES[part.mode])}; the statistics of {name} have: "
                f"{', '.join(sorted(statistics)) or 'nothing'}. Pass statistics={{{name!r}: {{{which!r}: [...], …}}}} "
                f"or by part: {{{name!r}: {{{part.name!r}: {{{which!r}: [...], …}}, …}}}}."
            )
        value = to_tensor(f"{which} of {name}", statistics[which]).to(torch.float64).flatten()
        if len(value) != self.width:
            raise MissingStatisticsError(
                f"The {which} of {name} has {len(value)} values; its parts have {self.width}."
            )
        if not torch.isfinite(value).all():
            raise MissingStatisticsError(f"The {which} of {name} is not finite: {value.tolist()}.")
        return value

    @staticmethod
    def _check_order(name: str, part: Part, first: torch.Tensor, second: torch.Tensor) -> None:
        low, high = MODES[part.mode]
        if part.mode == "mean_std" and (second < 0).any():
            raise MissingStatisticsError(f"The statistics of {part.name!r} in {name} are impossible: std is negative.")
        if part.mode != "mean_std" and (second < first).any():
            raise MissingStatisticsError(
                f"The statistics of {part.name!r} in {name} are impossible: {high} lies below {low}."
            )

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Return network values (…, model width) for raw ones (…, width)."""
        pieces = x.split([part.width for part in self.parts], dim=-1)
        return self._joined(_normalize, pieces)

    def unnormalize(self, y: torch.Tensor) -> torch.Tensor:
        """Return raw values (…, width) for network ones: the inverse of `normalize` where there is one."""
        pieces = y.split([part.model_width for part in self.parts], dim=-1)
        return self._joined(_unnormalize, pieces)

    def _joined(self, function: Any, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        done = [
            function(part.mode, piece, *(value.to(piece) for value in values))
            for part, piece, values in zip(self.parts, pieces, self._values, strict=True)
        ]
        return torch.cat(done, dim=-1)


def _normalize(
    mode: str, x: torch.Tensor, first: torch.Tensor | None = None, second: torch.Tensor | None = None
) -> torch.Tensor:
    if mode == "binary":
        return (x > 0.5).to(x.dtype)
    if mode == "sin_cos":
        return torch.cat([x.sin(), x.cos()], dim=-1)
    if mode == "identity":
        return x
    if mode == "scale":
        bound = torch.maximum(first.abs(), second.abs())
        return torch.where(bound == 0, 0.0, x / torch.where(bound == 0, 1.0, bound))
    spread = second if mode == "mean_std" else second - first
    constant = spread == 0
    y = (x - first) / torch.where(constant, 1.0, spread)
    if mode == "mean_std":
        return torch.where(constant, x, y)
    y = 2 * y - 1
    if mode == "min_max":
        return torch.where(constant, 0.0, y)
    return torch.where(constant, x, y).clamp(-1, 1)


def _unnormalize(
    mode: str, y: torch.Tensor, first: torch.Tensor | None = None, second: torch.Tensor | None = None
) -> torch.Tensor:
    if mode == "binary":
        return (y > 0.5).to(y.dtype)
    if mode == "identity":
        return y
    if mode == "scale":
        return y * torch.maximum(first.abs(), second.abs())
    if mode == "mean_std":
        return y * second + first
    return (y + 1) / 2 * (second - first) + first


def whole_statistics(feature: str, parts: Sequence[Part], statistics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the statistics of a whole feature, however they come; None where there are none.

    They may be of the feature (a dataset's), or of its parts: `{"observation.state": {"arm": {"min": …}}}`, or under
    NVIDIA's names `{"state": {"arm": …}}` and `{"state.arm": …}`.

    Raises:
        MissingStatisticsError: a part has none, or of another width.
    """
    short = short_name(feature)
    given = statistics.get(feature, statistics.get(short))
    if given is None:
        given = {p.name: statistics[f"{short}.{p.name}"] for p in parts if f"{short}.{p.name}" in statistics}
    if not isinstance(given, Mapping) or not any(isinstance(value, Mapping) for value in given.values()):
        return given or None
    lacking = [part.name for part in parts if part.name not in given]
    if lacking:
        raise MissingStatisticsError(
            f"The statistics of {feature} are by part, and {', '.join(lacking)} has none; there are: "
            f"{', '.join(given)}."
        )
    joined = {}
    for which in _KINDS:
        if all(which in given[part.name] for part in parts):
            values = [to_tensor(f"{which} of {part.name}", given[part.name][which]).flatten() for part in parts]
            for part, value in zip(parts, values, strict=True):
                if len(value) != part.width:
                    raise MissingStatisticsError(
                        f"The {which} of {part.name!r} in {feature} has {len(value)} values, not {part.width}."
                    )
            joined[which] = torch.cat([value.to(torch.float64) for value in values])
    return joined


def short_name(feature: str) -> str:
    """Return NVIDIA's name of a feature: `state` or `action`."""
    return feature.removeprefix("observation.")
