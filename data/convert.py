"""Convert a dataset of any version of the LeRobot format to version 3.0, with all statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .._files import new_folder, refuse_existing
from ..errors import DatasetFormatError, VideoError
from .checks import check_table, instruction, not_finite
from .features import CAMERAS
from .images import decode_image
from .layouts.metadata import DatasetMetadata
from .layouts.reader import load_metadata
from .layouts.writer import plain_statistics, write_metadata
from .recording.data_files import DataFiles
from .selection import choose_features
from .source import fetch_files, fetch_metadata
from .statistics import ImageStatistics, compute_statistics
from .table import FrameTable, as_numpy
from .video.joining import VideoFiles, video_columns
from .video.reader import VideoReader

SIZES_IN_MB = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}  # LeRobot's defaults
FRAMES_AT_ONCE = 64  # decoded together: this many frames are in memory


def convert_dataset(
    source: str | Path, output: str | Path, progress: bool = True, *, revision: str | None = None
) -> Path:
    """Write the dataset `source` as LeRobot v3.0 into the new folder `output` and return it.

    Samples do not change, and frames stay equal bit for bit. Episodes move to shared files. Videos are joined
    without being encoded again; one encoded with other settings begins a new file. Statistics with quantiles are
    computed for every episode and for the whole dataset, those of cameras from the decoded frames. The first and
    last frame of every episode are decoded from both datasets and compared.

    Args:
        source (`str` or `Path`): a folder or Hub id of a dataset of version 2.0, 2.1 or 3.0.
        output (`str` or `Path`): the folder to create; it appears complete or not at all.
        progress (`bool`, *optional*, defaults to True): show progress bars.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Raises:
        OutputExistsError: `output` exists; nothing has been written.
        DatasetNotFoundError, DatasetVersionError, DatasetFormatError, VideoError: `source` cannot be read.
        FolderInUseError: another run writes `output`.
        DiskError: the disk does not take the dataset; what was written of it is removed.
    """
    output = Path(output)
    refuse_existing(output)
    root, downloaded = fetch_metadata(source, revision)
    metadata = load_metadata(root)
    if downloaded:
        fetch_files(str(source), metadata, metadata.files)
    table = FrameTable([root / path for path in metadata.data_files])
    check_table(metadata, table, choose_features(metadata.features, None), tolerance_s=1e-4)
    with new_folder(output, f"a conversion of the dataset {source}") as folder:
        _Conversion(metadata, table, folder, progress).run()
    return output


class _Conversion:
    """Convert one dataset into `folder`."""

    def __init__(self, metadata: DatasetMetadata, table: FrameTable, folder: Path, progress: bool):
        self._metadata, self._table, self._folder, self._progress = metadata, table, folder, progress
        self._info = {**SIZES_IN_MB, **metadata.info}
        self._features = {  # the ones with statistics
            name: feature
            for name, feature in choose_features(metadata.features, None).items()
            if feature["dtype"] != "string"
        }
        self._bounds = list(zip(metadata.episode_starts.tolist(), metadata.episode_ends.tolist(), strict=True))
        self._reader = VideoReader(fps=metadata.fps)

    def run(self) -> None:
        for name in self._features:
            row = self._table.first_not_finite(name) if name in self._table else None
            if row is not None:
                raise not_finite(self._metadata, name, [row])
        rows = self._write_data()
        for camera in self._metadata.videos:
            self._write_videos(camera, rows)
        statistics = {}
        for name, feature in self._features.items():
            of_images = feature["dtype"] in CAMERAS
            statistics[name] = (self._image_statistics if of_images else self._number_statistics)(name, rows)
        write_metadata(self._folder, self._info, self._metadata.tasks, rows, statistics)

    def _write_data(self) -> list[dict]:
        """Write the data files; return one row per episode for `meta/episodes`."""
        files, rows = DataFiles(self._folder, self._info["data_files_size_in_mb"]), []
        for episode, (start, end) in enumerate(self._bar(self._bounds, "data")):
            table = self._table.rows(start, end)
            tasks = dict.fromkeys(table["task_index"].to_pylist())
            row = {
                "episode_index": episode,
                "tasks": [instruction(self._metadata, task, episode) for task in tasks],
                "length": end - start,
            }
            rows.append(row | files.append(table) | {"dataset_from_index": start, "dataset_to_index": end})
        files.close()
        return rows

    def _write_videos(self, camera: str, rows: list[dict]) -> None:
        """Copy every video of `camera` once, and add each episode's new place to `rows`."""
        places, fps = self._metadata.videos[camera], self._metadata.fps
        needed: dict[str, int] = {}  # frames up to the end of the last episode in the file
        for path, first, row in zip(places.paths, places.from_timestamp, rows, strict=True):
            needed[path] = max(needed.get(path, 0), round(first * fps) + row["length"])
        files = VideoFiles(self._folder, camera, fps, self._info["video_files_size_in_mb"])
        moved = {
            path: files.append(self._metadata.root / path, count)
            for path, count in self._bar(needed.items(), camera.rpartition(".")[2])
        }
        files.close()
        for path, first, row in zip(places.paths, places.from_timestamp, rows, strict=True):
            place, start = moved[path]
            row |= video_columns(camera, place, start + float(first), row["length"] / fps)

    def _number_statistics(self, name: str, rows: list[dict]) -> dict[str, np.ndarray]:
        """Add the statistics of every episode to `rows` and return those of the whole dataset."""
        shape = tuple(int(size) for size in self._features[name]["shape"])
        values = np.concatenate([as_numpy(name, chunk, shape) for chunk in self._table.chunks(name)])
        for row, (start, end) in zip(rows, self._bounds, strict=True):
            _add_statistics(row, name, compute_statistics(values[start:end]))
        return compute_statistics(values)

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

    def _video_frames(self, camera: str, episode: int, row: dict) -> Iterator[np.ndarray]:
        """Yield the episode's frames (3, h, w) as a reader of the new dataset will find them."""
        places, (start, end) = self._metadata.videos[camera], self._bounds[episode]
        place = {key: row[f"videos/{camera}/{key}"] for key in ("chunk_index", "file_index", "from_timestamp")}
        new = self._folder / VideoFiles.path(camera, place["chunk_index"], place["file_index"])
        old = self._metadata.root / places.paths[episode]
        seconds = self._table.numbers("timestamp", np.arange(start, end), ()).astype(np.float64)
        for first in range(0, len(seconds), FRAMES_AT_ONCE):
            yield from self._reader.frames(new, place["from_timestamp"] + seconds[first:][:FRAMES_AT_ONCE]).numpy()
        ends = seconds[[0, -1]]
        moved = self._reader.frames(new, place["from_timestamp"] + ends)
        if not moved.equal(self._reader.frames(old, places.from_timestamp[episode] + ends)):
            raise VideoError(
                f"Episode {episode} of {old} does not decode to the same frames once it is copied. Record it again, "
                f"or encode the video anew with constant frame rate, and convert the dataset then."
            )

    def _stored_images(self, camera: str, episode: int, row: dict) -> Iterator[np.ndarray]:
        """Yield the episode's images (h, w, 3) from the data files."""
        for number in range(*self._bounds[episode]):
            try:
                yield decode_image(self._table.values(camera, [number])[0])
            except (OSError, TypeError) as error:
                raise DatasetFormatError(
                    f"Frame {number} of {camera} in {self._metadata.root} is not an image: {error}. Record it again."
                ) from error

    def _bar(self, items: Iterable, title: str) -> Iterable:
        return tqdm(items, desc=title, disable=not self._progress, leave=False)


def _add_statistics(row: dict, name: str, statistics: dict[str, np.ndarray]) -> None:
    row |= {f"stats/{name}/{key}": value for key, value in plain_statistics(statistics).items()}
