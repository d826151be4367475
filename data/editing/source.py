"""A dataset that another one is made of, read an episode at a time."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import DatasetFormatError, DatasetNotFoundError, DatasetVersionError, UnknownDatasetFeatureError
from ..checks import is_for_policies, not_finite
from ..features import INDEX_FEATURES
from ..layouts.metadata import DatasetMetadata
from ..layouts.reader import load_metadata
from ..layouts.v3 import FORMAT_VERSION
from ..remedies import LEAVE_OUT_FEATURE
from ..selection import check_known
from ..source import fetch_files, fetch_metadata
from ..table.columns import as_numpy

EPISODE_FILES = "meta/episodes/*/*.parquet"
AT_ONCE = 512  # rows of meta/episodes in memory


@dataclass(frozen=True)
class Source:
    """A dataset of version 3.0 and the features of it that are kept.

    Args:
        name: what the user calls it: a folder or a Hub id.
        metadata: of it, under the new names of features.
        features: name → declaration, of those that are kept; the index columns are among them.
        revision: the commit of a snapshot from the Hub.
        column_names: new name → name in the files, of features that are called otherwise there.
    """

    name: str
    metadata: DatasetMetadata
    features: dict[str, dict]
    revision: str | None
    column_names: dict[str, str]

    @property
    def root(self) -> Path:
        """Its folder."""
        return self.metadata.root

    @property
    def cameras(self) -> list[str]:
        """The kept features whose frames are in video files."""
        return [name for name in self.metadata.videos if name in self.features]

    @property
    def every(self) -> np.ndarray:
        """The positions of all episodes."""
        return np.arange(len(self.metadata.episode_numbers))

    def length(self, position: int) -> int:
        """Return the number of frames of the episode at `position`."""
        return int(self.metadata.episode_ends[position] - self.metadata.episode_starts[position])

    def fetch(self, positions: np.ndarray) -> None:
        """Download the files of these episodes, where it is a dataset of the Hub; nothing else is."""
        metadata = self.metadata
        wanted = {metadata.data_paths[position] for position in positions}
        wanted |= {metadata.videos[camera].paths[position] for camera in self.cameras for position in positions}
        if self.revision is not None:
            fetch_files(self.name, metadata, wanted)
        missing = sorted(path for path in wanted if not (self.root / path).is_file())
        if missing:
            raise DatasetNotFoundError(
                f"{self.name} lacks {len(missing)} file(s) of the chosen episodes: {', '.join(missing[:4])}. Download "
                f"the dataset again, or choose other episodes."
            )

    # --- rows ----------------------------------------------------------------------------------------------------

    @cached_property
    def _first_rows(self) -> dict[str, int]:
        """Data file → the row of the dataset that it begins with."""
        first: dict[str, int] = {}
        for path, start in zip(self.metadata.data_paths, self.metadata.episode_starts.tolist(), strict=True):
            first.setdefault(path, start)
        return first

    def tables(self, positions: np.ndarray) -> Iterator[pa.Table]:
        """Yield the rows of every episode at `positions`, under the new names; a row group is in memory at a time.

        Raises:
            DatasetFormatError: a file cannot be read, or does not hold what the metadata say.
        """
        path = rows = schema = None
        for position in positions.tolist():
            if self.metadata.data_paths[position] != path:
                path = self.metadata.data_paths[position]
                rows = _Rows(self.root / path, self._stored_names())
                schema = self._renamed(rows.schema)
            start = int(self.metadata.episode_starts[position]) - self._first_rows[path]
            table = rows.read(start, start + self.length(position))
            table = table.rename_columns(schema.names).replace_schema_metadata(schema.metadata)
            yield self._checked(position, table)

    def _stored_names(self) -> list[str]:
        on_video = self.metadata.videos
        return [self.column_names.get(name, name) for name in self.features if name not in on_video]

    def _renamed(self, schema: pa.Schema) -> pa.Schema:
        """Return the columns under the new names, with the types of 🤗 datasets in the schema's metadata."""
        new = {old: name for name, old in self.column_names.items()}
        kinds = datasets.Features.from_arrow_schema(schema)
        kinds = datasets.Features({new.get(name, name): kind for name, kind in kinds.items()})
        fields = [field.with_name(new.get(field.name, field.name)) for field in schema]
        return pa.schema(fields, kinds.arrow_schema.metadata)

    def _checked(self, position: int, table: pa.Table) -> pa.Table:
        """Return the rows of an episode, if they are what the metadata say, and finite where policies read them."""
        number, length = int(self.metadata.episode_numbers[position]), self.length(position)
        found = table["episode_index"].unique().to_pylist()
        if len(table) != length or found != [number]:
            raise DatasetFormatError(
                f"{self.root / self.metadata.data_paths[position]} has {len(table)} rows with episode_index "
                f"{', '.join(map(str, found[:4])) or 'nothing'} where the metadata say episode {number} with "
                f"{length}. Download or write the dataset again."
            )
        for name in table.column_names:
            if is_for_policies(name) and self.features[name]["dtype"].startswith("float"):
                finite = np.isfinite(self.numbers(table, name)).reshape(length, -1).all(axis=1)
                if not finite.all():
                    row = int(self.metadata.episode_starts[position]) + int(np.argmin(finite))
                    raise not_finite(self.metadata, name, [row])
        return table

    def numbers(self, table: pa.Table, name: str) -> np.ndarray:
        """Return a column of numbers of an episode's rows, (rows, *shape)."""
        shape = tuple(self.features[name]["shape"])
        chunks = [as_numpy(name, chunk, shape) for chunk in table[name].chunks]
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    # --- what meta/episodes says beside where an episode is ------------------------------------------------------

    @cached_property
    def _episode_columns(self) -> list[str]:
        files = sorted(self.root.glob(EPISODE_FILES))
        return list(pq.read_schema(files[0]).names)

    def statistic_keys(self, name: str) -> set[str]:
        """Return which statistics of a feature there are for every episode."""
        prefix = f"stats/{self.column_names.get(name, name)}/"
        return {column.removeprefix(prefix) for column in self._episode_columns if column.startswith(prefix)}

    @property
    def further_columns(self) -> list[str]:
        """The columns of meta/episodes that the format does not define, such as marks of a person."""
        own = {"episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"}
        prefixes = ("data/", "videos/", "meta/", "stats/")
        return [name for name in self._episode_columns if name not in own and not name.startswith(prefixes)]

    def episode_rows(self, positions: np.ndarray) -> Iterator[dict[str, object]]:
        """Yield, for every episode at `positions`, its statistics and further columns; some rows are in memory."""
        old = {self.column_names.get(name, name): name for name in self.features}
        stated = [column for column in self._episode_columns if column.startswith("stats/")]
        named = {column: column.removeprefix("stats/").rpartition("/") for column in stated}
        kept = {column: f"stats/{old[name]}/{key}" for column, (name, _, key) in named.items() if name in old}
        kept |= {column: column for column in self.further_columns}
        reader = _EpisodeRows(sorted(self.root.glob(EPISODE_FILES)), list(kept))
        for position in positions.tolist():
            row = reader.read(int(self.metadata.episode_numbers[position]))
            yield {kept[column]: value for column, value in row.items() if column in kept}


