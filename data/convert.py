"""Convert a dataset of any version of the LeRobot format to version 3.0, with all statistics."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from .._files import new_folder, refuse_existing
from ..errors import VideoError
from .checks import check_size, check_table, instruction, is_for_policies, not_finite, picture
from .features import CAMERAS, INDEX_FEATURES
from .layouts.metadata import DatasetMetadata
from .layouts.reader import load_metadata
from .layouts.writer import plain_statistics, write_metadata
from .recording.data_files import DataFiles
from .selection import choose_episodes, choose_features
from .source import fetch_files, fetch_metadata
from .statistics import ImageStatistics, compute_statistics
from .table import FrameTable, open_table
from .video.joining import VideoFiles, video_columns
from .video.reader import VideoReader
from .windows import exact_times

logger = logging.getLogger(__name__)

SIZES_IN_MB = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}  # LeRobot's defaults
FRAMES_AT_ONCE = 64  # decoded together: this many frames are in memory


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
        self._episodes = episodes.tolist()
        self._bounds = [(int(metadata.episode_starts[e]), int(metadata.episode_ends[e])) for e in self._episodes]
        self._reader = VideoReader(fps=metadata.fps)

    def run(self) -> None:
        kept = np.concatenate([np.arange(start, end) for start, end in self._bounds])
        for name in [name for name in self._features if name in self._table]:
            rows = np.intersect1d(self._table.not_finite(name, tuple(self._features[name]["shape"])), kept)
            if len(rows) and is_for_policies(name):
                raise not_finite(self._metadata, name, rows)
            if len(rows):
                logger.warning("%s has values that are not finite: it gets no statistics.", name)
                del self._features[name]
        rows = self._write_data()
        for camera in self._cameras:
            self._write_videos(camera, rows)
        statistics = {}
        for name, feature in self._features.items():
            of_images = feature["dtype"] in CAMERAS
            statistics[name] = (self._image_statistics if of_images else self._number_statistics)(name, rows)
        write_metadata(self._folder, self._info, self._metadata.tasks, rows, statistics)

    def _write_data(self) -> list[dict]:
        """Write the data files; return one row per episode for `meta/episodes`."""
        files, rows, first = DataFiles(self._folder, self._info["data_files_size_in_mb"]), [], 0
        for number, (start, end) in enumerate(self._bar(self._bounds, "data")):
            table = self._table.rows(start, end)
            tasks = dict.fromkeys(table["task_index"].to_pylist())
            length = end - start
            row = {
                "episode_index": number,
                "tasks": [instruction(self._metadata, task, self._episodes[number]) for task in tasks],
                "length": length,
            }
            if self._written is not None:
                table = table.select([name for name in table.column_names if name in self._written])
            table = _replaced(table, "episode_index", np.full(length, number))
            table = _replaced(table, "index", np.arange(first, first + length))
            rows.append(row | files.append(table) | {"dataset_from_index": first, "dataset_to_index": first + length})
            first += length
        files.close()
        return rows

    def _places(self, camera: str) -> list[tuple[str, float]]:
        """Return the video of every episode that is written, and the time of its first frame there [s]."""
        places = self._metadata.videos[camera]
        return [(places.paths[episode], float(places.from_timestamp[episode])) for episode in self._episodes]

    def _write_videos(self, camera: str, rows: list[dict]) -> None:
        """Copy every video of `camera` once, and add each episode's new place to `rows`."""
        places, fps = self._places(camera), self._metadata.fps
        needed: dict[str, int] = {}  # frames up to the end of the last episode in the file
        for (path, first), row in zip(places, rows, strict=True):
            needed[path] = max(needed.get(path, 0), round(first * fps) + row["length"])
        files = VideoFiles(self._folder, camera, fps, self._info["video_files_size_in_mb"])
        moved = {
            path: files.append(self._metadata.root / path, count)
            for path, count in self._bar(needed.items(), camera.rpartition(".")[2])
        }
        files.close()
        for (path, first), row in zip(places, rows, strict=True):
            place, start = moved[path]
            row |= video_columns(camera, place, start + first, row["length"] / fps)

    def _number_statistics(self, name: str, rows: list[dict]) -> dict[str, np.ndarray]:
        """Add the statistics of every episode to `rows` and return those of the whole dataset."""
        if name in INDEX_FEATURES:  # some are numbered anew
            values = _index_values(name, rows, self._table, self._bounds)
        else:
            shape = tuple(self._features[name]["shape"])
            values = [self._table.numbers(name, np.arange(start, end), shape) for start, end in self._bounds]
        for row, part in zip(rows, values, strict=True):
            _add_statistics(row, name, compute_statistics(part))
        return compute_statistics(np.concatenate(values))

    def _image_statistics(self, name: str, rows: list[dict]) -> dict[str, np.ndarray]:
        """Add the statistics of every episode's frames to `rows` and return those of the whole dataset."""
        whole = ImageStatistics()
        for episode, row in enumerate(self._bar(rows, f"{name.rpartition('.')[2]} statistics")):
            frames = self._video_frames if name in self._metadata.videos else self._stored_images
            statistics = ImageStatistics()
            for image in frames(name, episode, row):
                statistics.add(image)
            whole.merge([statistics])
            _add_statistics(row, name, statistics.compute())
        return whole.compute()

    def _video_frames(self, camera: str, number: int, row: dict) -> Iterator[np.ndarray]:
        """Yield the episode's frames (3, h, w) as a reader of the new dataset will find them."""
        (path, first_time), (start, end) = self._places(camera)[number], self._bounds[number]
        place = {key: row[f"videos/{camera}/{key}"] for key in ("chunk_index", "file_index", "from_timestamp")}
        new = self._folder / VideoFiles.path(camera, place["chunk_index"], place["file_index"])
        old = self._metadata.root / path
        stated = self._table.numbers("timestamp", np.arange(start, end), ())
        seconds = exact_times(stated, np.arange(end - start), self._metadata.fps)
        for first in range(0, len(seconds), FRAMES_AT_ONCE):
            times = place["from_timestamp"] + seconds[first:][:FRAMES_AT_ONCE]
            frames = self._reader.frames(new, times, self._tolerance_s)
            check_size(self._features, camera, old, frames.shape[-2:])
            yield from frames.numpy()
        ends = seconds[[0, -1]]
        moved = self._reader.frames(new, place["from_timestamp"] + ends, self._tolerance_s)
        if not moved.equal(self._reader.frames(old, first_time + ends, self._tolerance_s)):
            raise VideoError(
                f"Episode {self._metadata.episode_numbers[self._episodes[number]]} of {old} does not decode to the "
                f"same frames once it is copied. Record it again, or encode the video anew with constant frame rate, "
                f"and convert the dataset then."
            )

    def _stored_images(self, camera: str, number: int, row: dict) -> Iterator[np.ndarray]:
        """Yield the episode's images (h, w, 3) from the data files."""
        for frame in range(*self._bounds[number]):
            yield picture(self._table, self._features, camera, frame)

    def _bar(self, items: Iterable, title: str) -> Iterable:
        return tqdm(items, desc=title, disable=not self._progress, leave=False)


def _add_statistics(row: dict, name: str, statistics: dict[str, np.ndarray]) -> None:
    row |= {f"stats/{name}/{key}": value for key, value in plain_statistics(statistics).items()}


def _replaced(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """Return a table with other numbers in a column of one number per row, whose type and place stay."""
    field = table.schema.field(name)
    if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
        return table  # such as lists of one number
    return table.set_column(table.column_names.index(name), field, pa.array(values).cast(field.type))


def _index_values(name: str, rows: list[dict], table: FrameTable, bounds: list[tuple[int, int]]) -> list[np.ndarray]:
    """Return an index column of every episode, (frames, 1), as it is written."""
    values = []
    for row, (start, end) in zip(rows, bounds, strict=True):
        if name == "episode_index":
            column = np.full(end - start, row["episode_index"])
        elif name == "index":
            column = np.arange(row["dataset_from_index"], row["dataset_to_index"])
        else:
            column = table.numbers(name, np.arange(start, end), ())
        values.append(column[:, None])
    return values
