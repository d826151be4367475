"""StreamOrder: in which order a stream reads its samples, known from the metadata alone.

Notation: e episodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_UNSHUFFLED = 10_000  # samples of a block that is not shuffled


class StreamOrder:
    """Order the samples of a dataset so that files are read one after the other, and share them among processes.

    A pass shuffles the files, then the episodes within each file. Where cameras and data have files of different
    lengths, the longer files are shuffled first. Every process gets one run of the resulting samples, which it
    shuffles in blocks of `buffer`.

    ```text
    files   B                A                   C
    samples b3 b3 b1 b1 b2 | a1 a1 a2 a2   a3  | c2 c2 c1 c1      two processes, of 7 samples each; blocks of 4
            ─── block ────   ── block ─── ┊ ─── block ──── ┊
    ```

    Every sample is in exactly one share of a pass, and shares differ by at most one sample. Only whole numbers are
    computed, so to go on in the middle of a pass costs nothing.

    Args:
        lengths (`Sequence[int]`): (e,) samples of every episode.
        files (`Sequence[Sequence]`): for each kind of file, the one that every episode is in, (e,).
        buffer (`int`): samples that are shuffled together; 0 keeps the order of the dataset.
        seed (`int`): of all draws.
        rank, world_size (`int`): which share of how many.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        files: Sequence[Sequence],
        buffer: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths  # (e,) position of each episode's first sample
        self._block, self._seed = buffer or _UNSHUFFLED, (seed if buffer else None)
        self._rank = rank
        numbered = [np.unique(np.asarray(of_kind), return_inverse=True)[1] for of_kind in files]
        self._files = sorted(numbered, key=lambda of_kind: -of_kind.max())  # those with most files first
        total = int(self._lengths.sum())
        self._first, self._end = rank * total // world_size, (rank + 1) * total // world_size
        self._pass: tuple[int, np.ndarray, np.ndarray] | None = None
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        """Samples of this share in one pass."""
        return self._end - self._first

    def block_of(self, number: int) -> tuple[int, int]:
        """Return the pass of sample `number` of an endless stream, and the block of that pass."""
        turn, within = divmod(number, len(self))
        return turn, within // self._block

    def next_block(self, turn: int, block: int) -> tuple[int, int]:
        """Return pass and block that follow."""
        return (turn, block + 1) if (block + 1) * self._block < len(self) else (turn + 1, 0)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in the dataset of samples start … stop - 1 of an endless stream."""
        found = []
        while start < stop:
            turn, block = self.block_of(start)
            first = turn * len(self) + block * self._block
            positions = self.block(turn, block)[start - first : stop - first]
            found.append(positions)
            start += len(positions)
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def block(self, turn: int, block: int) -> np.ndarray:
        """Return the positions in the dataset of one block of a pass, in the order in which they are read."""
        if self._last is None or self._last[0] != (turn, block):
            self._last = (turn, block), self._shuffled(turn, block)
        return self._last[1]

    def _shuffled(self, turn: int, block: int) -> np.ndarray:
        order, ends = self._episodes(turn)
        start = self._first + block * self._block
        samples = np.arange(start, min(start + self._block, self._end))
        places = np.searchsorted(ends, samples, side="right")  # which of the episodes in order
        episodes = order[places]
        positions = self._starts[episodes] + samples - (ends[places] - self._lengths[episodes])
        if self._seed is None:
            return positions
        return np.random.default_rng((self._seed, turn, self._rank, block)).permutation(positions)

    def _episodes(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the episodes of a pass in order, (e,), and where each ends among its samples, (e,)."""
        if self._pass is None or self._pass[0] != turn:
            order = np.arange(len(self._lengths))
            if self._seed is not None:
                draws = np.random.default_rng((self._seed, turn))
                within = draws.random(len(order))
                ranks = [draws.permutation(of_kind.max() + 1)[of_kind] for of_kind in self._files]
                order = np.lexsort((within, *ranks))  # by the last first
            self._pass = turn, order, np.cumsum(self._lengths[order])
        return self._pass[1:]
