"""Dataset statistics, exact over all given values; quantiles are never averaged over episodes.

Notation: n rows, c channels, h height, w width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import DatasetFormatError, InvalidFrameError
from .quantiles import interpolated, quantiles_of_blocks

# Statistic → probability. LeRobot stores these five; policies normalise with the outer pairs.
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

_TOGETHER, _ROWS = 2**22, 2**16  # more values than these are taken in blocks of so many rows
_POOLED = frozenset(("min", "max", "mean", "std", "count"))

# Of a larger image only every k-th pixel of both axes is counted, so that a frame costs at most this many.
MAX_SIDE = 224


def compute_statistics(values: np.ndarray, visual: bool = False) -> dict[str, np.ndarray]:
    """Return min, max, mean, std, q01, q10, q50, q90, q99 (each values.shape[1:]) and count (1,), as float32.

    Computed in float64; std divides by n; quantiles interpolate linearly between the two nearest values. A
    dimension that never changes has a std of exactly 0.

    Args:
        values (`np.ndarray`): (n, …) numbers; or uint8 images (n, c, h, w) or (n, h, w, c) when `visual`.
        visual (`bool`, *optional*, defaults to False): count pixels per channel; results are (c, 1, 1).

    Raises:
        DatasetFormatError: there are no values, or some are not finite.
    """
    values = np.asarray(values)
    if len(values) == 0:
        raise DatasetFormatError("There are no values to compute statistics of; record at least one frame.")
    if visual:
        statistics = ImageStatistics()
        for image in values:
            statistics.add(image)
        return statistics.compute()

    if values.size > _TOGETHER:
        return statistics_of_blocks(lambda: (values[i : i + _ROWS] for i in range(0, len(values), _ROWS)))
    moments = _Moments()
    exact = moments.add(values)
    return moments.compute(np.quantile(exact, list(QUANTILES.values()), axis=0))


def statistics_of_blocks(blocks: Callable[[], Iterable[np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the statistics of `compute_statistics` of numbers that are not all in memory, exact as well.

    Means and variances of blocks are merged in float64. Quantiles are those of all numbers, whose digits are counted
    in two further passes of float32, up to four of others.

    Args:
        blocks: called for every pass; yields the same numbers each time, (n, …) in arrays of one type.

    Raises:
        DatasetFormatError: there are no values, or some are not finite.
    """
    moments, shape = _Moments(), ()
    for block in blocks():
        if len(block):
            moments.add(block)
            shape = block.shape[1:]
    if not moments.count:
        raise DatasetFormatError("There are no values to compute statistics of; record at least one frame.")
    found = quantiles_of_blocks(
        lambda: (block.reshape(len(block), -1) for block in blocks()),
        moments.count,
        np.reshape(moments.ends, (2, -1)),
        list(QUANTILES.values()),
    )
    return moments.compute(found.reshape(len(QUANTILES), *shape))


