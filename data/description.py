"""DescribedDataset: what a LeRobot dataset is, without its samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ..configuration.features import ACTION
from .checks import is_for_policies
from .features import CAMERAS, INDEX_FEATURES
from .layouts.metadata import DatasetMetadata
from .policy_features import PolicyFeatures, policy_features
from .selection import ROWS_AT_ONCE, named_dimensions, row_blocks
from .statistics.checks import checked_statistics
from .table.frame_table import FrameTable


class DescribedDataset:
    """Say what a dataset is: its features, its episodes, its rates, its statistics."""

    _metadata: DatasetMetadata
    _features: dict[str, dict]  # the kept ones
    _episodes: np.ndarray  # (kept,) where the kept episodes are among all
    _windows: dict[str, np.ndarray]  # feature → the steps of a sample
    _positions: np.ndarray  # (kept + 1,) of the first sample of each episode
    _table: FrameTable

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
    def recorded_features(self) -> dict[str, dict]:
        """The kept features without the index columns that every dataset has."""
        return {name: feature for name, feature in self._features.items() if name not in INDEX_FEATURES}

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
    def vector_names(self) -> list[str]:
        """The feature names of the kept numbers that policies read: states and `action`."""
        return [n for n, f in self._features.items() if is_for_policies(n) and f["dtype"] not in (*CAMERAS, "string")]

    @property
    def dimension_names(self) -> dict[str, list[str] | None]:
        """Feature → the name of every dimension of a vector (for cameras of every axis), None if unnamed."""
        return named_dimensions(self._features, "names", self.root)

    @property
    def units(self) -> dict[str, list[str] | None]:
        """Feature → the unit of every dimension, None where the dataset does not record units."""
        return named_dimensions(self._features, "units", self.root)

    @property
    def time_windows(self) -> dict[str, list[float]]:
        """Feature → the times of its steps, relative to the sample's own [s]; of those with several, and `action`."""
        return {name: (steps / self.fps).tolist() for name, steps in self._windows.items()}

    @property
    def control_rate(self) -> float:
        """The rate of consecutive actions of a sample [Hz]; with single actions, that of the frames."""
        steps = self._windows.get(ACTION, ())
        return self.fps / float(steps[1] - steps[0]) if len(steps) > 1 else self.fps

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Feature → min, max, mean, std, count, q01 … q99 over the whole dataset, float32.

        Cameras have shape (3, 1, 1) in [0, 1]. `episodes` does not change them. Versions 2.0 and 2.1 have no
        quantiles; `convert_dataset` computes them.

        Raises:
            DatasetFormatError: there are none, or those of an observation or of the action cannot be of its data.
        """
        return checked_statistics(self._metadata, self._table, self._features)

    @property
    def tasks(self) -> list[str]:
        """Every instruction of the dataset, in the order of `task_index`."""
        return list(self._metadata.tasks.values())

    @property
    def episodes(self) -> list[int]:
        """The numbers of the kept episodes."""
        return self._metadata.episode_numbers[self._episodes].tolist()

    @property
    def episode_lengths(self) -> list[int]:
        """Frames of every kept episode."""
        return self._lengths.tolist()

    @property
    def num_episodes(self) -> int:
        """Number of kept episodes."""
        return len(self._episodes)

    @property
    def num_frames(self) -> int:
        """Number of frames in the kept episodes."""
        return int(self._lengths.sum())

    @property
    def num_samples(self) -> int:
        """Number of frames at which a sample starts: all but those that `drop_n_last_frames` leaves out."""
        return int(self._positions[-1])

    @property
    def frame_rows(self) -> np.ndarray:
        """The rows of the kept episodes' frames (frames,), in the whole dataset."""
        return np.concatenate(list(self.row_blocks()))

    def row_blocks(self, size: int = ROWS_AT_ONCE) -> Iterator[np.ndarray]:
        """Yield the same rows, at most `size` at a time, and unmap what has been read before each of them.

        A program that passes through all frames needs no more memory for many than for few.
        """
        starts, lengths = self._metadata.episode_starts[self._episodes], self._lengths
        for rows in row_blocks(starts, lengths, size):
            self._table.release()
            yield rows

    @property
    def _lengths(self) -> np.ndarray:
        return (self._metadata.episode_ends - self._metadata.episode_starts)[self._episodes]
