"""The memory-mapped Arrow copy of parquet files, and the outline of what it holds.

Parquet is compressed and cannot be mapped. The copy can, and consists of few large record batches however many row
groups the files have, so that opening it costs the same for ten episodes and for a hundred thousand. Its outline holds
what every opening compares with the metadata; none of the rows is read again for it.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock, are_progress_bars_disabled
from tqdm import tqdm

from ..._disk import naming_disk_errors
from ...errors import DatasetFormatError, DiskError
from .columns import kind_of, numbers_of, stored, stored_type
from .fingerprint import remembered_fingerprint

EPISODE, TIME = "episode_index", "timestamp"
_FORM = "1"  # of copy and outline; another one has another name
_FILES_BYTES = 64 * 2**20  # small files share a copy of about so many bytes, a larger file has its own
_BATCH_BYTES, _BATCH_ROWS = 64 * 2**20, 2**20  # of a record batch, the largest
_READ_ROWS = 2**16  # read at once
_MENTIONED_AFTER = 2.0  # seconds that a copy takes before a progress bar appears [s]


@dataclass(frozen=True, eq=False)
class Outline:
    """What the rows of a copy hold. A run is a series of rows with the same `episode_index`."""

    file_rows: np.ndarray  # (files,) rows of every parquet file
    batch_rows: np.ndarray  # (batches,) rows of every record batch
    run_rows: np.ndarray  # (runs,) the row that each run begins with
    run_episodes: np.ndarray  # (runs,) its `episode_index`
    run_times: np.ndarray  # (runs, 2) the timestamps of its first and last row
    has_runs: np.ndarray  # () whether the two columns are numbers in every row; without, there are no runs
    columns: np.ndarray  # (columns,) the names of those that hold numbers of one shape
    low: np.ndarray  # (values of all these columns,) the least of each, NaN left out
    high: np.ndarray  # the same of the largest
    widths: np.ndarray  # (columns,) how many values each has in a row
    finite: np.ndarray  # (columns,) whether all its floats are finite

    def range_of(self, column: str) -> tuple[np.ndarray, np.ndarray, bool] | None:
        """Return the least and the largest values of a column, and whether all are finite; None if not known."""
        found = np.flatnonzero(self.columns == column)
        if not found.size:
            return None
        first = int(self.widths[: found[0]].sum())
        place = slice(first, first + int(self.widths[found[0]]))
        return self.low[place], self.high[place], bool(self.finite[found[0]])


def copies(paths: Sequence[Path], stats: Sequence[os.stat_result]) -> list[tuple[Path, Outline]]:
    """Return the Arrow copies of parquet files, in their order, each made once.

    Args:
        paths: the files.
        stats: what the operating system says of each.

    Raises:
        DatasetFormatError: a file cannot be read.
        ReadOnlyError, DiskFullError: a copy cannot be written.
    """
    folder = cache_folder() / "manipulators"
    groups = _groups([stat.st_size for stat in stats])
    try:
        with naming_disk_errors(folder, remedy="another folder: HF_DATASETS_CACHE=<folder> in the environment"):
            memory = folder / "fingerprints"
            names = [remembered_fingerprint(paths[group], stats[group], _FORM, memory) for group in groups]
            places = [folder / f"{name}.arrow" for name in names]
            outlines = [_outline_of_whole(place) for place in places]
            absent = [i for i, outline in enumerate(outlines) if outline is None]
            if absent:
                folder.mkdir(parents=True, exist_ok=True)
            for i in _shown(absent):
                outlines[i] = _make(places[i], paths[groups[i]])
            return list(zip(places, outlines, strict=True))
    except DiskError:
        raise
    except (pa.ArrowException, ValueError, TypeError, KeyError, OSError) as error:
        raise DatasetFormatError(_unreadable(paths, error.__cause__ or error)) from error


def cache_folder() -> Path:
    """Return the cache of 🤗 datasets, as its environment variables or a program that has imported it say."""
    if "datasets" in sys.modules:
        return Path(sys.modules["datasets"].config.HF_DATASETS_CACHE)
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")).expanduser()


class MappedCopy:
    """The record batches of a copy, mapped into memory."""

    def __init__(self, place: Path):
        with place.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._batches = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._memory)))
        self.schema = self._batches.schema

    def batch(self, number: int) -> pa.RecordBatch:
        """Return a record batch whose arrays are views of the mapped file."""
        return self._batches.get_batch(number)

    def release(self) -> None:
        """Give back the pages that have been read, which are the file's own; views stay, and read them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)