def statistics_of_episodes(values: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Return the statistics of `compute_statistics` of every episode: each (episodes, …) float32, count (episodes, 1).

    Args:
        values (`np.ndarray`): (rows, …) finite numbers of episodes that follow one another.
        lengths (`np.ndarray`): (episodes,) how many rows each has, at least 1.
    """
    shape, lengths = values.shape[1:], np.asarray(lengths)
    exact = values.reshape(len(values), -1).astype(np.float64)
    starts = np.cumsum(lengths) - lengths
    low, high = np.minimum.reduceat(exact, starts), np.maximum.reduceat(exact, starts)
    mean = np.add.reduceat(exact, starts) / lengths[:, None]
    variance = np.add.reduceat((exact - np.repeat(mean, lengths, axis=0)) ** 2, starts) / lengths[:, None]
    constant = low == high
    result = {
        "min": low,
        "max": high,
        "mean": np.where(constant, low, mean),
        "std": np.where(constant, 0.0, np.sqrt(variance)),
        "count": lengths[:, None],
    }
    found = np.empty((len(QUANTILES), *low.shape))
    for chosen in _of_similar_length(lengths):
        found[:, chosen] = _padded_quantiles(exact, starts[chosen], lengths[chosen])
    result |= dict(zip(QUANTILES, found, strict=True))
    return {
        name: value.astype(np.float32).reshape(len(lengths), *(shape if name != "count" else (1,)))
        for name, value in result.items()
    }


def _of_similar_length(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield groups of episodes that may be padded to one length: short and long ones apart."""
    order = np.argsort(lengths, kind="stable")
    first = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or lengths[order[i]] > 1.5 * lengths[order[first]]:
            yield order[first:i]
            first = i


def _padded_quantiles(exact: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the quantiles of episodes (quantiles, episodes, d), as `np.quantile` of each."""
    steps = np.arange(lengths.max())
    rows = starts[:, None] + np.minimum(steps, lengths[:, None] - 1)  # (episodes, longest)
    padded = np.moveaxis(exact[rows], 2, 1).copy()  # (episodes, d, longest)
    padded[np.broadcast_to(steps >= lengths[:, None, None], padded.shape)] = np.inf
    padded.sort(axis=-1)
    found = []
    for probability in QUANTILES.values():
        places = (lengths - 1) * probability
        lower = np.floor(places).astype(np.int64)
        ends = [
            np.take_along_axis(padded, np.broadcast_to(rank[:, None, None], (*padded.shape[:2], 1)), axis=2)[..., 0]
            for rank in (lower, np.minimum(lower + 1, lengths - 1))
        ]
        found.append(interpolated(*ends, (places - lower)[:, None]))
    return np.stack(found)


class _Moments:
    """Least, largest, mean and spread of numbers that come in blocks, in float64."""

    def __init__(self):
        self.count, self.ends, self._mean, self._squares = 0, None, None, None

    def add(self, values: np.ndarray) -> np.ndarray:
        """Add rows (n, …) and return them as float64.

        Raises:
            DatasetFormatError: some are not finite.
        """
        exact = values.astype(np.float64)
        low, high, mean = exact.min(axis=0), exact.max(axis=0), exact.mean(axis=0)
        if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high))):
            row = self.count + int(np.argwhere(~np.isfinite(exact))[0][0])
            raise DatasetFormatError(f"Row {row} has values that are not finite; remove that frame.")
        squares = exact.var(axis=0) * len(exact)
        if self.ends is None:
            self.count, self.ends, self._mean, self._squares = len(exact), (low, high), mean, squares
            return exact
        total, difference = self.count + len(exact), mean - self._mean
        self._squares = self._squares + squares + difference**2 * (self.count * len(exact) / total)
        self._mean = self._mean + difference * (len(exact) / total)
        self.ends = np.minimum(self.ends[0], low), np.maximum(self.ends[1], high)
        self.count = total
        return exact

    def compute(self, quantiles: np.ndarray) -> dict[str, np.ndarray]:
        """Return all statistics, with those of `QUANTILES`, as float32."""
        low, high = self.ends
        constant = low == high  # rounding in the mean would give these a tiny std, by which normalization divides
        result = {
            "min": low,
            "max": high,
            "mean": np.where(constant, low, self._mean),
            "std": np.where(constant, 0.0, np.sqrt(self._squares / self.count)),
            "count": np.array([self.count]),
        }
        result |= dict(zip(QUANTILES, quantiles, strict=True))
        return {name: np.asarray(value, dtype=np.float32) for name, value in result.items()}


def pool_statistics(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return min, max, mean, std and count over all parts from those of each part, as float32.

    Means and variances are weighted by the counts, as in LeRobot. Quantiles cannot be pooled, so the result has
    none; a policy that needs them raises an error.

    Raises:
        KeyError: a part lacks one of the five.
        ValueError: the shapes of two parts differ.
    """
    return {name: value.astype(np.float32) for name, value in pool_exactly(parts).items()}


def pool_exactly(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the same in float64, which can be pooled again with that of other parts."""
    stacked = {
        name: np.stack([np.asarray(part[name], dtype=np.float64) for part in parts])
        for name in ("min", "max", "mean", "std", "count")
    }  # (parts, …)
    mean, count = stacked["mean"], stacked["count"]
    low, high = stacked["min"].min(axis=0), stacked["max"].max(axis=0)
    with np.errstate(all="ignore"):  # what is not finite stays so, and is refused by whoever reads it
        weight = count.reshape(len(parts), *[1] * (mean.ndim - 1)) / count.sum()
        total = (weight * mean).sum(axis=0)
        variance = (weight * (stacked["std"] ** 2 + (mean - total) ** 2)).sum(axis=0)
    constant = low == high  # as in compute_statistics
    result = {
        "min": low,
        "max": high,
        "mean": np.where(constant, low, total),
        "std": np.where(constant, 0.0, np.sqrt(np.maximum(variance, 0.0))),
        "count": count.sum(axis=0),
    }
    return {name: np.asarray(value) for name, value in result.items()}


def joined_statistics(datasets: Sequence[Any]) -> dict[str, dict[str, np.ndarray]]:
    """Return the statistics of several datasets' features as one, each frame once; of one dataset its own.

    Those of two or more are pooled from each one's, and the quantiles of vectors are computed from the data, where
    every dataset has some; they cannot be had from other quantiles, so those of cameras are left out.

    Args:
        datasets (`Sequence[LeRobotDataset]`): in which a vector has one width.
    """
    if len(datasets) == 1:
        return datasets[0].statistics
    joined: dict[str, dict[str, np.ndarray]] = {}
    each = [dataset.statistics for dataset in datasets]
    for name in dict.fromkeys(name for statistics in each for name in statistics):
        having = [(d, s[name]) for d, s in zip(datasets, each, strict=True) if name in s]
        lacking = any(name in d.features and name not in s for d, s in zip(datasets, each, strict=True))
        parts = [values for _, values in having]
        if lacking or not all(part.keys() >= _POOLED for part in parts):
            continue  # whoever needs them says so
        joined[name] = pool_statistics(parts)
        if all(part.keys() >= QUANTILES.keys() for part in parts) and name in having[0][0].vector_names:
            whole = statistics_of_blocks(lambda name=name, having=having: _blocks(name, [d for d, _ in having]))
            joined[name] |= {q: whole[q] for q in QUANTILES}
    return joined


def _blocks(name: str, datasets: Iterable[Any]) -> Iterator[np.ndarray]:
    """Yield a vector of all frames of some datasets in float32, a block at a time."""
    for dataset in datasets:
        for rows in dataset.row_blocks():
            yield dataset.numbers(name, rows).astype(np.float32)


class ImageStatistics:
    """Count uint8 pixels per channel, one image at a time; memory stays at 256 numbers per channel.

    Eight-bit pixels have 256 values, so the histogram loses nothing: quantiles are exact as well.
    """

    def __init__(self):
        self.histogram: np.ndarray | None = None  # (c, 256)
        self.num_images = 0

    def add(self, image: np.ndarray) -> None:
        """Count one uint8 image, (h, w, c) or (c, h, w)."""
        pixels = channels_last(image)  # (h, w, c)
        step = max(1, -(-max(pixels.shape[:2]) // MAX_SIDE))
        pixels = pixels[::step, ::step]
        counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(pixels, -1, 0)])
        self.histogram = counts if self.histogram is None else self.histogram + counts
        self.num_images += 1

    def merge(self, others: Iterable[ImageStatistics]) -> ImageStatistics:
        """Add the counts of `others` and return self."""
        for other in others:
            if other.histogram is not None:
                self.histogram = other.histogram if self.histogram is None else self.histogram + other.histogram
                self.num_images += other.num_images
        return self

    def compute(self) -> dict[str, np.ndarray]:
        """Return the statistics of `compute_statistics`, (c, 1, 1) float32 in [0, 1]; `count` counts images."""
        if self.histogram is None:
            raise DatasetFormatError("There are no images to compute statistics of; record at least one frame.")
        level = np.arange(256) / 255.0
        total = self.histogram.sum(axis=1)  # (c,)
        present = self.histogram > 0
        low = level[present.argmax(axis=1)]
        high = level[255 - present[:, ::-1].argmax(axis=1)]
        mean = self.histogram @ level / total
        variance = (self.histogram * (level - mean[:, None]) ** 2).sum(axis=1) / total
        result = {
            "min": low,
            "max": high,
            "mean": np.where(low == high, low, mean),
            "std": np.where(low == high, 0.0, np.sqrt(variance)),
        }
        for name, probability in QUANTILES.items():
            result[name] = np.array([_quantile(counts, level, probability) for counts in self.histogram])
        result = {name: value.reshape(-1, 1, 1) for name, value in result.items()}
        result["count"] = np.array([self.num_images])
        return {name: value.astype(np.float32) for name, value in result.items()}


def channels_last(image: np.ndarray) -> np.ndarray:
    """Return a uint8 image as (h, w, c); an image that could be either layout is taken as (h, w, c).

    Raises:
        InvalidFrameError: `image` is not a uint8 image of one or three channels.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or not {image.shape[0], image.shape[-1]} & {1, 3}:
        raise InvalidFrameError(
            f"An image must be uint8 (h, w, 3) or (3, h, w); got {image.dtype} {image.shape}. Convert "
            f"floats in [0, 1] with (image * 255).round().astype('uint8')."
        )
    return image if image.shape[-1] in (1, 3) else np.moveaxis(image, 0, -1)


def _quantile(counts: np.ndarray, level: np.ndarray, probability: float) -> float:
    """Return `np.quantile` of `counts[i]` copies of each `level[i]`."""
    position = (counts.sum() - 1) * probability
    cumulative = np.cumsum(counts)
    lower, upper = (
        level[np.searchsorted(cumulative, rank, side="right")] for rank in (np.floor(position), np.ceil(position))
    )
    return lower + (upper - lower) * (position - np.floor(position))
