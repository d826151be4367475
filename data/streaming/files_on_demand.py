"""FilesOnDemand: the files of a dataset that are fetched when they are read, and the rows in them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from ...errors import DatasetFormatError, DatasetNotFoundError
from ..checks import check_columns, check_episodes
from ..layouts.metadata import DatasetMetadata
from ..remedies import LEAVE_OUT_FEATURE_OR_EPISODE
from ..selection import warn_once
from ..source import download_file
from .file_cache import FileCache
from .file_table import FileTable, write_copy

_OPEN_TABLES = 128
_DOWNLOADS = 4  # at once, per process
_TRIES = 3  # of a file that another process has removed from the cache just now


class FilesOnDemand:
    """Fetch files of a dataset when they are needed; those of a local folder are read where they are.

    Data files are compressed, so a copy of the columns that are read is kept in the cache, of a local dataset too.

    Args:
        source: folder or Hub id.
        metadata: of the dataset.
        is_remote: whether files that are not here can be downloaded.
        columns: the columns that are read, as the data files call them.
        cache: where what is fetched is kept for a while.
    """

    def __init__(
        self,
        source: str | Path,
        metadata: DatasetMetadata,
        is_remote: bool,
        columns: Iterable[str],
        cache: FileCache,
    ):
        self._source, self._metadata, self._is_remote, self._cache = str(source), metadata, is_remote, cache
        self._columns = sorted(columns)
        place = repr((self._source if is_remote else "", str(metadata.root), self._columns))
        self._prefix = hashlib.sha256(place.encode()).hexdigest()[:16]
        self._made: set[str] = set()  # by this process, for the block that is read and the next

    def video(self, path: str) -> Path:
        """Return where a video file is now, fetched if need be."""
        local = self._metadata.root / path
        if self._is_here(local):
            return local
        return self._get(path, lambda target: self._fetch(path, target))

    def data(self, path: str) -> Path:
        """Return where the copy of a data file is now, made if need be."""
        local, version = self._metadata.root / path, ""
        is_here = self._is_here(local)
        if is_here and not self._is_remote:  # a file that is written again is another one
            status = local.stat()
            version = f"-{status.st_size}-{status.st_mtime_ns}"

        def make(target: Path) -> None:
            fetched = local if is_here else target.with_name(f"{target.name}.parquet")
            try:
                if not is_here:
                    self._fetch(path, fetched)
                write_copy(fetched, target, self._columns, local)
            finally:
                if not is_here:
                    fetched.unlink(missing_ok=True)

        return self._get(f"{path}{version}.arrow", make)

    def opened(self, find: Callable[[str], Path], path: str, read: Callable[[Path], Any]) -> Any:
        """Return `read` of a file that `find` fetches; again, if it has left the cache between the two."""
        for _ in range(_TRIES - 1):
            place = find(path)
            with suppress(FileNotFoundError):
                return read(place)
        return read(find(path))

    def prefetch(self, data: Iterable[str], videos: Iterable[str]) -> None:
        """Begin to fetch files that will be needed; what cannot be fetched raises when it is read."""
        self._made.clear()
        waiting: SimpleQueue = SimpleQueue()
        for task in [(self.data, path) for path in data] + [(self.video, path) for path in videos]:
            waiting.put(task)
        for _ in range(min(_DOWNLOADS, waiting.qsize())):  # daemons: the program does not wait for them at its end
            Thread(target=_work, args=(waiting,), name="prefetch", daemon=True).start()

    def _get(self, name: str, make: Callable[[Path], object]) -> Path:
        def noting(target: Path) -> None:
            if name in self._made:
                warn_once(
                    f"{name} of {self._source} has left the cache and is fetched again: cache_gb is too small for the "
                    f"files of shuffle_buffer samples and of those after them. Change one of them (train: "
                    f"--data.cache_gb, --data.shuffle_buffer)."
                )
            make(target)
            self._made.add(name)

        return self._cache.get(f"{self._prefix}/{name}", noting)

    def _is_here(self, local: Path) -> bool:
        if local.is_file():
            return True
        if not self._is_remote:
            raise DatasetNotFoundError(
                f"{local} is not there any more. Bring the folder back, and go on with the run (train: --resume). "
                f"{LEAVE_OUT_FEATURE_OR_EPISODE}."
            )
        return False

    def _fetch(self, path: str, target: Path) -> None:
        download_file(self._source, self._metadata.root.name, path, target)  # the folder bears the commit's name


def _work(waiting: SimpleQueue) -> None:
    """Fetch one file after the other until none is waiting."""
    while not waiting.empty():
        with suppress(Exception):
            fetch, path = waiting.get_nowait()
            fetch(path)


class TableOnDemand:
    """Rows of a dataset, of which the data files are opened when they are read and checked then.

    Args:
        files: where they come from.
        metadata: of the dataset.
        features, tolerance_s: what the files are checked for.
        rename_map: name of a column in the files → the name it has here.
    """

    def __init__(
        self,
        files: FilesOnDemand,
        metadata: DatasetMetadata,
        features: Mapping[str, dict],
        tolerance_s: float,
        rename_map: Mapping[str, str] | None,
    ):
        self._files, self._metadata, self._features, self._tolerance_s = files, metadata, features, tolerance_s
        self._renamed = dict(rename_map or {})
        self._paths, self._first_rows = metadata.data_paths.files, metadata.first_rows  # (files,)
        self._tables: OrderedDict[int, FileTable] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return False  # no column is here as a whole, to compare statistics with

    def numbers(self, name: str, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the column `name` at `rows`: (*rows.shape, *shape); see `FileTable`."""
        flat = np.asarray(rows).reshape(-1)
        file_of = self._file_of(flat)
        parts = [(file_of == file, self._table(int(file))) for file in np.unique(file_of)]
        values = [table.numbers(name, flat[here], shape) for here, table in parts]
        if len(parts) == 1:
            return values[0].reshape(*rows.shape, *shape)
        joined = np.empty((len(flat), *shape), dtype=np.result_type(*values))
        for (here, _), part in zip(parts, values, strict=True):
            joined[here] = part
        return joined.reshape(*rows.shape, *shape)

    def values(self, name: str, rows: Sequence[int]) -> list:
        """Return the column `name` at `rows` as Python values; see `FileTable`."""
        files = self._file_of(np.asarray(rows)).tolist()
        return [self._table(file).values(name, [row])[0] for file, row in zip(files, rows, strict=True)]

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file that a row of the dataset is in, and its row there."""
        return self._table(int(self._file_of(np.asarray(row)))).place(row)

    def _file_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def _table(self, file: int) -> FileTable:
        if file in self._tables:
            self._tables.move_to_end(file)
            return self._tables[file]
        path = self._paths[file]
        local = self._metadata.root / path
        details = (local, int(self._first_rows[file]), self._renamed)
        table = self._files.opened(self._files.data, path, lambda place: FileTable(place, *details))
        self._check(file, table)
        self._tables[file] = table
        if len(self._tables) > _OPEN_TABLES:
            self._tables.popitem(last=False)
        return table

    def _check(self, file: int, table: FileTable) -> None:
        """Compare a data file with what the metadata says of its episodes."""
        episodes = np.flatnonzero(self._metadata.data_paths.file_of == file)
        first, last = self._metadata.episode_starts[episodes], self._metadata.episode_ends[episodes] - 1
        expected = int((last + 1 - first).sum())
        if len(table) != expected:
            raise DatasetFormatError(
                f"{table.paths[0]} has {len(table)} rows, and its episodes {expected} by the dataset's metadata. "
                f"Download or write the dataset again."
            )
        check_columns(self._metadata, table, self._features)
        check_episodes(self._metadata, episodes, *table.bounds(first, last), self._tolerance_s)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tables": OrderedDict()}
