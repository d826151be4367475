"""Whether observations are what the policy was trained on: states in their range, cameras alive and of usual colours.

An observation is judged before it is used, and remembered once it was used: one that is refused leaves nothing behind.

Shapes: b batch, s width of a vector, c channels, h height, w width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from ..configuration.features import STATE
from ..errors import ImplausibleObservationError
from ..processing.arrays import Array
from ..processing.imagenet import IMAGENET_STATISTICS
from ..processing.observation import Observation
from ..processing.processor import PolicyProcessor
from .observation_report import CAMERA_FINDINGS, ObservationReport, Outside

logger = logging.get_logger(__name__)

# Beyond one whole range, the policy extrapolates: that is said once.
_WARN_BEYOND = 1.0
# A picture whose values, of 0 to 1, lie so close together is one colour, such as that of a cap, with some noise.
_FLAT = 0.05
# How many of a camera's standard deviations the mean of a picture may lie from that of its training pictures.
_USUAL_DEVIATIONS = 1.5
# Red and blue that are closer on average do not tell which is which.
_TELLING_COLOURS = 0.05
# How much of its range the state moves while a living camera may show the same picture twice.
_STILL = 0.05


class _Usual:
    """Hold the range of a vector in training, and the distance that counts as one range."""

    def __init__(self, low: np.ndarray, high: np.ndarray):
        self.low, self.high = low, high
        spread = high - low
        self.margin = 0.01 * spread + 1e-6  # as of actions outside the training range
        # A dimension that hardly moved, such as a locked joint, is measured by a tenth of the widest one.
        widest = spread.max() or max(np.abs(low).max(), 1.0)
        self.scale = np.maximum(spread, 0.1 * widest)

    def distance(self, x: np.ndarray) -> np.ndarray | None:
        """Return how far values (b, s) are above the range, or, negative, below it; None where all are inside."""
        above, below = x > self.high, x < self.low
        if not (above.any() or below.any()):
            return None
        return np.where(above, x - self.high, np.where(below, x - self.low, 0.0))


class _Colours:
    """Hold what the means of some cameras' pictures are in training, per channel: (v, 1, c) each.

    Args:
        usual: per camera mean and deviation, (c,) each; None where they are not known.
        channels: c.
    """

    def __init__(self, usual: Sequence[tuple[np.ndarray, np.ndarray] | None], channels: int):
        unknown = (np.zeros(channels), np.full(channels, np.inf))
        mean, std = (np.stack(x)[:, None] for x in zip(*(one or unknown for one in usual), strict=True))
        self.low, self.high = mean - _USUAL_DEVIATIONS * std - 1e-3, mean + _USUAL_DEVIATIONS * std + 1e-3
        self.red_over_blue = mean[..., 0] - mean[..., -1]  # (v, 1)
        self.red_over_blue[np.abs(self.red_over_blue) < _TELLING_COLOURS] = np.nan  # which compares with nothing

    def findings(self, means: np.ndarray) -> dict[str, np.ndarray]:
        """Return where brightness or order of the channels are unusual, (v, b), for means (v, b, c)."""
        return {
            "brightness": ((means < self.low) | (means > self.high)).any(2),
            "channels": (means[..., 0] - means[..., -1]) / self.red_over_blue < -0.5,
        }


class _Still(NamedTuple):
    """Remember a camera: few of its last pixels; of rows that repeat, more, and the state at the first time."""

    grid: list[bytes]
    rows: dict[int, tuple[np.ndarray, np.ndarray]]


class Judgement(NamedTuple):
    """Hold what one observation adds to the report, once it is used."""

    rows: int
    distances: dict[str, np.ndarray]  # feature → (b, s), above 0 outside the range
    cameras: dict[str, dict[str, int]]  # camera → finding → how many rows
    stills: dict[str, _Still]


class Plausibility:
    """Judge the observations of an episode by the statistics of the training data.

    Args:
        processor: whose statistics they are.
        limit: training ranges that a state may lie outside of its own; None: any number.
        warned: findings that were said already; those of this episode are added.
    """

    def __init__(self, processor: PolicyProcessor, limit: float | None, warned: set[tuple[str, str]]):
        self._limit, self._warned = limit, warned
        self._processor = processor
        self._usual: dict[str, _Usual] = {}
        self._colours: dict[tuple[str, ...], _Colours] = {}  # of cameras that are compared together
        for name in processor.input_features:
            if name not in processor.pictures.cameras and (ends := training_range(processor, name)) is not None:
                self._usual[name] = _Usual(*ends)
        self._observations = 0
        self._outside = {name: np.zeros(usual.low.shape, int) for name, usual in self._usual.items()}
        self._farthest = {name: np.zeros(usual.low.shape) for name, usual in self._usual.items()}
        self._cameras: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(CAMERA_FINDINGS, 0))
        self._stills: dict[str, _Still] = {}

    def judge(self, observation: Observation) -> Judgement:
        """Return what an observation, without history, would add to the report; nothing is remembered.

        Raises:
            ImplausibleObservationError: a state is absurdly far outside the training range.
        """
        distances = {}
        vectors = {name: _array(x).astype(np.float64) for name, x in observation.items() if name in self._usual}
        for name, x in vectors.items():
            if (distance := self._usual[name].distance(x)) is not None:
                self._refuse_absurd(name, x, np.abs(distance) / self._usual[name].scale)
                distances[name] = distance
        pictures = {name: observation[name] for name in self._processor.pictures.cameras if name in observation}
        cameras, stills = self._look(pictures, vectors.get(STATE))
        return Judgement(observation.batch_size, distances, cameras, stills)

    def remember(self, judgement: Judgement) -> None:
        """Add to the report what was judged, and say once what is unusual."""
        self._observations += judgement.rows
        for name, distance in judgement.distances.items():
            usual, farthest = self._usual[name], self._farthest[name]
            self._outside[name] += (np.abs(distance) > usual.margin).sum(0)
            signed = np.take_along_axis(distance, np.abs(distance).argmax(0)[None], 0)[0]
            self._farthest[name] = np.where(np.abs(signed) > np.abs(farthest), signed, farthest)
            if (np.abs(signed) / usual.scale).max() > _WARN_BEYOND:
                self._warn(name, "range")
        for name, found in judgement.cameras.items():
            for finding, rows in found.items():
                self._cameras[name][finding] += rows
                self._warn(name, finding)
        self._stills.update(judgement.stills)

    def report(self) -> ObservationReport:
        """Return what was unusual so far."""
        entries = {entry.name: entry.dimensions for entry in self._processor.contract().inputs}
        dimensions = {}
        for name, usual in self._usual.items():
            dimensions[name] = {
                entries[name][i].name or str(i): Outside(
                    share=float(self._outside[name][i] / self._observations),
                    farthest=float(self._farthest[name][i]),
                    ranges=float(abs(self._farthest[name][i]) / usual.scale[i]),
                    low=float(usual.low[i]),
                    high=float(usual.high[i]),
                    unit=entries[name][i].unit,
                )
                for i in np.flatnonzero(self._outside[name])
            }
        cameras = {
            name: {finding: rows / self._observations for finding, rows in found.items() if rows}
            for name, found in self._cameras.items()
        }
        found = {name: rows for name, rows in (dimensions | cameras).items() if rows}
        return ObservationReport(
            self._observations,
            {name: rows for name, rows in found.items() if name in dimensions},
            {name: rows for name, rows in found.items() if name in cameras},
        )

    # --- inside ---------------------------------------------------------------------------------------

    def _refuse_absurd(self, name: str, x: np.ndarray, ranges: np.ndarray) -> None:
        if self._limit is None or ranges.max() <= self._limit:
            return
        row, i = np.unravel_index(ranges.argmax(), ranges.shape)
        dimension = next(entry for entry in self._processor.contract().inputs if entry.name == name).dimensions[i]
        raise ImplausibleObservationError(
            name,
            dimension.name or str(i),
            float(x[row, i]),
            dimension.unit,
            (float(self._usual[name].low[i]), float(self._usual[name].high[i])),
            float(ranges[row, i]),
            self._limit,
        )

    def _look(
        self, pictures: dict[str, Array], state: np.ndarray | None
    ) -> tuple[dict[str, dict[str, int]], dict[str, _Still]]:
        """Return what is unusual about each camera's pictures (b, c, h, w), by few of their pixels."""
        found: dict[str, dict[str, int]] = {name: {} for name in pictures}
        alike: dict[tuple, dict[str, np.ndarray]] = defaultdict(
            dict
        )  # cameras of the same size are looked at together
        stills = {}
        for name, x in pictures.items():
            grid = _array(_thinned(x, 12)).copy().reshape(*x.shape[:2], -1)  # (b, c, pixels)
            alike[grid.shape, grid.dtype][name] = grid
            frozen, stills[name] = self._frozen(name, x, grid, state)
            if frozen:
                found[name]["frozen"] = frozen
        for ((_, channels, count), dtype), grids in alike.items():
            largest = 255 if dtype == np.uint8 else 1
            grid = np.stack(list(grids.values()))  # (v, b, c, pixels)
            rows = grid.reshape(*grid.shape[:2], -1)
            flat = np.maximum.reduce(rows, 2) - np.minimum.reduce(rows, 2) <= _FLAT * largest  # (v, b)
            means = np.add.reduce(grid, 3, dtype=np.float64) / (count * largest)  # (v, b, c)
            for finding, where in ({"flat": flat} | self._colours_of(tuple(grids), channels).findings(means)).items():
                if not where.any():
                    continue
                for name, unusual in zip(grids, where, strict=True):
                    if finding == "flat":  # by few pixels, and now by all
                        unusual = [_is_flat(_array(pictures[name][row])) for row in np.flatnonzero(unusual)]
                    if count_of_rows := int(np.sum(unusual)):
                        found[name][finding] = count_of_rows
        return found, stills

    def _colours_of(self, names: tuple[str, ...], channels: int) -> _Colours:
        if names not in self._colours:
            self._colours[names] = _Colours([training_colours(self._processor, name) for name in names], channels)
        return self._colours[names]

    def _frozen(self, name: str, x: Array, grid: np.ndarray, state: np.ndarray | None) -> tuple[int, _Still]:
        """Return how many rows show the picture of before although the state has moved, and what to remember."""
        now = [row.tobytes() for row in grid]
        last = self._stills.get(name)
        frozen, rows = 0, {}
        if state is None or last is None or len(last.grid) != len(now):
            return frozen, _Still(now, rows)
        for row in [i for i, pixels in enumerate(now) if pixels == last.grid[i]]:
            pixels = _array(_thinned(x[row], 120))
            before = last.rows.get(row)
            if before is not None and np.array_equal(before[0], pixels):
                frozen += bool((np.abs(state[row] - before[1]) / self._usual[STATE].scale).max() > _STILL)
                rows[row] = before
            else:
                rows[row] = pixels.copy(), state[row]
        return frozen, _Still(now, rows)

    def _warn(self, name: str, finding: str) -> None:
        if (name, finding) in self._warned:
            return
        self._warned.add((name, finding))
        if finding in CAMERA_FINDINGS:
            said = f"{name} {CAMERA_FINDINGS[finding]}"
        else:
            said = next(line for line in self.report().findings if line.startswith(name))
        logger.warning(f"{said}. This is said once; print(pipeline.observation_report) shows all.")


