"""The parquet files of a recording, each shared by many episodes and split at a size."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..layouts.v3 import DATA_PATH, FileNumbering


class DataFiles:
    """Parquet files with one row group per episode."""

    def __init__(self, folder: Path, size_in_mb: float):
        self._folder, self._limit = folder, size_in_mb * 2**20
        self._numbering, self._writer, self._sink = FileNumbering(), None, None
        self.paths: list[Path] = []
        self._rows = 0

    def append(self, table: pa.Table) -> dict[str, int]:
        # The rows already in the file tell how much the new ones will add to it.
        if self._writer is not None and self._sink.tell() * (1 + len(table) / self._rows) >= self._limit:
            self.close()
        if self._writer is None:
            self._numbering.next()
            path = self._folder / DATA_PATH.format(**self._numbering.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.paths.append(path)
            self._sink, self._rows = pa.OSFile(str(path), "wb"), 0
            self._writer = pq.ParquetWriter(self._sink, table.schema)
        self._writer.write_table(table, row_group_size=len(table))
        self._rows += len(table)
        return {f"data/{key}": value for key, value in self._numbering.place.items()}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None
