"""Read LeRobot episodes as training samples.

Notation: t observation history, h action horizon, a action width, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from ..configuration.features import ACTION
from ..errors import DatasetFormatError, DatasetIndexError, MissingVideoError
from .checks import (
    check_size,
    check_table,
    instruction,
    is_for_policies,
    not_finite,
    picture,
    warn_of_unlisted_files,
)
from .description import DescribedDataset
from .layouts.files import are_files
from .layouts.reader import load_metadata
from .remedies import LEAVE_OUT_FEATURE, LEAVE_OUT_FEATURE_OR_EPISODE
from .selection import (
    check_known,
    choose_episodes,
    choose_features,
    samples_per_episode,
)
from .source import fetch_files, fetch_metadata
from .summary import html_summary, text_summary
from .table.frame_table import open_table
from .video.frame_cache import FrameCache
from .video.reader import VideoReader
from .windows import OBSERVATION_PREFIX, exact_times, sample_windows

# torch has no arithmetic in these: the type that holds every value of theirs.
_SIGNED = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}


class LeRobotDataset(DescribedDataset, Dataset):
    """Read the samples of a LeRobot dataset of version 2.0, 2.1 or 3.0.

    Numbers come from memory-mapped files, frames from video files that are opened when first needed in each
    process; the dataset can be pickled and works under forked and spawned DataLoader workers.

    A sample is a dictionary with the dataset's own feature names: float features as float32, cameras as uint8
    (3, h, w), `task` (`str`), and `timestamp` [s], `frame_index`, `episode_index`, `index`, `task_index` as
    0-d tensors. `action` is (h, a) for the steps 1-t … h-t; with t = `n_obs_steps` > 1 every `observation.*`
    is (t, …) for the steps 1-t … 0. Steps outside the episode repeat its first or last one, and
    `<feature>_is_pad` (steps,) is True there. As in LeRobot, other features of shape (1,) are 0-d and a
    camera on video with exactly one timestamp has no time dimension.

    `dataset[3]`, `dataset[-1]` and `dataset[np.int64(3)]` are samples; `dataset[0:3]` and `dataset[[0, 5]]` are
    batches, as a DataLoader makes them: every feature stacked (b, …), and the list of the tasks.

    Args:
        source (`str` or `Path`): a local folder, or a Hub id such as `"lerobot/pusht"`; of a Hub dataset only
            the files that are needed are downloaded, and cached files are used without a network.
        action_horizon (`int`, *optional*, defaults to 1): h, steps of `action`.
        n_obs_steps (`int`, *optional*, defaults to 1): t, steps of every observation, the last one now.
        features (`Sequence[str]`, *optional*): the features to read; other cameras are never decoded. By default
            all except language annotations and depth, which have no tensor form here; a warning names them.
        episodes (`Sequence[int]`, *optional*): the episodes to read, by their numbers, in the order of the dataset.
            Files of others need not be there.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        delta_timestamps (`Mapping[str, Sequence[float]]`, *optional*): feature → times relative to the sample
            [s], in LeRobot's form; replaces the two counts above for the features it names.
        tolerance_s (`float`, *optional*, defaults to 1e-4): how far a frame may be from its timestamp [s], beyond the
            rounding of float32.
        drop_n_last_frames (`int`, *optional*, defaults to 0): frames at every episode's end at which no sample
            starts; they are still read as part of earlier samples. `len()` counts samples.
        decoded_cache (`str` or `Path`, *optional*): a folder in which decoded frames are kept, so that no frame
            of a video is decoded twice; takes 3·h·w bytes of disk per frame and camera of the whole dataset.
        rename_map (`Mapping[str, str]`, *optional*): name of a feature in the dataset → the name it has here, such as
            `{"state": "observation.state", "actions": "action"}`. All other arguments take the new names.

    Raises:
        DatasetNotFoundError, MissingVideoError: no such folder or repository, or one of its files is missing.
        DatasetVersionError, DatasetFormatError: another version of the format, or files that contradict each other.
        UnknownDatasetFeatureError, DatasetIndexError, TimeWindowError: an argument that does not fit the dataset.
        ReadOnlyError, DiskFullError: a cache cannot be written.

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
        rename_map: Mapping[str, str] | None = None,
    ):
        root, downloaded = fetch_metadata(source, revision)
        self._metadata = load_metadata(root, rename_map)
        self._features = choose_features(self._metadata.features, features, root)
        self._episodes = choose_episodes(self._metadata.episode_numbers, episodes)
        for name in delta_timestamps or {}:
            check_known(name, self._features, "delta_timestamps")
        self._windows = sample_windows(
            self._features, self.fps, action_horizon, n_obs_steps, delta_timestamps, tolerance_s
        )
        self._tolerance_s = tolerance_s
        self._open_files(source, downloaded, rename_map)
        self._reader = VideoReader(fps=self.fps)
        self._caches = {} if decoded_cache is None else self._open_caches(Path(decoded_cache).expanduser())

        # Position among the kept episodes' samples where each of them starts.
        starts = samples_per_episode(self._lengths, drop_n_last_frames)
        self._positions = np.concatenate([[0], np.cumsum(starts)])

    def _open_files(self, source: str | Path, downloaded: bool, rename_map: Mapping[str, str] | None) -> None:
        """Check that every file is here, downloaded first from the Hub, and open those with numbers."""
        root = self.root
        needed = list(self._metadata.data_paths.of(self._episodes))
        videos = self._video_paths()
        if downloaded:
            fetch_files(str(source), self._metadata, [*needed, *videos])
        else:
            warn_of_unlisted_files(self._metadata)
        missing = np.flatnonzero(~are_files([root / path for path in videos]))
        if missing.size:
            raise MissingVideoError(
                f"{root} lacks {len(missing)} video file(s): {', '.join(videos[i] for i in missing[:4])}. Download "
                f"the dataset again. "
                f"{LEAVE_OUT_FEATURE_OR_EPISODE}."
            )
        self._table = open_table(self._metadata, needed, rename_map)
        check_table(self._metadata, self._table, self._features, self._tolerance_s)

    # --- samples ---------------------------------------------------------------------------------------------

    def numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return a vector feature at rows of the whole dataset: (*rows.shape, …), as recorded."""
        return self._table.numbers(name, rows, self._item_shape(name, self._features[name]))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int | slice | Sequence[int]) -> dict:
        """Return one sample, or of a slice or list a batch of them; negative positions count from the end."""
        if isinstance(index, slice):
            return self._batch(range(len(self))[index])
        if np.ndim(index):
            return self._batch(index)
        return self.__getitems__([index])[0]

    def _batch(self, indices: Sequence[int]) -> dict:
        if not len(indices):  # no samples, but the shapes of one
            return {name: value[:0] for name, value in self._batch([0]).items()}
        return default_collate(self.__getitems__(indices))

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Return the samples at `indices`; a DataLoader fetches its whole batch with one call.

        Samples with the same frame may share its memory, so do not change frames in place.
        """
        return self.samples_at(indices)

    def samples_at(self, indices: Sequence[int]) -> list[dict]:
        """Return the samples at positions 0 … num_samples - 1."""
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
                alone = window is None or (len(window) == 1 and feature["dtype"] == "video")
                sample[name] = value[0] if alone else value
            if window is not None:
                padded = torch.from_numpy(steps != inside)  # (samples, steps)
                for sample, row in zip(samples, padded, strict=True):
                    sample[f"{name}_is_pad"] = row
        for sample, episode in zip(samples, episodes, strict=True):
            sample["task"] = instruction(self._metadata, sample["task_index"].reshape(-1)[0].item(), episode)
        return samples

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the row in the dataset, and the episode, of every position among the samples."""
        positions = np.asarray(indices)
        if positions.dtype.kind not in "iu":
            raise DatasetIndexError(
                f"A sample is chosen by a whole number, several by a slice or a list of them; got {indices!r:.200}."
            )
        positions = positions.astype(np.int64).reshape(-1)
        outside = positions[(positions < -self.num_samples) | (positions >= self.num_samples)]
        if outside.size:
            raise DatasetIndexError(
                f"There is no frame {outside[0]}: the dataset has frames 0 … {self.num_samples - 1}."
            )
        positions = np.where(positions < 0, positions + self.num_samples, positions)
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
            if is_for_policies(name) and not np.isfinite(values).all():
                wrong = ~np.isfinite(values).reshape(*rows.shape, -1).all(axis=-1)  # (samples, steps)
                raise not_finite(self._metadata, name, rows[wrong])
        elif values.dtype.name in _SIGNED:
            if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
                raise DatasetFormatError(
                    f"{name} in {self.root} holds {values.max()}, which is no 64-bit integer with a sign. "
                    f"{LEAVE_OUT_FEATURE}."
                )
            values = values.astype(_SIGNED[values.dtype.name])
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
        stated = self._table.numbers("timestamp", rows, ())
        seconds = places.from_timestamp[episodes] + exact_times(
            stated, rows - self._metadata.episode_starts[episodes], self.fps
        )
        files = places.paths.file_of[episodes]  # (n,)
        decoded = {
            file: self._frames_of(camera, places.paths.files[file], seconds[files == file])
            for file in dict.fromkeys(files.tolist())
        }
        frames = decoded[int(files[0])]  # (n, 3, h, w)
        if len(decoded) > 1:
            frames = frames.new_empty(len(rows), *frames.shape[1:])
            for file, part in decoded.items():
                frames[torch.from_numpy(files == file)] = part
        return frames

    def _frames_of(self, camera: str, path: str, seconds: np.ndarray) -> torch.Tensor:
        frames = self._reader.frames(self.root / path, seconds, self._tolerance_s)  # (n, 3, h, w)
        check_size(self._features, camera, self.root / path, frames.shape[-2:])
        return frames

    def _decode_images(self, camera: str, rows: np.ndarray) -> list[torch.Tensor]:
        """Decode PNG or JPEG bytes kept in the table; (steps, 3, h, w) per sample."""
        distinct, inverse = np.unique(rows, return_inverse=True)
        frames = []
        for row in distinct.tolist():
            pixels = picture(self._table, self._features, camera, row)  # (h, w, 3)
            frames.append(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())  # (3, h, w)
        return [_stacked([frames[i] for i in steps]) for steps in inverse.reshape(rows.shape)]

    @staticmethod
    def _item_shape(name: str, feature: dict) -> tuple[int, ...]:
        shape = tuple(int(size) for size in feature["shape"])
        vector = name == ACTION or name.startswith(OBSERVATION_PREFIX)  # policies need their width, even of 1
        return () if shape == (1,) and not vector else shape

    # --- how it is shown ----------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return text_summary(self)

    def _repr_html_(self) -> str:
        return html_summary(self)

    # --- files of the kept features ------------------------------------------------------------------------------

    def _video_paths(self) -> list[str]:
        kept = [self._metadata.videos[name] for name in self._features if name in self._metadata.videos]
        return sorted({path for places in kept for path in places.paths.of(self._episodes)})

    def _open_caches(self, folder: Path) -> dict[str, FrameCache]:
        caches = {}
        for camera in self._metadata.videos.keys() & self._features.keys():
            height, width, _ = self._features[camera]["shape"]
            videos = [self.root / path for path in self._metadata.videos[camera].paths.files]
            videos = list(compress(videos, are_files(videos)))  # of all episodes, kept or not
            rows = int(self._metadata.episode_ends[-1])
            caches[camera] = FrameCache(folder, camera, videos, rows, (int(height), int(width)))
        return caches


def _chosen(frames: torch.Tensor, steps: np.ndarray) -> torch.Tensor:
    """Return frames[steps], (steps, 3, h, w), without a copy where they follow one another."""
    if np.all(np.diff(steps) == 1):
        return frames[steps[0] : steps[-1] + 1]
    return frames[torch.from_numpy(steps)]


def _stacked(frames: list[torch.Tensor]) -> torch.Tensor:
    """Return (steps, 3, h, w), without a copy for one step."""
    return frames[0][None] if len(frames) == 1 else torch.stack(frames)
