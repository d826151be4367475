"""Convert a dataset of any version of the LeRobot format to version 3.0, with all statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .._files import new_folder, refuse_existing
from ..errors import VideoError
from .checks import check_size, check_table, instruction, is_for_policies, not_finite, picture
from .features import CAMERAS, INDEX_FEATURES
from .layouts.episodes import EpisodesFiles
from .layouts.metadata import DatasetMetadata
from .layouts.reader import load_metadata
from .layouts.writer import statistics_columns, write_summary
from .recording.data_files import DataFiles
from .selection import ROWS_AT_ONCE, choose_episodes, choose_features, row_blocks
from .source import fetch_files, fetch_metadata
from .statistics.computing import ImageStatistics, statistics_of_blocks, statistics_of_episodes
from .table.columns import stored_type
from .table.frame_table import FrameTable, open_table
from .video.joining import VideoFiles, video_columns
from .video.reader import VideoReader
from .windows import exact_times

logger = logging.getLogger(__name__)

SIZES_IN_MB = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}  # LeRobot's defaults
FRAMES_AT_ONCE = 64  # decoded together: this many frames are in memory
_EPISODES_MAPPED = 64  # whose rows stay mapped while data files are written


def convert_dataset(
    source: str | Path,
    output: str | Path,
    progress: bool = True,
    *,
    revision: str | None = None,
    features: Sequence[str] | None = None,
    episodes: Sequence[int] | None = None,
    tolerance_s: float = 1e-4,
    rename_map: Mapping[str, str] | None = None,
) -> Path:
    """Write the dataset `source` as LeRobot v3.0 into the new folder `output` and return it.

    Samples do not change, and frames stay equal bit for bit. Episodes move to shared files; they are numbered anew
    from 0 where some are left out. Videos are joined without being encoded again; one encoded with other settings
    begins a new file. Statistics with quantiles are computed for every episode and for the whole dataset, those of
    cameras from the decoded frames. The first and last frame of every episode are decoded from both datasets and
    compared.

    Args:
        source (`str` or `Path`): a folder or Hub id of a dataset of version 2.0, 2.1 or 3.0.
        output (`str` or `Path`): the folder to create; it appears complete or not at all.
        progress (`bool`, *optional*, defaults to True): show progress bars.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        features (`Sequence[str]`, *optional*): the features to keep; all by default.
        episodes (`Sequence[int]`, *optional*): the numbers of the episodes to keep; all by default.
        tolerance_s (`float`, *optional*, defaults to 1e-4): how far a frame may be from its timestamp [s].
        rename_map (`Mapping[str, str]`, *optional*): name of a feature in `source` → its name in `output`.

    Raises:
        OutputExistsError: `output` exists; nothing has been written.
        DatasetNotFoundError, DatasetVersionError, DatasetFormatError, VideoError: `source` cannot be read.
        UnknownDatasetFeatureError, DatasetIndexError: an argument that does not fit the dataset.
        FolderInUseError: another run writes `output`.
        DiskError: the disk does not take the dataset; what was written of it is removed.
    """
    output = Path(output)
    refuse_existing(output)
    root, downloaded = fetch_metadata(source, revision)
    metadata = load_metadata(root, rename_map)
    readable = choose_features(metadata.features, features, root)
    kept = choose_episodes(metadata.episode_numbers, episodes)
    needed = list(metadata.data_paths.of(kept))
    if downloaded:
        cameras = [places for name, places in metadata.videos.items() if features is None or name in readable]
        videos = {path for places in cameras for path in places.paths.of(kept)}
        fetch_files(str(source), metadata, [*needed, *videos])
    table = open_table(metadata, needed, rename_map)
    check_table(metadata, table, readable, tolerance_s)
    written = None if features is None else list(readable)
    with new_folder(output, f"a conversion of the dataset {source}") as folder:
        _Conversion(metadata, table, readable, written, kept, folder, tolerance_s, progress).run()
    return output


class _Conversion:
    """Convert one dataset into `folder`.

    Args:
        readable: the features that can be read; statistics are computed of the numbers and pictures among them.
        written: the names of those that are written, None: all, also what cannot be read.
        episodes: (n,) where the episodes to write are among those of the metadata.
    """

    def __init__(
        self,
        metadata: DatasetMetadata,
        table: FrameTable,
        readable: Mapping[str, dict],
        written: Sequence[str] | None,
        episodes: np.ndarray,
        folder: Path,
        tolerance_s: float,
        progress: bool,
    ):
        self._metadata, self._table, self._folder = metadata, table, folder
        self._written, self._tolerance_s, self._progress = written, tolerance_s, progress
        declared = metadata.info["features"]
        kept = declared if written is None else {name: f for name, f in declared.items() if name in written}
        self._info = {**SIZES_IN_MB, **metadata.info, "features": kept}
        if not np.array_equal(metadata.episode_numbers, np.arange(len(episodes))):
            self._info["splits"] = None  # of other numbers
        self._features = {name: feature for name, feature in readable.items() if feature["dtype"] != "string"}
        self._cameras = [name for name in metadata.videos if name in kept]
        self._episodes = episodes
        self._starts = metadata.episode_starts[episodes]
        self._lengths = metadata.episode_ends[episodes] - self._starts
        self._new_ends = np.cumsum(self._lengths)
        self._blocks = _blocks(self._lengths)
        self._reader = VideoReader(fps=metadata.fps)

    def run(self) -> None:
        for name in [name for name in self._features if name in self._table]:
            rows = self._table.not_finite(name, tuple(self._features[name]["shape"]))
            of_episode = np.searchsorted(self._metadata.episode_ends, rows, side="right")
            rows = rows[np.isin(of_episode, self._episodes)]
            if len(rows) and is_for_policies(name):
                raise not_finite(self._metadata, name, rows)
            if len(rows):
                logger.warning("%s has values that are not finite: it gets no statistics.", name)
                del self._features[name]
        columns = self._write_data()
        for camera in self._cameras:
            columns |= self._write_videos(camera)
        numbers = [name for name, feature in self._features.items() if feature["dtype"] not in CAMERAS]
        images = {name: ImageStatistics() for name in self._features if name not in numbers}
        self._write_episodes(columns, numbers, images)
        statistics = {
            name: images[name].compute() if name in images else self._number_statistics(name)
            for name in self._features
        }
        frames = int(self._new_ends[-1])
        write_summary(self._folder, self._info, self._metadata.tasks, len(self._episodes), frames, statistics)

    def _write_data(self) -> dict[str, Sequence]:
        """Write the data files; return the first columns of `meta/episodes`."""
        files, tasks, places = DataFiles(self._folder, self._info["data_files_size_in_mb"]), [], []
        schema = _typed_schema(self._table)
        for number in self._bar(range(len(self._episodes)), "data"):
            start, length, end = (int(each[number]) for each in (self._starts, self._lengths, self._new_ends))
            table = self._table.rows(start, start + length)
            tasks.append(
                [
                    instruction(self._metadata, task, int(self._episodes[number]))
                    for task in table["task_index"].unique().to_pylist()
                ]
            )
            table = datasets.table.table_cast(table, schema)
            if self._written is not None:
                table = table.select([name for name in table.column_names if name in self._written])
            table = _replaced(table, "episode_index", np.full(length, number))
            table = _replaced(table, "index", np.arange(end - length, end))
            places.append(tuple(files.append(table).values()))
            if number % _EPISODES_MAPPED == 0:
                self._table.release()
        files.close()
        chunks, numbers = np.asarray(places).T
        return {
            "episode_index": np.arange(len(self._episodes)),
            "tasks": tasks,
            "length": self._lengths,
            "data/chunk_index": chunks,
            "data/file_index": numbers,
            "dataset_from_index": self._new_ends - self._lengths,
            "dataset_to_index": self._new_ends,
        }

    def _write_videos(self, camera: str) -> dict[str, np.ndarray]:
        """Copy every video of `camera` once; return the columns that say where each episode's frames are."""
        places, fps = self._metadata.videos[camera], self._metadata.fps
        file_of, first = places.paths.file_of[self._episodes], places.from_timestamp[self._episodes]
        needed = np.zeros(len(places.paths.files), dtype=np.int64)  # frames up to the end of a file's last episode
        np.maximum.at(needed, file_of, np.rint(first * fps).astype(np.int64) + self._lengths)
        files = VideoFiles(self._folder, camera, fps, self._info["video_files_size_in_mb"])
        moved = {}
        for file in self._bar(list(dict.fromkeys(file_of.tolist())), camera.rpartition(".")[2]):
            place, start = files.append(self._metadata.root / places.paths.files[file], int(needed[file]))
            moved[file] = (*place.values(), start)
        files.close()
        chunks, numbers, starts = np.asarray([moved[file] for file in file_of.tolist()]).T
        place = {"chunk_index": chunks.astype(np.int64), "file_index": numbers.astype(np.int64)}
        return video_columns(camera, place, starts + first, self._lengths / fps)

    def _write_episodes(
        self, columns: Mapping[str, Sequence], numbers: Sequence[str], images: Mapping[str, ImageStatistics]
    ) -> None:
        """Write `meta/episodes` with the statistics of every episode, and count the pictures of all in `images`."""
        files = EpisodesFiles(self._folder, self._info["data_files_size_in_mb"])
        with tqdm(total=len(self._episodes), desc="episodes", disable=not self._progress, leave=False) as bar:
            for first, end in self._blocks:
                block = {name: pa.array(column[first:end]) for name, column in columns.items()}
                found = {name: self._values(name, first, end) for name in numbers}
                found = {
                    name: statistics_of_episodes(values, self._lengths[first:end]) for name, values in found.items()
                }
                for name, whole in images.items():
                    of_episodes = [self._images(name, number, columns) for number in range(first, end)]
                    whole.merge(of_episodes)
                    computed = [statistics.compute() for statistics in of_episodes]
                    found[name] = {key: np.stack([each[key] for each in computed]) for key in computed[0]}
                for name in self._features:
                    block |= statistics_columns(name, found[name])
                files.append(pa.table(block))
                self._table.release()
                bar.update(end - first)
        files.close()

    def _number_statistics(self, name: str) -> dict[str, np.ndarray]:
        """Return the statistics of a feature over the whole dataset."""

        def blocks() -> Iterator[np.ndarray]:
            for first, end in self._bar(self._blocks, f"{name.rpartition('.')[2]} statistics"):
                yield self._values(name, first, end)
                self._table.release()

        return statistics_of_blocks(blocks)

    def _values(self, name: str, first: int, end: int) -> np.ndarray:
        """Return a feature of the episodes from `first` to `end`, (frames, …), as it is written."""
        lengths = self._lengths[first:end]
        if name == "episode_index":
            return np.repeat(np.arange(first, end), lengths)[:, None]
        if name == "index":
            return np.arange(self._new_ends[first] - lengths[0], self._new_ends[end - 1])[:, None]
        rows = np.concatenate(list(row_blocks(self._starts[first:end], lengths)))
        if name in INDEX_FEATURES:
            return self._table.numbers(name, rows, ())[:, None]
        return self._table.numbers(name, rows, tuple(self._features[name]["shape"]))

    def _images(self, name: str, number: int, columns: Mapping[str, Sequence]) -> ImageStatistics:
        """Count the pixels of an episode's pictures."""
        statistics = ImageStatistics()
        if name in self._metadata.videos:
            pictures = self._video_frames(name, number, columns)
        else:
            pictures = self._stored_images(name, number)
        for image in pictures:
            statistics.add(image)
        return statistics

    def _video_frames(self, camera: str, number: int, columns: Mapping[str, Sequence]) -> Iterator[np.ndarray]:
        """Yield the episode's frames (3, h, w) as a reader of the new dataset will find them."""
        chunk, file, new_first = (
            columns[f"videos/{camera}/{key}"][number] for key in ("chunk_index", "file_index", "from_timestamp")
        )
        new = self._folder / VideoFiles.path(camera, int(chunk), int(file))
        episode, places = int(self._episodes[number]), self._metadata.videos[camera]
        old, old_first = self._metadata.root / places.paths[episode], places.from_timestamp[episode]
        steps = np.arange(self._lengths[number])
        seconds = exact_times(
            self._table.numbers("timestamp", self._starts[number] + steps, ()), steps, self._metadata.fps
        )
        for first in range(0, len(seconds), FRAMES_AT_ONCE):
            times = new_first + seconds[first:][:FRAMES_AT_ONCE]
            frames = self._reader.frames(new, times, self._tolerance_s)
            check_size(self._features, camera, old, frames.shape[-2:])
            yield from frames.numpy()
        ends = seconds[[0, -1]]
        moved = self._reader.frames(new, new_first + ends, self._tolerance_s)
        if not moved.equal(self._reader.frames(old, old_first + ends, self._tolerance_s)):
            raise VideoError(
                f"Episode {self._metadata.episode_numbers[episode]} of {old} does not decode to the same frames once "
                f"it is copied. Record it again, or encode the video anew with constant frame rate, and convert the "
                f"dataset then."
            )

    def _stored_images(self, camera: str, number: int) -> Iterator[np.ndarray]:
        """Yield the episode's images (h, w, 3) from the data files."""
        start = int(self._starts[number])
        for row in range(start, start + int(self._lengths[number])):
            yield picture(self._table, self._features, camera, row)

    def _bar(self, items: Iterable, title: str) -> Iterable:
        return tqdm(items, desc=title, disable=not self._progress, leave=False)


