"""Write `meta/episodes` row by row; a few hundred rows are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..layouts.v3 import EPISODES_PATH, FileNumbering

AT_ONCE = 512


class EpisodeTable:
    """The parquet files of `meta/episodes`, whose columns are those of the first rows.

    Args:
        folder (`Path`): the dataset's root.
        size_in_mb (`float`): where the next file begins.
    """

    def __init__(self, folder: Path, size_in_mb: float):
        self._folder, self._limit = folder, size_in_mb * 2**20
        self._numbering, self._schema = FileNumbering(), None
        self._rows: list[dict] = []
        self._sink = self._writer = None
        self._numbering.next()

    def append(self, row: Mapping[str, object]) -> None:
        """Add the row of the next episode."""
        self._rows.append(dict(row))
        if len(self._rows) == AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._writer is not None and self._sink.tell() >= self._limit:
            self._close_file()
            self._numbering.next()
        place = {f"meta/episodes/{key}": value for key, value in self._numbering.place.items()}
        table = pa.Table.from_pylist([row | place for row in self._rows], schema=self._schema)
        self._rows = []
        if self._schema is None:
            self._schema = table.schema
        if self._writer is None:
            path = self._folder / EPISODES_PATH.format(**self._numbering.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = pa.OSFile(str(path), "wb")
            self._writer = pq.ParquetWriter(self._sink, self._schema)
        self._writer.write_table(table)

    def _close_file(self) -> None:
        if self._writer is not None:
            writer, sink, self._writer, self._sink = self._writer, self._sink, None, None
            writer.close()
            sink.close()

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._rows:
            self._flush()
        self._close_file()

    def discard(self) -> None:
        """Close the file as it is."""
        self._rows = []
        self._close_file()
