"""FrameTable: the rows of a dataset, read from memory-mapped files."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...errors import DatasetFormatError, DatasetIndexError, DatasetNotFoundError
from ..layouts.files import FilesAt
from ..layouts.metadata import DatasetMetadata
from ..remedies import LEAVE_OUT_FEATURE_OR_EPISODE, ONLY_EPISODES
from .arrow_cache import (
    EPISODE,
    TIME,
    MappedCopy,
    Outline,
    cast_to,
    common_schema,
    copies,
    load_outline,
    resident_pages,
)
from .columns import is_view, kind_of, numbers_of

# Whoever reads at random is given many neighbouring pages too. A process keeps about so many bytes of them, and looks
# after so many rows; the pages stay in the operating system's cache, from which they come back within microseconds.
_KEPT, _ROWS = 2**28, 2**8


class FrameTable:
    """Rows of parquet files, through the memory-mapped Arrow copies in the cache of 🤗 datasets.

    Parquet is compressed and cannot be mapped; its Arrow copy can, so memory does not grow with the dataset. Of a
    dataset of which only some files are read, rows keep the numbers that they have in the whole.

    Args:
        paths (`Sequence[Path]`): the files.
        first_rows (`Sequence[int]`, *optional*): the row of the dataset that each file begins with; by default they
            follow one another.
        rename_map (`Mapping[str, str]`, *optional*): name of a column in the files → the name it has here.
        file_numbers (`np.ndarray`, *optional*): which these are among all files of the dataset; by default the first.

    Raises:
        DatasetNotFoundError: a file is missing.
        DatasetFormatError: a file cannot be read.
        ReadOnlyError: the Arrow copy cannot be written.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        first_rows: Sequence[int] | None = None,
        rename_map: Mapping[str, str] | None = None,
        file_numbers: np.ndarray | None = None,
    ):
        stats = [_stat(path) for path in paths]
        missing = [i for i, found in enumerate(stats) if found is None]
        if missing:
            raise DatasetNotFoundError(
                f"{len(missing)} data file(s) are missing: {', '.join(str(paths[i]) for i in missing[:4])}. Download "
                f"them again, or read the episodes that are there: {ONLY_EPISODES}."
            )
        self.paths = paths
        # Of all files of the dataset, which these are.
        self.file_numbers = np.arange(len(paths)) if file_numbers is None else file_numbers
        self._first_rows = None if first_rows is None else np.asarray(first_rows)
        made = copies(paths, stats)
        self.cache_files = [place for place, _ in made]  # those that are mapped
        self.outlines = [outline for _, outline in made]
        # (files,) how many each holds.
        self.file_rows = np.concatenate([outline.file_rows for outline in self.outlines])
        batches = [outline.batch_rows for outline in self.outlines]
        self._copy_of = np.repeat(np.arange(len(batches)), [len(rows) for rows in batches])  # (batches,)
        self._number_of = np.concatenate([np.arange(len(rows)) for rows in batches])  # (batches,) in its copy
        self._batch_starts = np.cumsum([0, *np.concatenate(batches)])  # (batches + 1,) row of each one's first
        self._size = sum(place.stat().st_size for place in self.cache_files)
        self._open()
        self._schema = common_schema([self._copy(copy).schema for copy in range(len(made))])
        self._names = {(rename_map or {}).get(name, name): name for name in self._schema.names}

    def __len__(self) -> int:
        return int(self._batch_starts[-1])

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def is_whole(self) -> bool:
        """Whether all files of the dataset are here."""
        return self._first_rows is None

    @property
    def schema(self) -> pa.Schema:
        """Every column's type, under the names used here."""
        return pa.schema([self._schema.field(old).with_name(new) for new, old in self._names.items()])

    def recorded_name(self, name: str) -> str:
        """Return what the files call the column `name`."""
        return self._names[name]

    @cached_property
    def outlines(self) -> list[Outline]:
        """What each mapped file holds."""
        return [load_outline(place) for place in self.cache_files]

    def numbers(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the column `name` at `rows`: (*rows.shape, *shape).

        Raises:
            DatasetFormatError: the column holds no numbers of that shape, or nothing in one of these rows.
            DatasetIndexError: a row of a file that is not read.
        """
        here = self._here(np.asarray(rows))
        flat = here.reshape(-1)
        self._keep_small(len(here) if here.ndim else 1)
        result, absent = None, None
        for batch, chosen in self._by_batch(flat):
            values, empty = self._numbers(name, batch, flat[chosen] - self._batch_starts[batch], shape)
            if isinstance(chosen, slice):  # all of them
                result, absent = values, empty
                break
            if result is None:
                result = np.empty((len(flat), *shape), dtype=self._dtype(name, values.dtype))
            result[chosen] = values
            if empty is not None:
                absent = np.zeros(len(flat), dtype=bool) if absent is None else absent
                absent[chosen] = empty
        if absent is not None and absent.any():
            raise self._nothing(name, int(flat[absent.argmax()]))
        return result.reshape(*here.shape, *shape)

    def values(self, name: str, rows: Sequence[int]) -> list:
        """Return the column `name` at `rows` as Python values: strings, or the dictionary of an image.

        Raises:
            DatasetFormatError: there is nothing in one of these rows.
        """
        values = []
        for row in self._here(np.asarray(rows)).tolist():
            batch = int(np.searchsorted(self._batch_starts, row, side="right")) - 1
            value = self._array(name, batch)[row - int(self._batch_starts[batch])].as_py()
            if value is None:
                raise self._nothing(name, row)
            values.append(value)
        return values

    def rows(self, start: int, stop: int) -> pa.Table:
        """Return whole rows that follow one another."""
        start, last = self._here(np.asarray([start, stop - 1])).tolist()
        parts = []
        first, end = (int(np.searchsorted(self._batch_starts, row, side="right")) - 1 for row in (start, last))
        for batch in range(first, end + 1):
            low = max(start - int(self._batch_starts[batch]), 0)
            high = last + 1 - int(self._batch_starts[batch])
            parts.append(pa.Table.from_batches([self._batch(batch)[low:high]]))
        whole = pa.concat_tables(
            part if part.schema == self._schema else cast_to(part, self._schema) for part in parts
        )
        return whole.rename_columns(list(self._names))

    def kind(self, name: str) -> str:
        """Return what the column `name` holds: `number`, `text`, `picture`, or its Arrow type."""
        old = self._names[name]
        schemas = [self._copy(copy).schema for copy in range(len(self.cache_files))]
        return " and ".join(
            dict.fromkeys(kind_of(schema.field(old).type) for schema in schemas if old in schema.names)
        )

    def extremes(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest numbers in the column `name`, each (*shape,) float64."""
        known = [outline.range_of(self._names[name]) for outline in self.outlines]
        if any(each is None or each[0].size != np.prod(shape) for each in known):
            known = [
                (values.min(axis=0), values.max(axis=0), True) for _, values in self._each_batch(name, shape)
            ]  # fmt: skip
        low, high = np.min([low for low, *_ in known], axis=0), np.max([high for _, high, _ in known], axis=0)
        return low.astype(np.float64).reshape(shape), high.astype(np.float64).reshape(shape)

    def not_finite(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the rows whose floats in the column `name` are not all finite, (n,)."""
        known = [outline.range_of(self._names[name]) for outline in self.outlines]
        wrong = [np.zeros(0, dtype=np.int64)]
        if self.kind(name) == "number" and not all(each is not None and each[2] for each in known):
            for first, values in self._each_batch(name, shape):
                if np.issubdtype(values.dtype, np.floating):
                    rows = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
                    wrong.append(self._of_dataset(first + rows))
        return np.concatenate(wrong)

    def bounds(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `episode_index` and `timestamp` at the first and last rows of episodes, each (episodes, 2)."""
        rows = np.stack([first, last], axis=1)
        if self._names.get(EPISODE) == EPISODE and self._names.get(TIME) == TIME:
            found = self._outlined(self._here(rows))
            if found is not None:
                return found
        return self.numbers(EPISODE, rows, ()), self.numbers(TIME, rows, ())

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file that a row of the dataset is in, and its row there."""
        return self._place(int(self._here(np.asarray(row))))

    def release(self) -> None:
        """Give back the pages of the mapped files that have been read: whoever passes through all rows calls it."""
        self._rows_read = 0
        for copy in self._copies.values():
            copy.release()
        self._others = resident_pages()

    # --- where rows are ---------------------------------------------------------------------------------------

    def _by_batch(self, flat: np.ndarray):
        """Yield every batch that rows are in, with their positions among `flat`; a slice where it is but one."""
        batch_of = np.searchsorted(self._batch_starts, flat, side="right") - 1
        if not len(flat):
            yield 0, slice(None)
        elif batch_of[0] == batch_of[-1] and (batch_of == batch_of[0]).all():
            yield int(batch_of[0]), slice(None)
        else:
            order = np.argsort(batch_of, kind="stable")
            cuts = np.flatnonzero(np.diff(batch_of[order])) + 1
            for chosen in np.split(order, cuts):
                yield int(batch_of[chosen[0]]), chosen

    def _place(self, here: int) -> tuple[Path, int]:
        file = int(np.searchsorted(self._file_starts, here, side="right")) - 1
        return self.paths[file], here - int(self._file_starts[file])

    def _nothing(self, name: str, here: int) -> DatasetFormatError:
        path, row = self._place(here)
        return DatasetFormatError(
            f"{name} has no value (null) in row {row} of {path}. {LEAVE_OUT_FEATURE_OR_EPISODE}, or correct the "
            f"recording."
        )

    @cached_property
    def _file_starts(self) -> np.ndarray:
        """(files,) where each file's rows begin among those that are here."""
        return np.cumsum(self.file_rows) - self.file_rows

    def _here(self, rows: np.ndarray) -> np.ndarray:
        """Return where rows of the dataset are among those that are here."""
        here = rows
        if self._first_rows is not None:
            file = np.searchsorted(self._first_rows, rows, side="right") - 1
            in_file = rows - self._first_rows[file]
            here = np.where((file >= 0) & (in_file < self.file_rows[file]), in_file + self._file_starts[file], -1)
        if here.size and not 0 <= here.min() <= here.max() < len(self):
            wrong = rows[(here < 0) | (here >= len(self))].reshape(-1)[0]
            raise DatasetIndexError(f"Row {wrong} is not in the files of the episodes that are read.")
        return here

    def _of_dataset(self, here: np.ndarray) -> np.ndarray:
        if self._first_rows is None:
            return here
        file = np.searchsorted(self._file_starts, here, side="right") - 1
        return here - self._file_starts[file] + self._first_rows[file]

    def _outlined(self, here: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return `bounds` of rows (episodes, 2) as the outlines know them; None where they do not."""
        if not all(outline.has_runs for outline in self.outlines):
            return None
        copy_starts = self._batch_starts[np.searchsorted(self._copy_of, np.arange(len(self.outlines)))]
        starts = [outline.run_rows + start for outline, start in zip(self.outlines, copy_starts, strict=True)]
        starts = np.concatenate(starts)
        ends = np.append(starts[1:], len(self)) - 1
        runs = np.searchsorted(starts, here, side="right") - 1
        # Only the ends of a run are known; an episode that begins within one is not where it should be.
        episodes = np.concatenate([outline.run_episodes for outline in self.outlines])[runs]
        times = np.concatenate([outline.run_times for outline in self.outlines])
        known = (here[:, 0] == starts[runs[:, 0]]) & (here[:, 1] == ends[runs[:, 1]])
        return (episodes, np.stack([times[runs[:, 0], 0], times[runs[:, 1], 1]], axis=1)) if known.all() else None

    # --- what is mapped ---------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._copies: dict[int, MappedCopy] = {}
        self._batches: dict[int, pa.RecordBatch] = {}
        self._views: dict[tuple[str, int], np.ndarray | None] = {}

        self._rows_read, self._others = 0, resident_pages()

    def _keep_small(self, rows: int) -> None:
        """Give back pages of the mapped files before they are too many."""
        self._rows_read += rows
        if self._size > _KEPT and self._rows_read > _ROWS:
            self._rows_read = 0
            if resident_pages() - self._others > _KEPT:
                self.release()

    def _copy(self, copy: int) -> MappedCopy:
        if copy not in self._copies:
            self._copies[copy] = MappedCopy(self.cache_files[copy])
        return self._copies[copy]

    def _batch(self, batch: int) -> pa.RecordBatch:
        if batch not in self._batches:
            self._batches[batch] = self._copy(int(self._copy_of[batch])).batch(int(self._number_of[batch]))
        return self._batches[batch]

    def _array(self, name: str, batch: int) -> pa.Array:
        columns, old = self._batch(batch), self._names[name]
        if old in columns.schema.names:
            return columns[old]
        return pa.nulls(len(columns), self._schema.field(old).type)

    def _numbers(
        self, name: str, batch: int, places: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return rows of one batch as (places, *shape), and which hold nothing."""
        key = name, batch
        if key not in self._views:
            array = self._array(name, batch)
            self._views[key] = numbers_of(name, array, shape)[0] if is_view(array) else None
        view = self._views[key]
        if view is not None and view.shape[1:] == shape:
            return view[places], None
        values, empty = numbers_of(name, self._array(name, batch).take(pa.array(places)), shape)
        return values if values.flags.writeable else values.copy(), empty  # torch takes no other

    def _dtype(self, name: str, of_batch: np.dtype) -> np.dtype:
        """Return the type that holds the numbers of all batches, of which one has `of_batch`."""
        kind = self._schema.field(self._names[name]).type
        if len(self.cache_files) == 1:
            return of_batch
        return numbers_of(name, pa.nulls(0, kind), ())[0].dtype

    def _each_batch(self, name: str, shape: tuple[int, ...]):
        """Yield every batch's first row and its numbers (rows, *shape), one in memory at a time."""
        for batch in range(len(self._copy_of)):
            yield int(self._batch_starts[batch]), numbers_of(name, self._array(name, batch), shape)[0]
            self.release()

    def __getstate__(self) -> dict:
        left_out = {"_copies", "_batches", "_views", "outlines"}  # pickles the names of the mapped files, not rows
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def _stat(path: Path) -> os.stat_result | None:
    """Return what the operating system says of a file; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def open_table(
    metadata: DatasetMetadata, needed: Sequence[str], rename_map: Mapping[str, str] | None = None
) -> FrameTable:
    """Open the data files of a dataset that are `needed`."""
    files = metadata.data_paths.files
    if len(needed) == len(files):
        return FrameTable(FilesAt(metadata.root, files), rename_map=rename_map)
    numbers = metadata.data_paths.numbers_of(needed)
    return FrameTable(FilesAt(metadata.root, files[numbers]), metadata.first_rows[numbers], rename_map, numbers)