def open_source(
    source: str | Path,
    revision: str | None = None,
    rename_map: Mapping[str, str] | None = None,
    features: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
) -> Source:
    """Return a dataset of version 3.0 whose episodes go into another one.

    Args:
        source: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.
        rename_map: name of a feature in `source` → its new name.
        features: the features to keep, by their new names; all by default.
        drop: the features to leave out.

    Raises:
        DatasetVersionError: it is of an earlier version.
        DatasetNotFoundError, DatasetFormatError: it cannot be read.
        UnknownDatasetFeatureError: a name that it does not have, or nothing is left.
    """
    root, is_downloaded = fetch_metadata(source, revision)
    metadata = load_metadata(root, rename_map)
    version = str(metadata.info.get("codebase_version"))
    if not version.startswith(FORMAT_VERSION[:2]):
        raise DatasetVersionError(
            f"{source} is a LeRobot dataset of version {version}; datasets of {FORMAT_VERSION} can be edited. Convert "
            f"it: manipulators convert-dataset {shlex.quote(str(source))} <new folder>"
        )
    kept = _kept(str(source), metadata.info["features"], features, drop)
    names = {new: old for old, new in (rename_map or {}).items() if new in kept}
    return Source(str(source), metadata, kept, root.name if is_downloaded else None, names)


