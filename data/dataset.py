"""Read LeRobot episodes as training samples.

Notation: t observation history, h action horizon, a action width, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..configuration.features import ACTION
from ..errors import (
    DatasetFormatError,
    DatasetIndexError,
    MissingVideoError,
)
from .checks import check_statistics, check_table, instruction, not_finite, warn_of_unlisted_files
from .features import CAMERAS
from .images import decode_image
from .layouts.reader import load_metadata
from .policy_features import PolicyFeatures, policy_features
from .selection import check_known, choose_episodes, choose_features, dimension_labels, samples_per_episode
from .source import fetch_files, fetch_metadata
from .table import FrameTable
from .video.frame_cache import FrameCache
from .video.reader import VideoReader
from .windows import OBSERVATION_PREFIX, sample_windows


class LeRobotDataset(Dataset):
    """Read the samples of a LeRobot dataset of version 2.0, 2.1 or 3.0.

    Numbers come from memory-mapped files, frames from video files that are opened when first needed in each
    process; the dataset can be pickled and works under forked and spawned DataLoader workers.

    A sample is a dictionary with the dataset's own feature names: float features as float32, cameras as uint8
    (3, h, w), `task` (`str`), and `timestamp` [s], `frame_index`, `episode_index`, `index`, `task_index` as
    0-d tensors. `action` is (h, a) for the steps 1-t … h-t; with t = `n_obs_steps` > 1 every `observation.*`
    is (t, …) for the steps 1-t … 0. Steps outside the episode repeat its first or last one, and
    `<feature>_is_pad` (steps,) is True there. As in LeRobot, other features of shape (1,) are 0-d and a
    camera with exactly one timestamp has no time dimension.

    Args:
        source (`str` or `Path`): a local folder, or a Hub id such as `"lerobot/pusht"`; of a Hub dataset only
            the files that are needed are downloaded, and cached files are used without a network.
        action_horizon (`int`, *optional*, defaults to 1): h, steps of `action`.
        n_obs_steps (`int`, *optional*, defaults to 1): t, steps of every observation, the last one now.
        features (`Sequence[str]`, *optional*): the features to read; other cameras are never decoded. By default
            all except language annotations and depth, which have no tensor form here.
        episodes (`Sequence[int]`, *optional*): the episodes to read, in the order of the dataset.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        delta_timestamps (`Mapping[str, Sequence[float]]`, *optional*): feature → times relative to the sample
            [s], in LeRobot's form; replaces the two counts above for the features it names.
        tolerance_s (`float`, *optional*, defaults to 1e-4): how far a frame may be from its timestamp [s].
        drop_n_last_frames (`int`, *optional*, defaults to 0): frames at every episode's end at which no sample
            starts; they are still read as part of earlier samples. `len()` counts samples.
        decoded_cache (`str` or `Path`, *optional*): a folder in which decoded frames are kept, so that no frame
            of a video is decoded twice; takes 3·h·w bytes of disk per frame and camera of the whole dataset.

    Raises:
        DatasetNotFoundError, MissingVideoError: no such folder or repository, or one of its files is missing.
        DatasetVersionError, DatasetFormatError: another version of the format, or files that contradict each other.
        UnknownDatasetFeatureError, DatasetIndexError, TimeWindowError: an argument that does not fit the dataset.

    Source: the formats of https://github.com/huggingface/lerobot.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        action_horizon: int = 1,
        n_obs_steps: int = 1,
        features: Sequence[str] | None = None,
        episodes: Sequence[int] | None = None,
        revision: str | None = None,
        delta_timestamps: Mapping[str, Sequence[float]] | None = None,
        tolerance_s: float = 1e-4,
        drop_n_last_frames: int = 0,
        decoded_cache: str | Path | None = None,
    ):
        root, downloaded = fetch_metadata(source, revision)
        self._metadata = load_metadata(root)
        self._features = choose_features(self._metadata.features, features)
        self._episodes = choose_episodes(len(self._metadata.episode_starts), episodes)
        for name in delta_timestamps or {}:
            check_known(name, self._features, "delta_timestamps")
        self._windows = sample_windows(
            self._features, self.fps, action_horizon, n_obs_steps, delta_timestamps, tolerance_s
        )
        self._tolerance_s = tolerance_s

        videos = self._video_paths()
        if downloaded:
            fetch_files(str(source), self._metadata, [*self._metadata.data_files, *videos])
        else:
            warn_of_unlisted_files(self._metadata)
        missing = [path for path in videos if not (root / path).is_file()]
        if missing:
            raise MissingVideoError(
                f"{root} lacks {len(missing)} video file(s): {', '.join(missing[:4])}. Download the dataset "
                f"again, or leave the camera out with features=[…]."
            )
        self._table = FrameTable([root / path for path in self._metadata.data_files])
        check_table(self._metadata, self._table, self._features, tolerance_s)
        self._reader = VideoReader(fps=self.fps)
        self._caches = {} if decoded_cache is None else self._open_caches(Path(decoded_cache).expanduser())

        # Position among the kept episodes' samples where each of them starts.
        starts = samples_per_episode(self.episode_lengths, drop_n_last_frames)
        self._positions = np.concatenate([[0], np.cumsum(starts)])

    # --- what the dataset is -----------------------------------------------------------------------------

    @property
    def root(self) -> Path:
        """The folder the dataset is read from."""
        return self._metadata.root

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self._metadata.fps

    @property
    def robot_type(self) -> str | None:
        """The robot's name, as recorded."""
        return self._metadata.robot_type

    @property
    def features(self) -> dict[str, dict]:
        """The kept features as `meta/info.json` declares them, index columns included, cameras always (h, w, c)."""
        return dict(self._features)

    @property
    def policy_features(self) -> PolicyFeatures:
        """The (inputs, outputs) of a policy for this dataset: name → `PolicyFeature`, cameras (c, h, w).

        Raises:
            UnknownDatasetFeatureError: a kept observation that no policy reads.
        """
        return policy_features(self._features)

    @property
    def camera_names(self) -> list[str]:
        """The feature names of the kept cameras."""
        return [name for name, feature in self._features.items() if feature["dtype"] in CAMERAS]

    @property
    def dimension_names(self) -> dict[str, list[str] | None]:
        """Feature → the name of every dimension of a vector (for cameras of every axis), None if unnamed."""
        return {name: dimension_labels(name, feature, "names") for name, feature in self._features.items()}

    @property
    def units(self) -> dict[str, list[str] | None]:
        """Feature → the unit of every dimension, None where the dataset does not record units."""
        return {name: dimension_labels(name, feature, "units") for name, feature in self._features.items()}

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Feature → min, max, mean, std, count, q01 … q99 over the whole dataset, float32.

        Cameras have shape (c, 1, 1) in [0, 1]. `episodes` does not change them. Versions 2.0 and 2.1 have no
        quantiles; `convert_dataset` computes them.

        Raises:
            DatasetFormatError: some are not finite; the message names the episode.
        """
        every = self._metadata.load_statistics()
        statistics = {name: values for name, values in every.items() if name in self._features}
        check_statistics(self._metadata, self._table, statistics)
        return statistics

    @property
    def tasks(self) -> list[str]:
        """Every instruction of the dataset, in the order of `task_index`."""
        return list(self._metadata.tasks.values())

    @property
    def episodes(self) -> list[int]:
        """The kept episodes."""
        return self._episodes.tolist()

    @property
    def episode_lengths(self) -> list[int]:
        """Frames of every kept episode."""
        return (self._metadata.episode_ends - self._metadata.episode_starts)[self._episodes].tolist()

    @property
    def num_episodes(self) -> int:
        """Number of kept episodes."""
        return len(self._episodes)

    @property
    def num_frames(self) -> int:
        """Number of frames in the kept episodes."""
        return sum(self.episode_lengths)

    @property
    def frame_rows(self) -> np.ndarray:
        """The rows of the kept episodes' frames (frames,), in the whole dataset."""
        starts, ends = self._metadata.episode_starts[self._episodes], self._metadata.episode_ends[self._episodes]
        return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])

    def numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return a vector feature at rows of the whole dataset: (*rows.shape, …), as recorded."""
        return self._table.numbers(name, rows, self._item_shape(name, self._features[name]))

    # --- samples -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self._positions[-1])

    def __getitem__(self, index: int) -> dict:
        """Return one sample; negative positions count from the end."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Return the samples at `indices`; a DataLoader fetches its whole batch with one call.

        Samples with the same frame may share its memory, so do not change frames in place.
        """
        rows, episodes = self._locate(indices)
        first = self._metadata.episode_starts[episodes]
        last = self._metadata.episode_ends[episodes] - 1
        samples = [{} for _ in rows]
        for name, feature in self._features.items():
            window = self._windows.get(name)
            steps = rows[:, None] + (window if window is not None else np.zeros(1, dtype=np.int64))
            inside = np.clip(steps, first[:, None], last[:, None])  # (samples, steps)
            values = self._read(name, feature, inside, episodes)
            for sample, value in zip(samples, values, strict=True):
                alone = window is None or (len(window) == 1 and feature["dtype"] in CAMERAS)
                sample[name] = value[0] if alone else value
            if window is not None:
                padded = torch.from_numpy(steps != inside)  # (samples, steps)
                for sample, row in zip(samples, padded, strict=True):
                    sample[f"{name}_is_pad"] = row
        for sample, episode in zip(samples, episodes, strict=True):
            sample["task"] = instruction(self._metadata, sample["task_index"].reshape(-1)[0].item(), int(episode))
        return samples

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the row in the dataset, and the episode, of every position among the samples."""
        positions = np.asarray(indices, dtype=np.int64).reshape(-1)
        outside = positions[(positions < -len(self)) | (positions >= len(self))]
        if outside.size:
            raise DatasetIndexError(f"There is no frame {outside[0]}: the dataset has frames 0 … {len(self) - 1}.")
        positions = np.where(positions < 0, positions + len(self), positions)
        kept = np.searchsorted(self._positions, positions, side="right") - 1
        episodes = self._episodes[kept]
        return self._metadata.episode_starts[episodes] + positions - self._positions[kept], episodes

    def _read(self, name: str, feature: dict, rows: np.ndarray, episodes: np.ndarray) -> Sequence:
        """Return the feature at `rows` (samples, steps), one entry (steps, …) per sample."""
        if feature["dtype"] == "video":
            return self._decode_videos(name, rows, episodes)
        if feature["dtype"] == "image":
            return self._decode_images(name, rows)
        if feature["dtype"] == "string":
            return [self._table.values(name, steps) for steps in rows]
        values = self.numbers(name, rows)  # (samples, steps, …)
        if np.issubdtype(values.dtype, np.floating):
            values = values.astype(np.float32, copy=False)
            # A few microseconds per batch; a single NaN in a batch ruins the whole policy.
            if not np.isfinite(values).all():
                wrong = ~np.isfinite(values).reshape(*rows.shape, -1).all(axis=-1)  # (samples, steps)
                raise not_finite(self._metadata, name, rows[wrong])
        return torch.from_numpy(values).unbind(0)

    def _decode_videos(self, camera: str, rows: np.ndarray, episodes: np.ndarray) -> list[torch.Tensor]:
        """Decode every distinct frame once; (steps, 3, h, w) per sample."""
        distinct, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
        episodes = episodes[first // rows.shape[1]]  # (distinct,)
        if camera in self._caches:
            frames = self._caches[camera].frames(
                distinct, lambda missing: self._decode(camera, distinct[missing], episodes[missing])
            )
        else:
            frames = self._decode(camera, distinct, episodes)
        return [_chosen(frames, steps) for steps in inverse.reshape(rows.shape)]

    def _decode(self, camera: str, rows: np.ndarray, episodes: np.ndarray) -> torch.Tensor:
        """Decode the frames of `rows` (n,), file by file: (n, 3, h, w)."""
        places = self._metadata.videos[camera]
        seconds = places.from_timestamp[episodes] + self._table.numbers("timestamp", rows, ())
        paths = np.asarray([places.paths[episode] for episode in episodes])
        decoded = {
            path: self._reader.frames(self.root / path, seconds[paths == path], self._tolerance_s)
            for path in dict.fromkeys(paths.tolist())
        }
        frames = decoded[paths[0]]  # (n, 3, h, w)
        if len(decoded) > 1:
            frames = frames.new_empty(len(rows), *frames.shape[1:])
            for path, part in decoded.items():
                frames[torch.from_numpy(paths == path)] = part
        return frames

    def _decode_images(self, camera: str, rows: np.ndarray) -> list[torch.Tensor]:
        """Decode PNG or JPEG bytes kept in the table; (steps, 3, h, w) per sample."""
        distinct, inverse = np.unique(rows, return_inverse=True)
        frames = []
        for row, value in zip(distinct, self._table.values(camera, distinct), strict=True):
            try:
                pixels = decode_image(value)  # (h, w, 3)
            except (OSError, TypeError) as error:
                raise DatasetFormatError(
                    f"Frame {row} of {camera} in {self.root} is not an image: {error}. Record it again."
                ) from error
            frames.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())  # (3, h, w)
        return [_stacked([frames[i] for i in steps]) for steps in inverse.reshape(rows.shape)]

    @staticmethod
    def _item_shape(name: str, feature: dict) -> tuple[int, ...]:
        shape = tuple(int(size) for size in feature["shape"])
        vector = name == ACTION or name.startswith(OBSERVATION_PREFIX)  # policies need their width, even of 1
        return () if shape == (1,) and not vector else shape

    # --- files of the kept features ------------------------------------------------------------------------------

    def _video_paths(self) -> list[str]:
        kept = [self._metadata.videos[name] for name in self._features if name in self._metadata.videos]
        return sorted({places.paths[episode] for places in kept for episode in self._episodes})

    def _open_caches(self, folder: Path) -> dict[str, FrameCache]:
        caches = {}
        for camera in self._metadata.videos.keys() & self._features.keys():
            height, width, _ = self._features[camera]["shape"]
            videos = {self.root / path for path in self._metadata.videos[camera].paths}
            videos = [path for path in videos if path.is_file()]  # of all episodes, kept or not
            caches[camera] = FrameCache(folder, camera, videos, len(self._table), (int(height), int(width)))
        return caches


def _chosen(frames: torch.Tensor, steps: np.ndarray) -> torch.Tensor:
    """Return frames[steps], (steps, 3, h, w), without a copy where they follow one another."""
    if np.all(np.diff(steps) == 1):
        return frames[steps[0] : steps[-1] + 1]
    return frames[torch.from_numpy(steps)]


def _stacked(frames: list[torch.Tensor]) -> torch.Tensor:
    """Return (steps, 3, h, w), without a copy for one step."""
    return frames[0][None] if len(frames) == 1 else torch.stack(frames)
