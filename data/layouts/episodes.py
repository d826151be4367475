"""Write `meta/episodes`, the table of the episodes, in files that are divided at a size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .v3 import EPISODES_PATH, FileNumbering

_ROWS_AT_ONCE = 512


class EpisodesFiles:
    """The files of `meta/episodes`, written a block at a time.

    Args:
        folder (`Path`): the dataset's root.
        size_in_mb (`float`): where the next file begins.
    """

    def __init__(self, folder: Path, size_in_mb: float):
        self._folder, self._limit = folder, size_in_mb * 2**20
        self._numbering, self._writer, self._sink = FileNumbering(), None, None

    def append(self, table: pa.Table) -> None:
        """Write the rows of some episodes, without the columns that say in which of these files they are."""
        if self._writer is not None and self._sink.tell() >= self._limit:
            self.close()
        if self._writer is None:
            self._numbering.next()
            path = self._folder / EPISODES_PATH.format(**self._numbering.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = pa.OSFile(str(path), "wb")
        for name, number in self._numbering.place.items():
            table = table.append_column(f"meta/episodes/{name}", pa.array(np.full(len(table), number)))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._sink, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the last file."""
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None


class EpisodeRows:
    """The same, written row by row, of which few are in memory; arguments as of `EpisodesFiles`.

    The columns are those of the first rows.
    """

    def __init__(self, folder: Path, size_in_mb: float):
        self._files, self._schema = EpisodesFiles(folder, size_in_mb), None
        self._rows: list[dict] = []

    def append(self, row: Mapping[str, object]) -> None:
        """Add the row of the next episode."""
        self._rows.append(dict(row))
        if len(self._rows) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._rows, self._schema = [], table.schema
        self._files.append(table)

    def close(self) -> None:
        """Write what is left, and finish the last file."""
        if self._rows:
            self._flush()
        self._files.close()

    def discard(self) -> None:
        """Close the last file as it is."""
        self._rows = []
        self._files.close()
