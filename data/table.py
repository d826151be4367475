"""FrameTable: the rows of a dataset, read from memory-mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DatasetFormatError, DatasetNotFoundError

_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


class FrameTable:
    """Rows of parquet files, through the memory-mapped Arrow copy that 🤗 datasets keeps in its cache.

    Parquet is compressed and cannot be mapped; its Arrow copy can, so memory does not grow with the dataset.

    Raises:
        DatasetNotFoundError: a file is missing.
        DatasetFormatError: a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path]):
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise DatasetNotFoundError(
                f"{len(missing)} data file(s) are missing: {', '.join(missing[:4])}. Download them again."
            )
        self._dataset = _memory_mapped(paths)
        self._columns: dict[str, _Column] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __contains__(self, name: str) -> bool:
        return name in self._dataset.column_names

    @property
    def cache_files(self) -> list[Path]:
        """The memory-mapped files."""
        return [Path(entry["filename"]) for entry in self._dataset.cache_files]

    def numbers(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the column `name` at `rows`: (*rows.shape, *shape)."""
        return self._column(name).numbers(rows, shape)

    def values(self, name: str, rows: Sequence[int]) -> list:
        """Return the column `name` at `rows` as Python values: strings, or the dictionary of an image."""
        column = self._column(name).data
        return [column[int(row)].as_py() for row in rows]

    def rows(self, start: int, stop: int) -> pa.Table:
        """Return whole rows, with the types of 🤗 datasets in the schema's metadata."""
        return self._dataset.with_format("arrow")[start:stop]

    def chunks(self, name: str) -> list[pa.Array]:
        """Return the column `name` as the mapped parts it consists of."""
        return self._column(name).data.chunks

    def first_not_finite(self, name: str) -> int | None:
        """Return the first row whose floats in the column `name` are not all finite; None if there is none."""
        start = 0
        for chunk in self.chunks(name):
            values = as_numpy(name, chunk, (-1,)) if len(chunk) else np.zeros((0, 1))
            if not np.issubdtype(values.dtype, np.floating):
                return None
            wrong = np.flatnonzero(~np.all(np.isfinite(values), axis=1))
            if wrong.size:
                return start + int(wrong[0])
            start += len(chunk)
        return None

    def _column(self, name: str) -> _Column:
        if name not in self._columns:
            self._columns[name] = _Column(name, self._dataset.data.column(name))
        return self._columns[name]

    def __getstate__(self) -> dict:
        return {"_dataset": self._dataset, "_columns": {}}  # pickles the names of the mapped files, not rows


class _Column:
    """One column and the views of its chunks, made when first used."""

    def __init__(self, name: str, data: pa.ChunkedArray):
        self.name, self.data = name, data
        lengths = [len(chunk) for chunk in data.chunks]
        self._starts = np.cumsum([0, *lengths[:-1]])  # (chunks,) row of each chunk's first
        self._views: dict[int, np.ndarray] = {}

    def numbers(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        flat = rows.reshape(-1)
        chunk_of = np.searchsorted(self._starts, flat, side="right") - 1
        result = None
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            view = self._view(int(chunk), shape)  # (rows of the chunk, *shape)
            if result is None:
                result = np.empty((len(flat), *shape), dtype=view.dtype)
            result[here] = view[flat[here] - self._starts[chunk]]
        return result.reshape(*rows.shape, *shape)

    def _view(self, chunk: int, shape: tuple[int, ...]) -> np.ndarray:
        if chunk not in self._views:
            self._views[chunk] = as_numpy(self.name, self.data.chunk(chunk), shape)
        return self._views[chunk]


def as_numpy(name: str, array: pa.Array, shape: tuple[int, ...]) -> np.ndarray:
    """Return a column's rows as (rows, *shape), a view of Arrow's own memory except for booleans.

    Raises:
        DatasetFormatError: the rows are not numbers of that shape.
    """
    count = len(array)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while any(is_kind(array.type) for is_kind in _LISTS):
        array = array.flatten()
    try:
        # Arrow packs eight booleans into a byte; every other type is mapped, not copied.
        return array.to_numpy(zero_copy_only=False).reshape(count, *shape)
    except (ValueError, pa.ArrowException) as error:
        raise DatasetFormatError(
            f"The column {name!r} does not hold numbers of shape {shape} in every row, as meta/info.json "
            f"says: {error}. Leave it out with features=[…]."
        ) from error


def _memory_mapped(paths: Sequence[Path]) -> datasets.Dataset:
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        return datasets.Dataset.from_parquet([str(path) for path in paths])
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError) as error:
        reason = error.__cause__ or error
        raise DatasetFormatError(_unreadable(paths, reason)) from error
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


def _unreadable(paths: Sequence[Path], reason: object) -> str:
    """Return a message that names the unreadable data file, where a single one causes the error."""
    for path in paths:
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            return f"{path} cannot be read as a parquet file: {error}. Download or write it again."
    return (
        f"The data files beside {paths[0]} cannot be read together: {reason}. Their columns may differ from file to "
        f"file; download or write the dataset again."
    )
