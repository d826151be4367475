"""Write LeRobot v3.0 datasets, episode by episode."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .._disk import naming_disk_errors
from ..errors import DatasetFormatError, DiskFullError, OutputExistsError, RecordingError, VideoError, nearest
from .features import CAMERAS
from .layouts.writer import plain_statistics, write_metadata
from .recording.data_files import DataFiles
from .recording.episode import Episode
from .recording.frames import checked_frame, parquet_features, recorded_features
from .statistics import ImageStatistics, compute_statistics
from .table import as_numpy
from .video.encoder import ENCODERS, KEYFRAME_INTERVAL, PIXEL_FORMAT, check_size
from .video.joining import VideoFiles, video_columns

logger = logging.getLogger(__name__)


class LeRobotWriter:
    """Record episodes into a new LeRobot v3.0 dataset.

    Everything is written to `<root>.incomplete`, which becomes `<root>` on `close`. As a context manager an
    exception leaves neither of them behind; a full disk does so in any case, with `DiskFullError`.

    ```python
    with LeRobotWriter("demos", fps=10, features={"action": {"dtype": "float32", "shape": [4]}}) as writer:
        writer.add_frame({"action": action}, task="open the drawer")
        writer.end_episode()
    ```

    Args:
        root (`str` or `Path`): the folder to create.
        fps (`int`): frames per second.
        features (`Mapping[str, Mapping]`): name → `{"dtype": "float32" | … | "video" | "image",
            "shape": […], "names": […], "units": […]}`; names and units may be left out.
        robot_type (`str`, *optional*): the robot's name.
        codec (`str`, *optional*, defaults to `"h264"`): `"h264"` or `"av1"`.
        use_videos (`bool`, *optional*, defaults to True): without, cameras are stored losslessly as PNG.
        data_files_size_in_mb, video_files_size_in_mb (`float`): where the next file begins.

    Raises:
        OutputExistsError: `root` exists; nothing has been written.
        DatasetFormatError, VideoError: features, frame rate or codec that cannot be recorded.
    """

    def __init__(
        self,
        root: str | Path,
        fps: int,
        features: Mapping[str, Mapping],
        robot_type: str | None = None,
        codec: str = "h264",
        use_videos: bool = True,
        *,
        data_files_size_in_mb: float = 100,
        video_files_size_in_mb: float = 200,
    ):
        if not isinstance(fps, int) or fps < 1:
            raise DatasetFormatError(f"fps must be a whole number of frames per second, at least 1; got {fps!r}.")
        if codec not in ENCODERS:
            raise VideoError(f"There is no codec {codec!r}. {nearest(codec, ENCODERS)}")
        self.root, self.fps, self.robot_type, self.codec = Path(root), fps, robot_type, codec
        self.features = recorded_features(features, use_videos)
        self._parquet_features = parquet_features(self.features)
        self._sizes = {"data": data_files_size_in_mb, "video": video_files_size_in_mb}
        for name, feature in self.features.items():
            if feature["dtype"] == "video":
                check_size(name, feature["shape"], codec)
        self._folder = self.root.with_name(self.root.name + ".incomplete")
        for folder in (self.root, self._folder):
            if folder.exists():
                raise OutputExistsError(folder)
        with naming_disk_errors(self.root):
            self._folder.mkdir(parents=True)

        self._tasks: dict[str, int] = {}
        self._episodes: list[dict] = []
        self._num_frames = 0  # of the finished episodes
        self._data = DataFiles(self._folder, data_files_size_in_mb)
        cameras = [name for name, feature in self.features.items() if feature["dtype"] in CAMERAS]
        self._image_statistics = {name: ImageStatistics() for name in cameras}
        self._videos = {
            name: VideoFiles(self._folder, name, fps, video_files_size_in_mb)
            for name in cameras
            if self.features[name]["dtype"] == "video"
        }
        self._closed = False
        self._episode = self._new_episode()

    @property
    def num_episodes(self) -> int:
        """Number of finished episodes."""
        return len(self._episodes)

    def add_frame(self, frame: Mapping, task: str) -> None:
        """Add the next frame of the current episode.

        Args:
            frame (`Mapping`): every feature of the recording; images uint8 (h, w, 3) or (3, h, w).
            task (`str`): the instruction the robot follows.

        Raises:
            InvalidFrameError: a feature is missing, unknown, mis-shaped or not finite; nothing is added.
            DiskFullError: the disk is full; the whole recording is removed.
        """
        self._check_open()
        if not isinstance(task, str) or not task:
            raise RecordingError(f"Every frame needs its instruction as text; got task={task!r}.")
        checked = checked_frame(frame, self.features)
        with self._writing():
            self._episode.add(checked, task)

    def end_episode(self) -> None:
        """Write the frames added since the last episode as one episode.

        Raises:
            RecordingError: there are none.
            DiskFullError: the disk is full; the whole recording is removed.
        """
        self._check_open()
        if self._episode.length == 0:
            raise RecordingError("An episode needs at least one frame: call add_frame before end_episode.")
        with self._writing():
            self._write_episode(self._episode)
        self._episode = self._new_episode()

    def _write_episode(self, episode: Episode) -> None:
        length, encoded = episode.length, episode.finish()
        index, first = self.num_episodes, self._num_frames
        for task in episode.tasks:
            self._tasks.setdefault(task, len(self._tasks))
        columns = episode.columns | {
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, index),
            "index": np.arange(first, first + length),
            "task_index": np.asarray([self._tasks[task] for task in episode.tasks]),
        }
        columns = {
            name: np.stack(values) if name in episode.columns and name not in self._image_statistics else values
            for name, values in columns.items()
        }

        row = {"episode_index": index, "tasks": list(dict.fromkeys(episode.tasks)), "length": length}
        row |= self._data.append(self._as_table(columns))
        row |= {"dataset_from_index": first, "dataset_to_index": first + length}
        for camera, path in encoded.items():
            place, start = self._videos[camera].append(path, length)
            path.unlink()
            row |= video_columns(camera, place, start, length / self.fps)
        for name in self.features:
            if name in self._image_statistics:
                statistics = episode.image_statistics[name].compute()
                self._image_statistics[name].merge([episode.image_statistics[name]])
            else:
                statistics = compute_statistics(columns[name].reshape(length, *self.features[name]["shape"]))
            row |= {f"stats/{name}/{key}": value for key, value in plain_statistics(statistics).items()}
        self._episodes.append(row)
        self._num_frames += length

    def discard_episode(self) -> None:
        """Drop the frames added since the last episode."""
        self._check_open()
        self._episode.discard()
        self._episode = self._new_episode()

    def close(self) -> None:
        """Write the metadata and give the folder its name; frames of an unfinished episode are dropped.

        Raises:
            RecordingError: no episode was finished.
            DiskFullError: the disk is full; the whole recording is removed.
        """
        if self._closed:
            return
        if self._episode.length:
            logger.warning("Dropped %d frames after the last end_episode().", self._episode.length)
        with self._writing():
            self._episode.discard()
        if not self._episodes:
            raise RecordingError("A dataset needs at least one episode: call end_episode() after its last frame.")
        with self._writing():
            self._close_files()
            shutil.rmtree(self._folder / "encoding", ignore_errors=True)
            statistics = {name: self._statistics(name) for name in self.features}
            write_metadata(
                self._folder, self._info(), {i: task for task, i in self._tasks.items()}, self._episodes, statistics
            )
        if self.root.exists():
            raise OutputExistsError(self.root)
        os.replace(self._folder, self.root)
        self._closed = True

    def abort(self) -> None:
        """Remove everything written so far."""
        if not self._closed:
            self._closed = True
            # On a full disk closing a file fails as well, and it is removed anyway.
            for files in (self._episode.discard, self._data.close, *(video.close for video in self._videos.values())):
                with suppress(Exception):
                    files()
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()

    def _check_open(self) -> None:
        if self._closed:
            raise RecordingError(f"The recording of {self.root} is closed; make a new LeRobotWriter.")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with naming_disk_errors(self.root):
                yield
        except DiskFullError:
            self.abort()
            raise

    def _close_files(self) -> None:
        for files in (self._data, *self._videos.values()):
            files.close()

    def _new_episode(self) -> Episode:
        return Episode(self._folder / "encoding", self.features, self.fps, self.codec)

    def _as_table(self, columns: dict) -> pa.Table:
        ordered = {name: columns[name] for name in self._parquet_features}
        # A column of shape (1,) is a plain number in the file.
        for name, kind in self._parquet_features.items():
            if isinstance(kind, datasets.Value):
                ordered[name] = np.reshape(ordered[name], -1)
        return datasets.Dataset.from_dict(ordered, features=self._parquet_features).with_format("arrow")[:]

    # --- metadata ----------------------------------------------------------------------------------------

    def _statistics(self, name: str) -> dict[str, np.ndarray]:
        if name in self._image_statistics:
            return self._image_statistics[name].compute()
        # Read back one column at a time: memory does not grow while recording.
        shape = tuple(self.features[name]["shape"])
        chunks = [
            as_numpy(name, chunk, shape)
            for path in self._data.paths
            for chunk in pq.ParquetFile(path).read([name])[name].chunks
        ]
        return compute_statistics(np.concatenate(chunks))

    def _info(self) -> dict:
        features = {name: dict(feature) for name, feature in self.features.items()}
        for camera in self._videos:
            features[camera]["info"] = self._video_info(features[camera])
        return {
            "fps": self.fps,
            "features": features,
            "data_files_size_in_mb": self._sizes["data"],
            "video_files_size_in_mb": self._sizes["video"],
            "robot_type": self.robot_type,
        }

    def _video_info(self, feature: dict) -> dict:
        height, width, channels = feature["shape"]
        _, options = ENCODERS[self.codec]
        preset = options.get("preset")
        return {
            "video.height": height,
            "video.width": width,
            "video.codec": self.codec,
            "video.pix_fmt": PIXEL_FORMAT,
            "video.fps": self.fps,
            "video.channels": channels,
            "has_audio": False,
            "video.g": KEYFRAME_INTERVAL,
            "video.crf": int(options["crf"]),
            "video.preset": None if preset is None else int(preset),
            "video.fast_decode": 0,
            "video.video_backend": "pyav",
            "video.extra_options": {},
            "is_depth_map": False,
        }
