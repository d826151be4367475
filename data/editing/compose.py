"""Write a dataset of version 3.0 made of episodes of others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ...errors import DatasetFormatError
from ..checks import instruction
from ..convert import SIZES_IN_MB
from ..features import CAMERAS
from ..layouts.episodes import EpisodeRows
from ..layouts.json_files import recompute
from ..layouts.writer import plain_statistics, write_summary
from ..recording.data_files import DataFiles
from ..statistics.computing import QUANTILES, compute_statistics, pool_statistics, statistics_of_blocks
from ..table.columns import as_numpy
from .origin import copy_documents, record_origin
from .source import Source
from .videos import Piece, VideoColumn, write_videos

logger = logging.getLogger(__name__)

POOLED = ("min", "max", "mean", "std", "count")
_OF_NUMBERS = {*POOLED, *QUANTILES}
_RENUMBERED = ("episode_index", "index", "task_index")


def write_dataset(folder: Path, action: str, pieces: Sequence[Piece], info: Mapping, progress: bool = True) -> None:
    """Write the episodes of `pieces`, in their order and numbered anew, into the empty folder `folder`.

    Packets of videos are copied. Statistics of numbers are computed of all of them; those of cameras are pooled from
    those of the episodes, and have no quantiles, which cannot be pooled.

    Args:
        folder: the dataset's root.
        action: the command, as it is recorded.
        pieces: all with the features that `info` declares.
        info: fps, features, robot_type and sizes.
        progress: show progress bars.

    Raises:
        DatasetFormatError, VideoError: a source is not what its metadata say, or a camera has no statistics.
    """
    _Composition(folder, action, pieces, info, progress).run()


class _Composition:
    def __init__(self, folder: Path, action: str, pieces: Sequence[Piece], info: Mapping, progress: bool):
        self._folder, self._action, self._progress = folder, action, progress
        self._pieces = [piece for piece in pieces if len(piece.positions)]
        self._info = {**SIZES_IN_MB, **info, "splits": None}
        self._features: dict[str, dict] = dict(info["features"])
        self._tasks: dict[str, int] = {}
        self._texts: list[str] = []  # the same, by their index
        self._cameras = [name for name, feature in self._features.items() if feature["dtype"] in CAMERAS]
        self._of_numbers = [name for name, feature in self._features.items() if is_number(feature)]
        self._camera_keys = {camera: self._common_keys(camera) for camera in self._cameras}
        self._parts: dict[str, list[dict[str, np.ndarray]]] = {camera: [] for camera in self._cameras}

    def run(self) -> None:
        videos = []
        for name, feature in self._features.items():
            if feature["dtype"] == "video":
                size, fps = self._info["video_files_size_in_mb"], float(self._info["fps"])
                videos.append(write_videos(self._folder, name, self._pieces, fps, size, self._bar))
        num_episodes, num_frames, paths = self._write_data(videos)
        statistics = {}
        for name in self._features:
            if name in self._cameras:
                statistics[name] = pool_statistics(self._parts[name])
            elif name in self._of_numbers:
                statistics[name] = column_statistics(paths, name, tuple(self._features[name]["shape"]))
        write_summary(self._folder, self._info, dict(enumerate(self._texts)), num_episodes, num_frames, statistics)
        record_origin(self._folder, self._action, self._pieces)
        copy_documents(self._folder, self._pieces)

    # --- rows ----------------------------------------------------------------------------------------------------

    def _write_data(self, videos: Sequence[VideoColumn]) -> tuple[int, int, list[Path]]:
        """Write data files and meta/episodes; return how many episodes and frames, and the files."""
        (self._folder / "meta").mkdir(exist_ok=True)
        size = self._info["data_files_size_in_mb"]
        files, episodes = DataFiles(self._folder, size), EpisodeRows(self._folder, size)
        number = first = 0
        schema = None
        further = self._further_columns()
        try:
            for source, position, table, stated in self._bar(self._episodes(), "data"):
                length = len(table)
                tasks = self._task_indices(source, position, table)
                table = _replaced(table, "episode_index", np.full(length, number))
                table = _replaced(table, "index", np.arange(first, first + length))
                table = _replaced(table, "task_index", tasks)
                schema = table.schema if schema is None else schema
                row = {
                    "episode_index": number,
                    "tasks": [self._texts[task] for task in dict.fromkeys(tasks.tolist())],
                    "length": length,
                }
                row |= files.append(_like(table, schema, source))
                row |= {"dataset_from_index": first, "dataset_to_index": first + length}
                for video in videos:
                    row |= video.columns(number, length / float(self._info["fps"]))
                row |= self._episode_statistics(source, position, table, stated)
                episodes.append(row | {name: stated[name] for name in further})
                number, first = number + 1, first + length
        except BaseException:
            for written in (files.close, episodes.discard):
                with suppress(Exception):  # on a full disk closing them fails as well
                    written()
            raise
        files.close()
        episodes.close()
        return number, first, files.paths

    def _episodes(self) -> Iterator[tuple[Source, int, pa.Table, dict[str, object]]]:
        stored = [name for name, feature in self._features.items() if feature["dtype"] != "video"]
        for source, positions in self._pieces:
            rows, stated = source.tables(positions), source.episode_rows(positions)
            for position, table, row in zip(positions.tolist(), rows, stated, strict=True):
                yield source, position, table.select(stored), row

    def _task_indices(self, source: Source, position: int, table: pa.Table) -> np.ndarray:
        """Return the rows' indices among the tasks of the new dataset, in the order in which these first appear."""
        old = source.numbers(table, "task_index").reshape(-1)
        new = np.empty(len(old), dtype=np.int64)
        for index in dict.fromkeys(old.tolist()):
            text = instruction(source.metadata, index, position)
            if text not in self._tasks:
                self._tasks[text] = len(self._texts)
                self._texts.append(text)
            new[old == index] = self._tasks[text]
        return new

    def _further_columns(self) -> list[str]:
        columns = [piece.source.further_columns for piece in self._pieces]
        return [name for name in columns[0] if all(name in other for other in columns)]

    # --- statistics ----------------------------------------------------------------------------------------------

    def _common_keys(self, camera: str) -> list[str]:
        keys = [piece.source.statistic_keys(camera) for piece in self._pieces]
        for piece, found in zip(self._pieces, keys, strict=True):
            if not found.issuperset(POOLED):
                raise self._no_statistics(piece.source, camera)
        return sorted(set.intersection(*keys))

    def _episode_statistics(
        self, source: Source, position: int, table: pa.Table, stated: Mapping[str, object]
    ) -> dict[str, object]:
        """Return the columns of statistics of an episode, and keep those of its cameras for the whole dataset."""
        row: dict[str, object] = {}
        for name in list(self._of_numbers):
            if name in _RENUMBERED:
                numbers = source.numbers(table, name).reshape(-1)
                row |= {f"stats/{name}/{key}": value for key, value in _statistics_of_indices(numbers).items()}
                continue
            columns = {key: f"stats/{name}/{key}" for key in sorted(_OF_NUMBERS)}
            values = {key: stated.get(column) for key, column in columns.items()}
            if None in values.values():
                numbers = source.numbers(table, name)
                if not np.isfinite(numbers).all():
                    logger.warning("%s has values that are not finite: it gets no statistics.", name)
                    self._of_numbers.remove(name)
                    continue
                values = plain_statistics(compute_statistics(numbers))
            row |= {columns[key]: value for key, value in values.items()}
        for camera, keys in self._camera_keys.items():
            values = {key: stated[f"stats/{camera}/{key}"] for key in keys}
            if any(values[key] is None for key in POOLED):
                raise self._no_statistics(source, camera)
            self._parts[camera].append({key: np.asarray(values[key], dtype=np.float64) for key in POOLED})
            row |= {f"stats/{camera}/{key}": value for key, value in values.items()}
        return row

    def _no_statistics(self, source: Source, camera: str) -> DatasetFormatError:
        return DatasetFormatError(
            f"{source.name} has no statistics ({', '.join(POOLED)}) of {camera} for every episode. "
            f"{recompute(source.root)}, or manipulators dataset stats {source.root}"
        )

    def _bar(self, items: Iterable, title: str) -> Iterable:
        count = sum(len(piece.positions) for piece in self._pieces) if title == "data" else None
        return tqdm(items, desc=title, total=count, disable=not self._progress, leave=False)


