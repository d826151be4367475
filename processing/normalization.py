"""Normalizer: one map per feature between robot units and what the network sees, by the table of modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..configuration.normalization import MODES, STATISTICS, Mode, Part, short_name
from ..errors import InvalidConfigError, MissingStatisticsError
from .arrays import to_tensor

# How far beyond the recorded spread a value may lie, in float32 and without becoming infinite.
_USUAL = 1e3
_COMPUTE = "Compute the statistics anew: manipulators convert-dataset <dataset> <new folder>"


class Normalizer:
    """Map a feature between raw and normalised values, part by part; a feature without parts is one part.

    What each mode does is in `configuration.normalization.MODES`. LeRobot's checkpoints give equal numbers by its
    modes of whole features, NVIDIA's by its modes of parts.

    Args:
        name: the feature's dataset name, for messages.
        parts: in the order in which they stand in the feature.
        statistics: `{"mean": …, "std": …}` etc. of the whole feature; of a camera one value per channel.
        eps: ε of the modes that add one: a dimension with a spread up to ε did not move.
        trailing: dimensions that follow the normalised one: 2 of a camera, (c, h, w).

    Raises:
        MissingStatisticsError: statistics that a mode needs are absent, of another width, impossible, or infinite
            in float32.
    """

    def __init__(
        self, name: str, parts: Sequence[Part], statistics: Mapping | None, eps: float = 1e-8, trailing: int = 0
    ):
        self.parts = list(parts)
        self._dim = -1 - trailing
        width = sum(part.width for part in parts)
        self._maps: list[_PartMap] = []
        start = 0
        for part in self.parts:
            mode = MODES[part.mode]
            whole = [_statistic(name, part, width, statistics or {}, which) for which in mode.statistics]
            values = [x[start : start + part.width].reshape(-1, *[1] * trailing) for x in whole]
            if mode.form in ("spread", "ends"):
                _check_order(name, part, *values)
            if not trailing and whole:  # a camera's mean and deviation may be those of other pictures
                _check_range(name, part, statistics, width, start)
            self._maps.append(_PartMap(mode, values, eps if mode.constant == "shift" else 0.0, self._dim))
            if whole:
                self._maps[-1].require_finite(f"{part.name!r} in {name}")
            start += part.width

    def normalize(self, x: torch.Tensor, steep: bool = False) -> torch.Tensor:
        """Return network values (…, model width) for raw ones (…, width).

        Args:
            x: raw.
            steep: divide a dimension that did not move by ε, as LeRobot does, instead of not at all: the smallest
                movement becomes very large. For networks that see bins, of which it then takes the first or the last.
        """
        if len(self.parts) == 1:
            return self._maps[0].normalize(x, steep)
        pieces = x.split([part.width for part in self.parts], dim=self._dim)
        return torch.cat(
            [m.normalize(piece, steep) for m, piece in zip(self._maps, pieces, strict=True)], dim=self._dim
        )

    def unnormalize(self, y: torch.Tensor) -> torch.Tensor:
        """Return raw values (…, width) for network ones: the inverse of `normalize` where there is one."""
        if len(self.parts) == 1:
            return self._maps[0].unnormalize(y)
        pieces = y.split([part.model_width for part in self.parts], dim=self._dim)
        return torch.cat([m.unnormalize(piece) for m, piece in zip(self._maps, pieces, strict=True)], dim=self._dim)


class _Line(NamedTuple):
    """The affine modes are one line per dimension: y = (x − offset) / divisor, back y · spread + offset."""

    offset: torch.Tensor
    spread: torch.Tensor
    divisor: torch.Tensor
    constant: torch.Tensor  # which dimensions did not move


class _PartMap:
    """Map one part."""

    def __init__(self, mode: Mode, values: Sequence[torch.Tensor], eps: float, dim: int):
        self.mode, self._values, self._eps, self._dim = mode, values, eps, dim
        self._lines: dict[tuple[torch.dtype, torch.device], _Line] = {}

    def normalize(self, x: torch.Tensor, steep: bool = False) -> torch.Tensor:
        form = self.mode.form
        if form == "identity":
            return x
        if form == "threshold":
            return (x > 0.5).to(x.dtype)
        if form == "sin_cos":
            return torch.cat([x.sin(), x.cos()], dim=self._dim)
        line = self._line(x)
        divisor = torch.where(line.constant, self._eps, line.divisor) if steep and self._eps else line.divisor
        y = (x - line.offset) / divisor
        if form == "ends":
            y = 2 * y - 1
        if self.mode.constant != "shift":
            y = torch.where(line.constant, 0.0 if self.mode.constant == "zero" else x, y)
        return y.clamp(-1, 1) if self.mode.clip else y

    def unnormalize(self, y: torch.Tensor) -> torch.Tensor:
        form = self.mode.form
        if form == "identity":
            return y
        if form == "threshold":
            return (y > 0.5).to(y.dtype)
        if form == "sin_cos":
            raise InvalidConfigError("Sines and cosines have no inverse here: only states are normalised by sin_cos.")
        line = self._line(y)
        fraction = (y + 1) / 2 if form == "ends" else y
        return fraction * line.spread + line.offset

    def require_finite(self, subject: str) -> None:
        """Check that usual values stay finite in float32, there and back.

        Raises:
            MissingStatisticsError: offset or spread are too large, or a spread too small to divide by.
        """
        if self.mode.form not in ("spread", "ends", "magnitude"):
            return
        line = self._line(torch.zeros(1))
        reach = torch.stack([line.offset.abs(), line.spread, 1 / line.divisor.abs()]) * _USUAL
        bad = (~reach.isfinite()).any(dim=0).flatten().nonzero().flatten().tolist()
        if bad:
            values = {
                which: x.flatten()[bad].tolist() for which, x in zip(self.mode.statistics, self._values, strict=True)
            }
            raise MissingStatisticsError(
                f"The statistics of {subject} are impossible in dimensions {bad}: {values}. In float32 they make "
                f"values infinite. {_COMPUTE}"
            )

    def _line(self, like: torch.Tensor) -> _Line:
        """Return offset and spread in the type and on the device of a tensor."""
        key = (like.dtype, like.device)
        if key not in self._lines:
            first, second = (value.to(like) for value in self._values)
            spread = second if self.mode.form == "spread" else second - first
            if self.mode.form == "magnitude":
                first, spread = torch.zeros_like(first), torch.maximum(first.abs(), second.abs())
            constant = spread <= self._eps
            padded = spread + self._eps if self.mode.form == "spread" else spread
            self._lines[key] = _Line(first, spread, torch.where(constant, 1.0, padded), constant)
        return self._lines[key]


def _statistic(name: str, part: Part, width: int, statistics: Mapping, which: str) -> torch.Tensor:
    """Return a statistic of a whole feature, checked."""
    if which not in statistics:
        whole = part.name == short_name(name)
        subject = name if whole else f"Part {part.name!r} of {name}"
        by_part = "" if whole else f" or by part: {{{name!r}: {{{part.name!r}: {{{which!r}: [...], …}}, …}}}}"
        identity = "the mode IDENTITY in normalization_mapping" if part.mode.isupper() else "the mode 'identity'"
        raise MissingStatisticsError(
            f"{subject} is normalised with {part.mode}, which needs {' and '.join(MODES[part.mode].statistics)}; the "
            f"statistics of {name} have: {', '.join(sorted(statistics)) or 'nothing'}. "
            f"Pass statistics={{{name!r}: {{{which!r}: [...], …}}}} (a dataset's: LeRobotDataset(...).statistics)"
            f"{by_part}, or choose {identity}. Where a dataset lacks them: {_COMPUTE}"
        )
    value = to_tensor(f"{which} of {name}", statistics[which]).to(torch.float64)
    if value.numel() != width:
        raise MissingStatisticsError(
            f"The {which} of {name} has {value.numel()} values (shape {tuple(value.shape)}); the feature has {width}."
        )
    if not torch.isfinite(value).all():
        raise MissingStatisticsError(f"The {which} of {name} is not finite: {value.flatten().tolist()}.")
    return value.flatten()


def _check_order(name: str, part: Part, first: torch.Tensor, second: torch.Tensor) -> None:
    low, high = MODES[part.mode].statistics
    spread = second if MODES[part.mode].form == "spread" else second - first
    if (spread < 0).any():
        problem = "std is negative" if low == "mean" else f"{high} lies below {low}"
        raise MissingStatisticsError(f"The statistics of {part.name!r} in {name} are impossible: {problem}.")


def _check_range(name: str, part: Part, statistics: Mapping, width: int, start: int) -> None:
    """Check that a part's statistics can be of the same numbers, as far as their range is recorded.

    Dimensions that did not move have no range to compare with. A mean lies inside the range, and no standard deviation
    exceeds it; quantiles of a merged dataset are estimates, which may lie outside by a little.
    """
    if not {"min", "max"} <= statistics.keys():
        return
    used = dict.fromkeys(("mean", *MODES[part.mode].statistics))
    values = {
        which: _statistic(name, part, width, statistics, which)[start : start + part.width]
        for which in ("min", "max", *used)
        if which in statistics
    }
    low, high = values["min"], values["max"]
    size = (high - low).clamp(min=0)
    room = 0.1 * size + 1e-3 * torch.maximum(low.abs(), high.abs())
    for which, x in values.items():
        outside = (x > size + room) if which == "std" else (x < low - room) | (x > high + room)
        bad = (outside & (size > 0)).nonzero().flatten().tolist()
        if bad:
            i = bad[0]
            raise MissingStatisticsError(
                f"The statistics of {part.name!r} in {name} are impossible: in dimensions {bad} {which} does not go "
                f"with the range; in dimension {i} it is {x[i]:.6g}, min is {low[i]:.6g} and max is {high[i]:.6g}. "
                f"They are not of the same data, or damaged. {_COMPUTE}"
            )


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
    for which in STATISTICS:
        if all(which in given[part.name] for part in parts):
            values = [to_tensor(f"{which} of {part.name}", given[part.name][which]).flatten() for part in parts]
            for part, value in zip(parts, values, strict=True):
                if len(value) != part.width:
                    raise MissingStatisticsError(
                        f"The {which} of {part.name!r} in {feature} has {len(value)} values, not {part.width}."
                    )
            joined[which] = torch.cat([value.to(torch.float64) for value in values])
    return joined