def _blocks(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return where blocks of episodes begin and end that have few rows together, or are one long episode."""
    block = np.cumsum(lengths) // ROWS_AT_ONCE
    cuts = np.flatnonzero(np.diff(block)) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(lengths)], strict=True))


def _typed_schema(table: FrameTable) -> pa.Schema:
    """Return the columns of a table as 🤗 datasets types them: as the files say, where they have these types."""
    typed: dict[str, object] = {}
    for path in table.paths:
        schema = pq.read_schema(path)
        features = datasets.Features.from_arrow_schema(schema)
        typed |= {name: (features[name], schema.field(name).type) for name in schema.names if name not in typed}
        if len(typed) == len(table.schema):
            break
    features = datasets.Features()
    for name, kind in zip(table.schema.names, table.schema.types, strict=True):
        feature, recorded = typed[table.recorded_name(name)]
        if stored_type(recorded) != kind:
            feature = datasets.Features.from_arrow_schema(pa.schema([(name, kind)]))[name]
        features[name] = feature
    return features.arrow_schema


def _replaced(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """Return a table with other numbers in a column of one number per row, whose type and place stay."""
    field = table.schema.field(name)
    if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
        return table  # such as lists of one number
    return table.set_column(table.column_names.index(name), field, pa.array(values).cast(field.type))