def resident_pages() -> int:
    """Return how many bytes of mapped files this process has in memory; 0 where the operating system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def _groups(sizes: Sequence[int]) -> list[slice]:
    """Divide files into groups that share a copy; a large file is alone, whichever of the others are read."""
    groups, first, size = [], 0, 0
    for i, own in enumerate(sizes):
        if i > first and size + own > _FILES_BYTES:
            groups.append(slice(first, i))
            first, size = i, 0
        size += own
    return [*groups, slice(first, len(sizes))]


def _shown(absent: Iterable[int]) -> Iterable[int]:
    """Show how many copies are made, if it takes a while."""
    off = are_progress_bars_disabled() or None  # None: where there is no terminal
    return tqdm(absent, "preparing data files", delay=_MENTIONED_AFTER, leave=False, disable=off)


def _outline_of_whole(place: Path) -> Outline | None:
    """Return the outline of a copy; None if there is none, or what a power cut has left of it."""
    try:
        MappedCopy(place)  # its end is read, which is written last
        return load_outline(place)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, pa.ArrowException):
        return None


def _outline_file(place: Path) -> Path:
    return place.with_suffix(".npz")


def load_outline(place: Path) -> Outline:
    """Read the outline of a copy."""
    with np.load(_outline_file(place)) as arrays:
        return Outline(**{field.name: arrays[field.name] for field in fields(Outline)})


# --- making a copy --------------------------------------------------------------------------------------------


def _make(place: Path, paths: Sequence[Path]) -> Outline:
    """Write the copy of `paths` and return its outline; both appear complete or not at all."""
    lock = place.with_suffix(".lock")
    with WeakFileLock(lock):
        outline = _outline_of_whole(place)
        if outline is None:  # otherwise another process has made it meanwhile
            part = place.with_suffix(f".{os.getpid()}.part")
            part_outline = part.with_suffix(".npz")
            try:
                outline = _write(part, paths)
                with part_outline.open("wb") as file:
                    np.savez(file, **asdict(outline))
                part_outline.replace(_outline_file(place))
                part.replace(place)
            finally:
                part.unlink(missing_ok=True)
                part_outline.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    return outline


def _write(part: Path, paths: Sequence[Path]) -> Outline:
    schema, notes = common_schema([pq.read_schema(path) for path in paths]), _Notes()
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in _large(_read(paths, schema, notes)):
            writer.write_batch(batch)
            notes.add_batch(batch)
    return notes.outline()


def _read(paths: Sequence[Path], schema: pa.Schema, notes: _Notes) -> Iterator[pa.Table]:
    """Yield the rows of all files with the columns and types of `schema`."""
    for path in paths:
        rows = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_rows_at_once(file.metadata)):
                rows += len(batch)
                yield cast_to(pa.Table.from_batches([batch]), schema)
        notes.file_rows.append(rows)


def _rows_at_once(file: pq.FileMetaData) -> int:
    """Return how many rows of a file are read together: few, where pictures are in them."""
    size = sum(file.row_group(i).total_byte_size for i in range(file.num_row_groups))
    return max(1, min(_READ_ROWS, _BATCH_BYTES * file.num_rows // max(size, 1)))


def _large(tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Join tables into record batches of about the largest size."""
    waiting, rows, size = [], 0, 0
    for table in tables:
        waiting.append(table)
        rows, size = rows + len(table), size + table.nbytes
        if rows >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield from pa.concat_tables(waiting).combine_chunks().to_batches()
            waiting, rows, size = [], 0, 0
    if rows:
        yield from pa.concat_tables(waiting).combine_chunks().to_batches()


