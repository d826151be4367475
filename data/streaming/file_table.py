"""FileTable: the rows of one data file, through a memory-mapped Arrow copy of the columns that are read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import DatasetFormatError
from ..remedies import LEAVE_OUT_FEATURE_OR_EPISODE
from ..table.columns import as_numpy, kind_of

_SMALL = 10_000  # rows of a record batch, so that a few pictures do not map all


def write_copy(parquet: Path, target: Path, columns: Collection[str], name: Path) -> None:
    """Write the `columns` of a parquet file as Arrow's own format, one row group in memory at a time.

    Raises:
        DatasetFormatError: the file, called `name` for whoever reads the message, cannot be read.
    """
    try:
        with pq.ParquetFile(parquet) as file:
            kept = [column for column in file.schema_arrow.names if column in columns]
            schema = pa.schema([file.schema_arrow.field(column).remove_metadata() for column in kept])
            with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for number in range(file.num_row_groups):
                    rows = file.read_row_group(number, kept).select(kept).cast(schema)
                    writer.write_table(rows.combine_chunks(), max_chunksize=_SMALL)
    except (pa.ArrowException, ValueError) as error:
        raise DatasetFormatError(
            f"{name} cannot be read as a parquet file: {error}. Download or write it again."
        ) from error


class FileTable:
    """Rows of one data file, by the numbers that they have in the whole dataset.

    Args:
        copy (`Path`): what `write_copy` wrote.
        path (`Path`): the data file, for messages.
        first_row (`int`): the row of the dataset that it begins with.
        rename_map: name of a column in the file → the name it has here.
    """

    def __init__(self, copy: Path, path: Path, first_row: int, rename_map: dict[str, str]):
        self.paths, self._first_row = [path], first_row
        with pa.memory_map(str(copy)) as source:
            self._rows = pa.ipc.open_file(source).read_all()
        self._rows = self._rows.rename_columns([rename_map.get(name, name) for name in self._rows.column_names])
        lengths = [len(chunk) for chunk in self._rows.column(0).chunks]
        self._starts = np.cumsum([0, *lengths])  # (chunks + 1,) row of each one's first
        self._views: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows.column_names

    def kind(self, name: str) -> str:
        """Return what the column `name` holds: `number`, `text`, `picture`, or its Arrow type."""
        return kind_of(self._rows.schema.field(name).type)

    def numbers(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the column `name` at `rows`: (*rows.shape, *shape).

        Raises:
            DatasetFormatError: the column holds no numbers of that shape, or nothing in one of these rows.
        """
        here = rows.reshape(-1) - self._first_row
        chunk_of = np.searchsorted(self._starts, here, side="right") - 1
        found = np.unique(chunk_of)
        parts = [self._view(name, int(chunk), shape)[here[chunk_of == chunk] - self._starts[chunk]] for chunk in found]
        values = parts[0]
        if len(parts) > 1:
            values = np.empty((len(here), *shape), dtype=values.dtype)
            for chunk, part in zip(found, parts, strict=True):
                values[chunk_of == chunk] = part
        if values.dtype.kind != "f" and _holds_nothing(self._rows.column(name)):
            self.values(name, rows.reshape(-1))
        return values.reshape(*rows.shape, *shape)

    def bounds(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `episode_index` and `timestamp` at the first and last rows of episodes, each (episodes, 2)."""
        rows = np.stack([first, last], axis=1)
        return self.numbers("episode_index", rows, ()), self.numbers("timestamp", rows, ())

    def values(self, name: str, rows: Sequence[int]) -> list:
        """Return the column `name` at `rows` as Python values: strings, or the dictionary of an image.

        Raises:
            DatasetFormatError: there is nothing in one of these rows.
        """
        column = self._rows.column(name)
        here = [int(row) - self._first_row for row in rows]
        values = [column[row].as_py() for row in here]
        for row, value in zip(here, values, strict=True):
            if value is None or (isinstance(value, list) and _lacks(value)):
                raise DatasetFormatError(
                    f"{name} has no value (null) in row {row} of {self.paths[0]}. {LEAVE_OUT_FEATURE_OR_EPISODE}, or "
                    f"correct the recording."
                )
        return values

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file that a row of the dataset is in, and its row there."""
        return self.paths[0], int(row) - self._first_row

    def _view(self, name: str, chunk: int, shape: tuple[int, ...]) -> np.ndarray:
        key = name, chunk
        if key not in self._views or self._views[key].shape[1:] != shape:
            self._views[key] = as_numpy(name, self._rows.column(name).chunk(chunk), shape)
        return self._views[key]


def _lacks(value: list) -> bool:
    return any(item is None or (isinstance(item, list) and _lacks(item)) for item in value)


def _holds_nothing(column: pa.ChunkedArray) -> bool:
    """Tell whether something is absent anywhere in a column, or in its lists."""
    for array in column.chunks:
        while True:
            array = array.storage if isinstance(array, pa.ExtensionArray) else array
            if array.null_count:
                return True
            if not pa.types.is_nested(array.type) or pa.types.is_struct(array.type):
                break
            array = array.flatten()
    return False
