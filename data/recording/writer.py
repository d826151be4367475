"""Write LeRobot v3.0 datasets, episode by episode."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..._disk import naming_disk_errors
from ..._lock import OutputLock
from ...errors import (
    DatasetFormatError,
    DiskError,
    OutputExistsError,
    RecordingError,
    VideoError,
    add_note,
    nearest,
)
from ..features import CAMERAS
from ..layouts.writer import plain_statistics, write_metadata
from ..statistics.computing import ImageStatistics, compute_statistics
from ..table.columns import as_numpy
from ..video.encoder import ENCODERS, KEYFRAME_INTERVAL, PIXEL_FORMAT, check_size
from ..video.joining import VideoFiles, video_columns
from .data_files import DataFiles
from .episode import Episode
from .frames import checked_frame, parquet_features, recorded_features
from .kept import KeptEpisode, KeptEpisodes, clear_published
from .place import recording_folder

logger = logging.getLogger(__name__)


class LeRobotWriter:
    """Record episodes into a new LeRobot v3.0 dataset.

    Every episode is safe in `<root>.recording` from the moment it is finished; `close` makes the dataset `root` of
    them. A recording that was stopped, by an exception, a full disk or a kill, goes on with the same arguments: the
    finished episodes are there, `num_episodes` counts them, and the dataset is the one that an undisturbed recording
    would have given. Only the episode that was not finished is dropped.

    ```python
    with LeRobotWriter("demos", fps=10, features={"action": {"dtype": "float32", "shape": [4]}}) as writer:
        while writer.num_episodes < 50:
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
        origin (`Mapping`, *optional*): plain values that say where the episodes come from; only a recording with the
            same goes on.

    Raises:
        OutputExistsError: `root` exists; nothing has been written.
        FolderInUseError: another writer, of this process or another, records there.
        DifferentRecordingError: finished episodes wait there that have other features, rate, … or origin.
        DatasetFormatError, VideoError: features, frame rate or codec that cannot be recorded.
        DiskError: the disk does not take the recording.
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
        origin: Mapping[str, Any] | None = None,
    ):
        if not isinstance(fps, int) or fps < 1:
            raise DatasetFormatError(f"fps must be a whole number of frames per second, at least 1; got {fps!r}.")
        if codec not in ENCODERS:
            raise VideoError(f"There is no codec {codec!r}. {nearest(codec, ENCODERS)}")
        self.root, self.fps, self.robot_type, self.codec = Path(root), fps, robot_type, codec
        self.features = recorded_features(features, use_videos)
        self._parquet_features = parquet_features(self.features)
        self._sizes = {
            "data_files_size_in_mb": data_files_size_in_mb,
            "video_files_size_in_mb": video_files_size_in_mb,
        }
        for name, feature in self.features.items():
            if feature["dtype"] == "video":
                check_size(name, feature["shape"], codec)
        self._cameras = [name for name, feature in self.features.items() if feature["dtype"] in CAMERAS]
        self._videos = [name for name in self._cameras if self.features[name]["dtype"] == "video"]

        folder = recording_folder(self.root)
        if self.root.exists():
            clear_published(folder)
            raise OutputExistsError(self.root)
        self._lock = OutputLock(self.root, "a recording")
        settings = {"fps": fps, "features": self.features, "robot_type": robot_type, "codec": codec}
        settings |= self._sizes | {"origin": origin}
        try:
            with naming_disk_errors(self.root):
                self._kept = KeptEpisodes(folder, settings)
                self._kept.discard_current()
        except BaseException:
            self._lock.release()
            raise
        if self.num_episodes:
            logger.warning("The recording of %s goes on after its %d finished episodes.", root, self.num_episodes)
        self._closed = False
        self._episode = self._new_episode()

    @property
    def num_episodes(self) -> int:
        """Number of finished episodes, those of an earlier run included."""
        return len(self._kept.episodes)

    @property
    def folder(self) -> Path:
        """Where finished episodes wait for the dataset to be made of them."""
        return self._kept.folder

    @property
    def episodes(self) -> list[KeptEpisode]:
        """What is known of every finished episode: `length`, `tasks`, `note`."""
        return list(self._kept.episodes)

    def add_frame(self, frame: Mapping, task: str) -> None:
        """Add the next frame of the current episode.

        Args:
            frame (`Mapping`): every feature of the recording; images uint8 (h, w, 3) or (3, h, w).
            task (`str`): the instruction the robot follows.

        Raises:
            InvalidFrameError: a feature is missing, unknown, mis-shaped or not finite; nothing is added.
            DiskError: the disk does not take the frame; the current episode is dropped, finished ones are kept.
        """
        self._check_open()
        if not isinstance(task, str) or not task:
            raise RecordingError(f"Every frame needs its instruction as text; got task={task!r}.")
        checked = checked_frame(frame, self.features)
        with self._writing():
            self._episode.add(checked, task)

    def end_episode(self, note: Mapping[str, Any] | None = None) -> None:
        """Finish the frames added since the last episode as one episode; from now on it survives everything.

        Args:
            note (`Mapping`, *optional*): plain values to find in `episodes` when the recording goes on.

        Raises:
            RecordingError: there are none.
            DiskError: the disk does not take the episode; it is dropped, finished ones are kept.
        """
        self._check_open()
        if self._episode.length == 0:
            raise RecordingError("An episode needs at least one frame: call add_frame before end_episode.")
        with self._writing():
            self._keep(self._episode, dict(note or {}))
        self._episode = self._new_episode()

    def _keep(self, episode: Episode, note: dict[str, Any]) -> None:
        length = episode.length
        episode.finish()
        index, first = self.num_episodes, sum(kept.length for kept in self._kept.episodes)
        tasks = list(dict.fromkeys(episode.tasks))
        numbers = self._task_numbers(tasks)
        columns = episode.columns | {
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, index),
            "index": np.arange(first, first + length),
            "task_index": np.asarray([numbers[task] for task in episode.tasks]),
        }
        columns = {
            name: np.stack(values) if name in episode.columns and name not in self._cameras else values
            for name, values in columns.items()
        }
        statistics, histograms = {}, {}
        for name in self.features:
            if name in self._cameras:
                of_images = episode.image_statistics[name]
                found, histograms[name] = of_images.compute(), (of_images.histogram.tolist(), of_images.num_images)
            else:
                found = compute_statistics(columns[name].reshape(length, *self.features[name]["shape"]))
            statistics[name] = plain_statistics(found)
        self._kept.add(KeptEpisode(length, tasks, statistics, histograms, note), self._as_table(columns))

    def discard_episode(self) -> None:
        """Drop the frames added since the last episode."""
        self._check_open()
        self._drop_current()

    def close(self) -> None:
        """Make the dataset of the finished episodes; frames of an unfinished episode are dropped.

        Raises:
            RecordingError: no episode was finished.
            DiskError: the disk does not take the dataset, which needs the space of the episodes once more; the
                episodes are kept, and `close` may be called again.
        """
        if self._closed:
            return
        if self._episode.length:
            logger.warning("Dropped %d frames after the last end_episode().", self._episode.length)
        self._drop_current()
        if not self.num_episodes:
            raise RecordingError("A dataset needs at least one episode: call end_episode() after its last frame.")
        if self.root.exists():
            raise OutputExistsError(self.root)
        with self._writing():
            try:
                self._write_dataset(self._kept.dataset)
                self._kept.publish(self.root)
            except BaseException:
                shutil.rmtree(self._kept.dataset, ignore_errors=True)
                raise
        self._closed = True
        self._lock.release()

    def stop(self) -> None:
        """Leave the recording as it is: finished episodes wait for a writer with the same arguments."""
        if self._closed:
            return
        self._drop_current()
        self._closed = True
        if not self.num_episodes:
            self._kept.remove()
        self._lock.release()

    def abort(self) -> None:
        """Remove everything recorded so far, finished episodes too."""
        if not self._closed:
            self._drop_current()
            self._closed = True
            self._kept.remove()
            self._lock.release()

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind, error: BaseException | None, _) -> None:
        try:
            if error is None:
                self.close()
        except BaseException as raised:
            error = raised
            raise
        finally:
            if error is not None and not isinstance(error, DiskError):  # which says it itself
                add_note(error, self._what_is_kept)
            self.stop()

    @property
    def _what_is_kept(self) -> str:
        count = self.num_episodes
        if self._closed or not count:
            return ""
        episodes = "1 finished episode is" if count == 1 else f"{count} finished episodes are"
        return f"{episodes} kept in {self.folder}: the same recording goes on after {'it' if count == 1 else 'them'}."

    def _check_open(self) -> None:
        if self._closed:
            raise RecordingError(f"The recording of {self.root} is closed; make a new LeRobotWriter.")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with naming_disk_errors(self.root, self._what_is_kept):
                yield
        except BaseException:
            self._drop_current()  # cut off anywhere, it cannot go on
            raise

    def _drop_current(self) -> None:
        self._episode.discard()
        self._kept.discard_current()
        self._episode = self._new_episode()

    def _new_episode(self) -> Episode:
        return Episode(self._kept.current, self.features, self.fps, self.codec)

    def _task_numbers(self, further: list[str] | None = None) -> dict[str, int]:
        """Return the `task_index` of every instruction so far, and of further ones."""
        tasks = [task for episode in self._kept.episodes for task in episode.tasks]
        return {task: number for number, task in enumerate(dict.fromkeys([*tasks, *(further or [])]))}

    def _as_table(self, columns: dict) -> pa.Table:
        ordered = {name: columns[name] for name in self._parquet_features}
        # A column of shape (1,) is a plain number in the file.
        for name, kind in self._parquet_features.items():
            if isinstance(kind, datasets.Value):
                ordered[name] = np.reshape(ordered[name], -1)
        return datasets.Dataset.from_dict(ordered, features=self._parquet_features).with_format("arrow")[:]

    # --- the dataset ---------------------------------------------------------------------------------------------

    def _write_dataset(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
        folder.mkdir()
        data = DataFiles(folder, self._sizes["data_files_size_in_mb"])
        limit = self._sizes["video_files_size_in_mb"]
        videos = {camera: VideoFiles(folder, camera, self.fps, limit) for camera in self._videos}
        rows, first = [], 0
        try:
            for index, episode in enumerate(self._kept.episodes):
                row = {"episode_index": index, "tasks": episode.tasks, "length": episode.length}
                row |= data.append(self._kept.table(index))
                row |= {"dataset_from_index": first, "dataset_to_index": first + episode.length}
                for camera, files in videos.items():
                    place, start = files.append(self._kept.video(index, camera), episode.length)
                    row |= video_columns(camera, place, start, episode.length / self.fps)
                for name, statistics in episode.statistics.items():
                    row |= {f"stats/{name}/{key}": value for key, value in statistics.items()}
                rows.append(row)
                first += episode.length
        except BaseException:
            for files in (data, *videos.values()):
                with suppress(Exception):  # on a full disk closing them fails as well
                    files.close()
            raise
        for files in (data, *videos.values()):
            files.close()
        statistics = {name: self._statistics(name, data.paths) for name in self.features}
        tasks = {number: task for task, number in self._task_numbers().items()}
        write_metadata(folder, self._info(), tasks, rows, statistics)

    def _statistics(self, name: str, data_files: list[Path]) -> dict[str, np.ndarray]:
        if name in self._cameras:
            return ImageStatistics().merge(each.image_statistics(name) for each in self._kept.episodes).compute()
        # Read back one column at a time: memory does not grow while recording.
        shape = tuple(self.features[name]["shape"])
        chunks = [
            as_numpy(name, chunk, shape)
            for path in data_files
            for chunk in pq.ParquetFile(path).read([name])[name].chunks
        ]
        return compute_statistics(np.concatenate(chunks))

    def _info(self) -> dict:
        features = {name: dict(feature) for name, feature in self.features.items()}
        for camera in self._videos:
            features[camera]["info"] = self._video_info(features[camera])
        return {"fps": self.fps, "features": features, "robot_type": self.robot_type} | self._sizes

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