class _Notes:
    """Collect the outline while the batches of a copy pass by."""

    def __init__(self):
        self.file_rows: list[int] = []
        self._batch_rows: list[int] = []
        self._runs: list[tuple[np.ndarray, ...]] | None = []  # rows, episodes, first and last times
        self._ranges: dict[str, tuple[np.ndarray, np.ndarray, bool]] = {}
        self._unknown: set[str] = set()  # columns without a range

    def add_batch(self, batch: pa.RecordBatch) -> None:
        first = sum(self._batch_rows)
        self._batch_rows.append(len(batch))
        numbers = {}
        for name in batch.schema.names:
            if name in self._unknown:
                continue
            values = _flat_numbers(batch[name])
            known = self._ranges.get(name)
            if values is None or (known is not None and len(known[0]) != values.shape[1]):
                self._unknown.add(name)
                self._ranges.pop(name, None)
                continue
            numbers[name] = values
            low, high, finite = _range(values)
            if known is not None:
                low, high, finite = np.fmin(low, known[0]), np.fmax(high, known[1]), finite and known[2]
            self._ranges[name] = low, high, finite
        self._add_runs(first, numbers.get(EPISODE), numbers.get(TIME))

    def _add_runs(self, first: int, episodes: np.ndarray | None, times: np.ndarray | None) -> None:
        if self._runs is None:
            return
        if any(column is None or column.shape[1] != 1 for column in (episodes, times)):
            self._runs = None
            return
        episodes, times = episodes[:, 0], times[:, 0]
        starts = np.flatnonzero(np.concatenate([[True], episodes[1:] != episodes[:-1]]))
        ends = np.append(starts[1:], len(episodes)) - 1
        self._runs.append((starts + first, episodes[starts], times[starts], times[ends]))

    def outline(self) -> Outline:
        rows, episodes, *times = (
            [np.concatenate(parts) for parts in zip(*self._runs, strict=True)]
            if self._runs
            else [np.zeros(0, np.int64)] * 2 + [np.zeros(0)] * 2
        )
        # A run that goes on in the next batch is one.
        begins = np.concatenate([[True], episodes[1:] != episodes[:-1]])[: len(rows)]
        ends = np.append(begins[1:], True)[: len(rows)]
        ranges = list(self._ranges.values())
        return Outline(
            file_rows=np.asarray(self.file_rows, np.int64),
            batch_rows=np.asarray(self._batch_rows, np.int64),
            run_rows=rows[begins],
            run_episodes=episodes[begins],
            run_times=np.stack([times[0][begins], times[1][ends]], axis=1),
            has_runs=np.asarray(self._runs is not None),
            columns=np.asarray(list(self._ranges), np.str_),
            low=np.concatenate([np.zeros(0), *(low for low, _, _ in ranges)]),
            high=np.concatenate([np.zeros(0), *(high for _, high, _ in ranges)]),
            widths=np.asarray([len(low) for low, _, _ in ranges], np.int64),
            finite=np.asarray([finite for *_, finite in ranges], bool),
        )


def _flat_numbers(column: pa.Array) -> np.ndarray | None:
    """Return a column as (rows, values of a row); None where it holds something else, or nothing in some row."""
    if kind_of(column.type) != "number":
        return None
    try:
        values, empty = numbers_of("", column, (-1,))
    except DatasetFormatError:  # lists of different lengths
        return None
    return values if empty is None else None


def _range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the least and the largest of every dimension as float64, and whether all floats are finite."""
    low, high = (np.asarray(end(values, axis=0), np.float64) for end in (np.fmin.reduce, np.fmax.reduce))
    finite = True
    if np.issubdtype(values.dtype, np.floating):
        finite = bool(np.isfinite(low).all() and np.isfinite(high).all() and not np.isnan(values.max(axis=0)).any())
    return low, high, finite


# --- the columns of all files ---------------------------------------------------------------------------------


def common_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return the columns of all schemas: of one whose type differs, the type that holds all."""
    types: dict[str, dict[pa.DataType, None]] = {}  # column → its types
    for schema in schemas:
        for field in schema:
            types.setdefault(field.name, {})[stored_type(field.type)] = None
    return pa.schema([(name, _common_type(name, list(found))) for name, found in types.items()])


def _common_type(name: str, types: list[pa.DataType]) -> pa.DataType:
    if len(types) == 1:
        return types[0]
    for candidates in (types, [_without_length(kind) for kind in types]):
        fields = [pa.schema([pa.field(name, kind)]) for kind in candidates]
        with suppress(pa.ArrowException):
            return pa.unify_schemas(fields, promote_options="permissive").field(name).type
    return types[0]  # to which the files are cast


def cast_to(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with the columns and types of `schema`; a column that it lacks holds nothing."""
    arrays = []
    for field in schema:
        if field.name not in table.column_names:
            arrays.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name]
        column = pa.chunked_array([stored(chunk) for chunk in column.chunks], stored_type(column.type))
        arrays.append(column if column.type == field.type else column.cast(field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _without_length(kind: pa.DataType) -> pa.DataType:
    return pa.list_(_without_length(kind.value_type)) if pa.types.is_fixed_size_list(kind) else kind


def _unreadable(paths: Sequence[Path], reason: object) -> str:
    """Return a message that names the unreadable data file, where a single one causes the error."""
    for path in paths:
        try:
            for _ in pq.ParquetFile(path).iter_batches():
                pass
        except (pa.ArrowException, OSError, ValueError) as error:
            return f"{path} cannot be read as a parquet file: {error}. Download or write it again."
    return (
        f"The data files beside {paths[0]} cannot be read together: {reason}. Their columns may differ from file to "
        f"file; download or write the dataset again."
    )
