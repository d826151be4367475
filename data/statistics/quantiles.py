"""Exact quantiles of numbers that do not fit into memory: their digits are counted in several passes.

Every number becomes a whole number of the same order. A pass counts, for each quantile, the next digit of those
numbers that begin like it; after the last one all digits are known. Memory is that of the counts, however many numbers
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

_EXACT = 2**53  # whole numbers below it are the same in float64
_NARROW = 32  # dimensions up to which a digit has 16 bits; those of wider numbers have 8, in twice as many passes


def quantiles_of_blocks(
    blocks: Callable[[], Iterable[np.ndarray]], count: int, ends: np.ndarray, probabilities: Sequence[float]
) -> np.ndarray:
    """Return (probabilities, d) quantiles as `np.quantile` does, in float64, interpolated linearly.

    Args:
        blocks: called for every pass; yields the same numbers each time, (n, d) in arrays of one type.
        count: n of all blocks together.
        ends: (2, d) the least and the largest number, in float64.
        probabilities: each in [0, 1].
    """
    places = (count - 1) * np.asarray(probabilities)  # as np.quantile counts them
    lower = np.floor(places).astype(np.int64)
    upper = np.minimum(lower + 1, count - 1)
    ranks = np.unique(np.concatenate([lower, upper]))
    values = _of_ranks(blocks, ranks, ends)  # (ranks, d)
    low, high = values[np.searchsorted(ranks, lower)], values[np.searchsorted(ranks, upper)]
    return interpolated(low, high, (places - lower)[:, None])


def interpolated(low: np.ndarray, high: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the number at `part` of the way from `low` to `high`, rounded as `np.quantile` rounds it."""
    difference = high - low
    return np.where(part < 0.5, low + difference * part, high - difference * (1 - part))


def _of_ranks(blocks: Callable[[], Iterable[np.ndarray]], ranks: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the numbers that stand at `ranks` in ascending order, (ranks, d) float64."""
    search = None
    while search is None or search.shift > 0:
        for block in blocks():
            search = search or _Search(ranks, block.dtype, ends)
            search.count(_keys(block))
        search.narrow()
    return _numbers(search.begins, search.kind)


class _Search:
    """The digits found so far of the numbers at some ranks, in d dimensions.

    Args:
        ranks: (ranks,) places among the numbers in ascending order.
        kind: the numbers' type.
        ends: (2, d) the least and the largest of them.
    """

    def __init__(self, ranks: np.ndarray, kind: np.dtype, ends: np.ndarray):
        is_exact = np.abs(ends).max() < _EXACT
        least, largest = _keys((ends if is_exact else np.zeros_like(ends)).astype(kind)).T  # (d,) each
        bits = 8 * least.itemsize
        self.kind, self._digit = kind, min(16 if len(least) <= _NARROW else 8, bits)
        if is_exact:  # all numbers begin with what both have in common
            bits = int((least ^ largest).max()).bit_length()
        self.shift = -(-bits // self._digit) * self._digit  # bits that are still unknown
        common = [int(key) >> self.shift for key in least]
        self.begins = np.tile(np.asarray(common, dtype=np.uint64), (len(ranks), 1))  # (ranks, d)
        self._left = np.repeat(ranks[:, None], len(least), axis=1)  # (ranks, d) the rank among those that begin alike
        self._counts = self._nothing()
        self._all_begin_alike = True

    def count(self, keys: np.ndarray) -> None:
        """Count the next digits of `keys` (d, n)."""
        if not self.shift:  # all numbers are the same
            return
        number = keys.dtype.type
        digits = ((keys >> number(self.shift - self._digit)) & number(2**self._digit - 1)).astype(np.intp)
        for j, counts in enumerate(self._counts):
            if self._all_begin_alike:
                (found,) = counts.values()
                found += np.bincount(digits[j], minlength=2**self._digit)
                continue
            begins = keys[j] >> number(self.shift)
            for begin, found in counts.items():
                found += np.bincount(digits[j][begins == begin], minlength=2**self._digit)

    def narrow(self) -> None:
        """Take the counted digit of every number sought."""
        if not self.shift:
            return
        for j, counts in enumerate(self._counts):
            sums = {begin: np.cumsum(found) for begin, found in counts.items()}
            for i, begin in enumerate(self.begins[:, j].tolist()):
                digit = int(np.searchsorted(sums[begin], self._left[i, j], side="right"))
                self._left[i, j] -= sums[begin][digit - 1] if digit else 0
                self.begins[i, j] = begin << self._digit | digit
        self.shift -= self._digit
        self._counts, self._all_begin_alike = self._nothing(), False

    def _nothing(self) -> list[dict[int, np.ndarray]]:
        """Return counts of 0 for every beginning, per dimension."""
        return [
            {begin: np.zeros(2**self._digit, dtype=np.int64) for begin in dict.fromkeys(column.tolist())}
            for column in self.begins.T
        ]


def _keys(block: np.ndarray) -> np.ndarray:
    """Return whole numbers without a sign in the order of the numbers of a block (n, d), as (d, n)."""
    block = np.ascontiguousarray(block.astype(_countable(block.dtype), copy=False).T)
    bits = block.view(f"u{block.dtype.itemsize}")
    sign = _sign(bits.dtype)
    if block.dtype.kind == "f":
        return np.where(bits & sign, ~bits, bits | sign)
    return bits ^ sign if block.dtype.kind == "i" else bits


def _numbers(keys: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Return the numbers of a type that `_keys` made whole numbers of, as float64."""
    kind = _countable(kind)
    bits = keys.astype(f"u{kind.itemsize}")
    sign = _sign(bits.dtype)
    if kind.kind == "f":
        bits = np.where(bits & sign, bits ^ sign, ~bits)
    elif kind.kind == "i":
        bits = bits ^ sign
    return bits.view(kind).astype(np.float64)


def _countable(kind: np.dtype) -> np.dtype:
    """Return the type of 8 to 64 bits that holds the numbers of `kind`."""
    if kind.kind == "b":
        return np.dtype(np.uint8)
    if kind.kind == "f":
        return np.dtype(np.float32 if kind.itemsize <= 4 else np.float64)
    return kind


def _sign(kind: np.dtype) -> np.unsignedinteger:
    return kind.type(1 << (8 * kind.itemsize - 1))