def _kept(
    source: str, declared: Mapping[str, dict], features: Sequence[str] | None, drop: Sequence[str] | None
) -> dict[str, dict]:
    every = {**declared, **{name: declared.get(name, feature) for name, feature in INDEX_FEATURES.items()}}
    for argument, names in (("features", features), ("drop", drop)):
        for name in names or ():
            check_known(name, every, argument)
            if argument == "drop" and name in INDEX_FEATURES:
                raise UnknownDatasetFeatureError(f"drop names {name!r}, which every dataset has.")
    kept = {
        name: feature
        for name, feature in every.items()
        if name in INDEX_FEATURES or ((features is None or name in features) and name not in (drop or ()))
    }
    if kept.keys() == INDEX_FEATURES.keys():
        named = ", ".join(name for name in declared if name not in INDEX_FEATURES)
        raise UnknownDatasetFeatureError(f"No feature of {source} is left. It has: {named}.")
    return kept


class _Rows:
    """Read rows of one parquet file; the row groups that hold the last ones are kept."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self._path, self._columns = path, columns
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._unreadable(error) from error
        absent = [name for name in columns if name not in self._file.schema_arrow.names]
        if absent:
            raise DatasetFormatError(f"{path} has no column {', '.join(absent)}. {LEAVE_OUT_FEATURE}.")
        self.schema = pa.schema(
            [self._file.schema_arrow.field(name) for name in columns], self._file.schema_arrow.metadata
        )
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *groups])
        self._held, self._table = (0, 0), None

    def read(self, start: int, end: int) -> pa.Table:
        """Return the rows from `start` up to `end`, fewer where the file ends before."""
        first, last = (
            int(np.searchsorted(self._starts, row, side="right")) - 1 for row in (start, max(end - 1, start))
        )
        groups = range(first, min(last + 1, len(self._starts) - 1))
        if self._table is None or self._held != (groups.start, groups.stop):
            try:
                table = self._file.read_row_groups(list(groups), columns=list(self._columns))
                self._table = table.select(self._columns)  # not also columns of nested names
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._unreadable(error) from error
            self._held = (groups.start, groups.stop)
        return self._table.slice(start - int(self._starts[groups.start]), end - start).combine_chunks()

    def _unreadable(self, error: Exception) -> DatasetFormatError:
        return DatasetFormatError(f"{self._path} cannot be read as a parquet file: {error}. Download it again.")


class _EpisodeRows:
    """Read rows of `meta/episodes` by the number of their episode, forwards."""

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]):
        self._paths, self._columns = paths, ["episode_index", *columns]
        self._batches, self._rows = self._all(), {}

    def read(self, number: int) -> dict[str, object]:
        """Return the row of one episode."""
        has_restarted = False
        while number not in self._rows:
            batch = next(self._batches, None)
            if batch is None:
                if has_restarted:
                    raise DatasetFormatError(f"{self._paths[0].parent} has no row of episode {number}.")
                self._batches, has_restarted = self._all(), True
                continue
            self._rows = {row["episode_index"]: row for row in batch.to_pylist()}
        return self._rows[number]

    def _all(self) -> Iterator[pa.RecordBatch]:
        for path in self._paths:
            try:
                yield from pq.ParquetFile(path).iter_batches(AT_ONCE, columns=self._columns)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DatasetFormatError(f"{path} cannot be read: {error}. Download it again.") from error
