"""FrameTable: the rows of a dataset, read from memory-mapped files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DatasetFormatError, DatasetNotFoundError
from .arrow_cache import memory_mapped
from .layouts.metadata import DatasetMetadata
from .remedies import LEAVE_OUT_FEATURE, LEAVE_OUT_FEATURE_OR_EPISODE, ONLY_EPISODES

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TEXTS = (pa.types.is_string, pa.types.is_large_string)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_struct)


class FrameTable:
    """Rows of parquet files, through the memory-mapped Arrow copy that 🤗 datasets keeps in its cache.

    Parquet is compressed and cannot be mapped; its Arrow copy can, so memory does not grow with the dataset. Of a
    dataset whose files are not all here, rows keep the numbers that they have in the whole.

    Args:
        paths (`Sequence[Path]`): the files.
        first_rows (`Sequence[int]`, *optional*): the row of the dataset that each file begins with; by default they
            follow one another.
        rename_map (`Mapping[str, str]`, *optional*): name of a column in the files → the name it has here.

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
    ):
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise DatasetNotFoundError(
                f"{len(missing)} data file(s) are missing: {', '.join(missing[:4])}. Download them again, or read the "
                f"episodes that are there: {ONLY_EPISODES}."
            )
        self.paths = list(paths)
        self._dataset = memory_mapped(paths)
        renamed = {old: new for old, new in (rename_map or {}).items() if old in self._dataset.column_names}
        if renamed:
            self._dataset = self._dataset.rename_columns(renamed)
        self._first_rows = None if first_rows is None else np.asarray(first_rows)
        self._columns: dict[str, _Column] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __contains__(self, name: str) -> bool:
        return name in self._dataset.column_names

    @property
    def is_whole(self) -> bool:
        """Whether all files of the dataset are here."""
        return self._first_rows is None

    @property
    def cache_files(self) -> list[Path]:
        """The memory-mapped files."""
        return [Path(entry["filename"]) for entry in self._dataset.cache_files]

    def numbers(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the column `name` at `rows`: (*rows.shape, *shape).

        Raises:
            DatasetFormatError: the column holds no numbers of that shape, or nothing in one of these rows.
        """
        here = self._here(rows)
        values, empty = self._column(name).numbers(here, shape)
        if empty is not None:
            raise self._nothing(name, int(here.reshape(-1)[empty]))
        return values

    def values(self, name: str, rows: Sequence[int]) -> list:
        """Return the column `name` at `rows` as Python values: strings, or the dictionary of an image.

        Raises:
            DatasetFormatError: there is nothing in one of these rows.
        """
        column = self._column(name).data
        here = self._here(np.asarray(rows)).tolist()
        values = [column[row].as_py() for row in here]
        if None in values:
            raise self._nothing(name, here[values.index(None)])
        return values

    def rows(self, start: int, stop: int) -> pa.Table:
        """Return whole rows, with the types of 🤗 datasets in the schema's metadata."""
        start, last = self._here(np.asarray([start, stop - 1])).tolist()
        return self._dataset.with_format("arrow")[start : last + 1]

    def kind(self, name: str) -> str:
        """Return what the column `name` holds: `number`, `text`, `picture`, or its Arrow type."""
        return kind_of(self._column(name).data.type)

    def extremes(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the largest numbers in the column `name`, each (*shape,) float64."""
        chunks = [_numbers(name, chunk, shape)[0] for chunk in self._column(name).data.chunks if len(chunk)]
        low, high = np.min([c.min(axis=0) for c in chunks], axis=0), np.max([c.max(axis=0) for c in chunks], axis=0)
        return low.astype(np.float64), high.astype(np.float64)

    def not_finite(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the rows whose floats in the column `name` are not all finite, (n,)."""
        start, wrong = 0, []
        for chunk in self._column(name).data.chunks if self.kind(name) == "number" else ():
            values, _ = _numbers(name, chunk, shape)
            if np.issubdtype(values.dtype, np.floating):
                finite = np.isfinite(values).reshape(len(chunk), -1).all(axis=1) if len(chunk) else np.ones(0, bool)
                wrong += [self._row_of_dataset(start + row) for row in np.flatnonzero(~finite).tolist()]
            start += len(chunk)
        return np.asarray(wrong, dtype=np.int64)

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file that a row of the dataset is in, and its row there."""
        return self._place(int(self._here(np.asarray(row))))

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
        return np.cumsum([0, *(pq.read_metadata(path).num_rows for path in self.paths[:-1])])

    def _here(self, rows: np.ndarray) -> np.ndarray:
        """Return where rows of the dataset are among those that are here."""
        if self._first_rows is None:
            return rows
        file = np.searchsorted(self._first_rows, rows, side="right") - 1
        return rows - self._first_rows[file] + self._file_starts[file]

    def _row_of_dataset(self, here: int) -> int:
        if self._first_rows is None:
            return here
        file = int(np.searchsorted(self._file_starts, here, side="right")) - 1
        return here - int(self._file_starts[file]) + int(self._first_rows[file])

    def _column(self, name: str) -> _Column:
        if name not in self._columns:
            self._columns[name] = _Column(name, self._dataset.data.column(name))
        return self._columns[name]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_columns": {}}  # pickles the names of the mapped files, not rows


class _Column:
    """One column and the views of its chunks, made when first used."""

    def __init__(self, name: str, data: pa.ChunkedArray):
        self.name, self.data = name, data
        lengths = [len(chunk) for chunk in data.chunks]
        self._starts = np.cumsum([0, *lengths[:-1]])  # (chunks,) row of each chunk's first
        self._views: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}

    def numbers(self, rows: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, int | None]:
        """Return (*rows.shape, *shape), and the first position in the flat `rows` where nothing is stored."""
        flat = rows.reshape(-1)
        chunk_of = np.searchsorted(self._starts, flat, side="right") - 1
        result, absent = None, np.zeros(len(flat), dtype=bool)
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            view, empty = self._view(int(chunk), shape)  # (rows of the chunk, *shape)
            places = flat[here] - self._starts[chunk]
            if result is None:
                result = np.empty((len(flat), *shape), dtype=view.dtype)
            result[here] = view[places]
            if empty is not None:
                absent[here] = empty[places]
        first = int(absent.argmax()) if absent.any() else None
        return result.reshape(*rows.shape, *shape), first

    def _view(self, chunk: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
        if chunk not in self._views:
            self._views[chunk] = _numbers(self.name, self.data.chunk(chunk), shape)
        return self._views[chunk]


def open_table(
    metadata: DatasetMetadata, needed: Sequence[str], rename_map: Mapping[str, str] | None = None
) -> FrameTable:
    """Open the data files of a dataset: all of them, or, where some are not there, those that are `needed`."""
    every = metadata.data_files
    if all((metadata.root / path).is_file() for path in every):
        return FrameTable([metadata.root / path for path in every], rename_map=rename_map)
    starts = [metadata.first_row(path) for path in needed]
    return FrameTable([metadata.root / path for path in needed], starts, rename_map)


def kind_of(kind: pa.DataType) -> str:
    """Return what a column of a type holds: `number`, `text`, `picture`, or its Arrow type."""
    kind = _stored(kind)
    while any(is_kind(kind) for is_kind in _LISTS):
        kind = _stored(kind.value_type)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return "number"
    if any(is_kind(kind) for is_kind in _TEXTS):
        return "text"
    return "picture" if any(is_kind(kind) for is_kind in _BYTES) else str(kind)


def as_numpy(name: str, array: pa.Array, shape: tuple[int, ...]) -> np.ndarray:
    """Return a column's rows as (rows, *shape), a view of Arrow's own memory except for booleans.

    Raises:
        DatasetFormatError: the rows are not numbers of that shape.
    """
    return _numbers(name, array, shape)[0]


def _numbers(name: str, array: pa.Array, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a column's rows as (rows, *shape), and which hold nothing where a number cannot say so; None: all do.

    Nothing in place of a float is NaN.
    """
    rows, has_nulls = array, False
    array = _storage(array)
    while any(is_kind(array.type) for is_kind in _LISTS):
        has_nulls |= array.null_count > 0
        if not has_nulls and not pa.types.is_fixed_size_list(array.type):
            lengths = np.unique(np.diff(array.offsets.to_numpy()))
            if len(lengths) > 1:  # in sum they might fit
                raise _other_shape(name, shape, f"lists of {lengths[0]} to {lengths[-1]} are in it")
        array = _storage(array.flatten())
    if has_nulls or array.null_count:
        return _with_nulls(name, rows, array.type, shape)
    try:
        # Arrow packs eight booleans into a byte; every other type is mapped, not copied.
        values = array.to_numpy(zero_copy_only=False)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"they hold {array.type}")
        return values.reshape(len(rows), *shape), None
    except (ValueError, NotImplementedError, pa.ArrowException) as error:
        raise _other_shape(name, shape, error) from error


def _with_nulls(
    name: str, rows: pa.Array, kind: pa.DataType, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        dtype = kind.to_pandas_dtype()
        is_float = np.issubdtype(dtype, np.floating)
        items = rows.to_pylist()
        stored = next((np.shape(item) for item in items if item is not None), shape)  # () of plain numbers
        filled = [_filled(item, stored, np.nan if is_float else 0) for item in items]
        values = np.asarray([item for item, _ in filled], dtype=dtype).reshape(len(rows), *shape)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _other_shape(name, shape, error) from error
    return values, None if is_float else np.asarray([empty for _, empty in filled])


def _filled(item: object, shape: tuple[int, ...], stand_in: float) -> tuple[object, bool]:
    """Return one row with a stand-in for every null, and whether it had one."""
    if item is None:
        return np.full(shape, stand_in).tolist(), True
    if isinstance(item, list):
        filled = [_filled(inner, shape[1:], stand_in) for inner in item]
        return [inner for inner, _ in filled], any(empty for _, empty in filled)
    return item, False


def _other_shape(name: str, shape: tuple[int, ...], reason: object) -> DatasetFormatError:
    return DatasetFormatError(
        f"The column {name!r} does not hold numbers of shape {shape} in every row, as meta/info.json says: {reason}. "
        f"{LEAVE_OUT_FEATURE}."
    )


def _storage(array: pa.Array) -> pa.Array:
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _stored(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.ExtensionType) else kind