def column_statistics(paths: Sequence[Path], name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return the statistics of a column of numbers over all files, of which a row group is in memory."""

    def blocks() -> Iterator[np.ndarray]:
        for path in paths:
            with pq.ParquetFile(path) as file:
                for number in range(file.num_row_groups):
                    for chunk in file.read_row_group(number, [name])[name].chunks:
                        yield as_numpy(name, chunk, shape)

    return statistics_of_blocks(blocks)


def _statistics_of_indices(numbers: np.ndarray) -> dict[str, list]:
    """Return the statistics of an index column of an episode, (rows,), which is constant or counts up by one."""
    first, count = float(numbers[0]), len(numbers)
    last = float(numbers[-1])
    step = (last - first) / max(count - 1, 1)
    if step not in (0.0, 1.0) or (count > 1 and np.any(np.diff(numbers) != step)):
        return plain_statistics(compute_statistics(numbers[:, None]))
    values = {"min": first, "max": last, "mean": (first + last) / 2, "std": step * np.sqrt((count**2 - 1) / 12)}
    values |= {name: first + step * (count - 1) * probability for name, probability in QUANTILES.items()}
    return {name: [float(np.float32(value))] for name, value in values.items()} | {"count": [count]}


def is_number(feature: Mapping) -> bool:
    """Tell whether a feature holds numbers, of which there are statistics: neither pictures nor text."""
    try:
        return np.dtype(feature["dtype"]).kind in "fiub"
    except TypeError:
        return False


def _replaced(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """Return a table with other numbers in an index column, as plain 64-bit numbers."""
    field = table.schema.field(name)
    kind = field.type if pa.types.is_integer(field.type) else pa.int64()
    return table.set_column(table.column_names.index(name), field.with_type(kind), pa.array(values).cast(kind))


def _like(table: pa.Table, schema: pa.Schema, source: Source) -> pa.Table:
    """Return the rows with the types of the first episode's."""
    if table.schema.equals(schema):
        return table.replace_schema_metadata(schema.metadata)
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise DatasetFormatError(
            f"The columns of {source.name} cannot be joined with those before: {error}. Write it anew: manipulators "
            f"convert-dataset {source.name} <new folder>"
        ) from error