def training_range(processor: PolicyProcessor, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the range of a vector's training data, (s,) each; where it is not recorded, nearly that."""
    for low, high in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
        if (ends := _pair(processor, name, low, high)) and (ends[0] <= ends[1]).all():
            return ends
    if spread := _pair(processor, name, "mean", "std"):
        return spread[0] - 3 * spread[1], spread[0] + 3 * spread[1]
    return None


def training_colours(processor: PolicyProcessor, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return mean and deviation of a camera's training pictures, (c,) each.

    None where they are not recorded, or are those of a pretrained backbone, which say nothing of this camera.
    """
    colours = _pair(processor, name, "mean", "std")
    usual = IMAGENET_STATISTICS.values()
    if colours and all(x.shape == (3,) and np.allclose(x, y) for x, y in zip(colours, usual, strict=True)):
        return None
    return colours


def _pair(processor: PolicyProcessor, name: str, first: str, second: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return two statistics of a feature; None where they are not recorded, or cannot be of it."""
    statistics, width = processor.robots.statistics_in_use(name), processor.input_features[name].shape[0]
    if not {first, second} <= statistics.keys():
        return None
    x, y = (np.asarray(statistics[which], dtype=np.float64).reshape(-1) for which in (first, second))
    return (x, y) if len(x) == len(y) == width and np.isfinite((x, y)).all() else None


def _array(x: Array) -> np.ndarray:
    """Return an array with the numbers of a tensor, in the same memory where it can be."""
    if isinstance(x, np.ndarray):
        return x
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)


def _is_flat(picture: np.ndarray) -> bool:
    return float(picture.max()) - float(picture.min()) <= _FLAT * (255 if picture.dtype == np.uint8 else 1)


def _thinned(x: Array, size: int) -> Array:
    """Return every n-th row and column of pictures, about `size` of each or all that there are, as a view."""
    height, width = x.shape[-2:]
    return x[..., :: max(1, height // size), :: max(1, width // size)]
