"""DatasetMetadata: what `meta/` says, in one form for every version of the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INFO_PATH = "meta/info.json"

Statistics = dict[str, dict[str, np.ndarray]]  # feature → statistic → float32 array


@dataclass(frozen=True)
class VideoPlaces:
    """Where the frames of one camera are: one entry per episode."""

    paths: list[str]  # relative to the dataset's root; many episodes may share one file
    from_timestamp: np.ndarray  # (episodes,) time of the episode's first frame in its file [s]


@dataclass(frozen=True)
class DatasetMetadata:
    """Everything a reader needs before it opens data or video files."""

    root: Path
    info: dict  # meta/info.json
    tasks: dict[int, str]
    tasks_path: str  # where they are listed
    episode_starts: np.ndarray  # (episodes,) row of the first frame
    episode_ends: np.ndarray  # (episodes,) one past the row of the last frame
    data_paths: list[str]  # per episode, relative to root; many episodes may share one file
    videos: dict[str, VideoPlaces]
    load_statistics: Callable[[], Statistics]

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.info["fps"])

    @property
    def robot_type(self) -> str | None:
        """The robot's name, as recorded."""
        return self.info.get("robot_type")

    @property
    def features(self) -> dict[str, dict]:
        """Feature → its dtype, shape and names."""
        return self.info["features"]

    @property
    def data_files(self) -> list[str]:
        """The distinct data files, in the order of their rows."""
        return list(dict.fromkeys(self.data_paths))

    @property
    def files(self) -> list[str]:
        """The distinct data and video files."""
        videos = (path for places in self.videos.values() for path in places.paths)
        return list(dict.fromkeys([*self.data_paths, *videos]))


def cameras_on_video(info: Mapping) -> list[str]:
    """Return the features whose frames are in video files."""
    return [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
