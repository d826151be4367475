"""DatasetMetadata: what `meta/` says, in one form for every version of the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...errors import UnknownDatasetFeatureError, nearest
from ..features import INDEX_FEATURES, pictures_in_colour
from .files import FilePaths

INFO_PATH = "meta/info.json"

Statistics = dict[str, dict[str, np.ndarray]]  # feature → statistic → float32 array


@dataclass(frozen=True)
class VideoPlaces:
    """Where the frames of one camera are: one entry per episode."""

    paths: FilePaths  # relative to the dataset's root; many episodes may share one file
    from_timestamp: np.ndarray  # (episodes,) time of the episode's first frame in its file [s]


@dataclass(frozen=True)
class DatasetMetadata:
    """Everything a reader needs before it opens data or video files."""

    root: Path
    info: dict  # meta/info.json
    tasks: dict[int, str]
    tasks_path: str  # where they are listed
    episode_numbers: np.ndarray  # (episodes,) what each is called, ascending; numbers of deleted ones are left out
    episode_starts: np.ndarray  # (episodes,) row of the first frame
    episode_ends: np.ndarray  # (episodes,) one past the row of the last frame
    data_paths: FilePaths  # per episode, relative to root; many episodes may share one file
    videos: dict[str, VideoPlaces]
    load_statistics: Callable[[], Statistics]

    @property
    def fps(self) -> float:
        """Frames per second."""
        return float(self.info["fps"])

    @property
    def robot_type(self) -> str | None:
        """The robot's name, as recorded."""
        name = self.info.get("robot_type")
        return None if name is None else str(name)

    @property
    def features(self) -> dict[str, dict]:
        """Feature → its dtype, shape and names, as it is read: pictures as (h, w, 3)."""
        return pictures_in_colour(self.info["features"])

    @property
    def data_files(self) -> list[str]:
        """The distinct data files, in the order of their rows."""
        return list(self.data_paths.files)

    @property
    def files(self) -> list[str]:
        """The distinct data and video files."""
        videos = (path for places in self.videos.values() for path in places.paths.files)
        return list(dict.fromkeys([*self.data_paths.files, *videos]))

    @property
    def first_rows(self) -> np.ndarray:
        """(files,) the row of the dataset that each of `data_files` begins with."""
        return self.episode_starts[np.unique(self.data_paths.file_of, return_index=True)[1]]

    def renamed(self, rename_map: Mapping[str, str] | None) -> DatasetMetadata:
        """Return the metadata with other names of features, `{name in the dataset: new name}`.

        Raises:
            UnknownDatasetFeatureError: there is no such feature, or two would have one name.
        """
        if not rename_map:
            return self
        features = self.info["features"]
        if not isinstance(rename_map, Mapping) or not all(isinstance(name, str) for name in rename_map.values()):
            raise UnknownDatasetFeatureError(
                f"rename_map={rename_map!r} must give every name in the dataset another one, "
                f"{{'state': 'observation.state'}}."
            )
        for name in rename_map:
            if name not in features:
                raise UnknownDatasetFeatureError(
                    f"rename_map names {name!r}, which the dataset does not have. {nearest(name, features)}"
                )
        new = {name: rename_map.get(name, name) for name in features}
        twice = sorted(
            name
            for name in set(rename_map.values())
            if list(new.values()).count(name) > 1 or name in INDEX_FEATURES or name == "task"
        )
        if twice:
            raise UnknownDatasetFeatureError(
                f"rename_map gives the name {twice[0]!r}, which another feature has already. Choose another."
            )

        def load_statistics() -> Statistics:
            return {new.get(name, name): values for name, values in self.load_statistics().items()}

        return replace(
            self,
            info=self.info | {"features": {new[name]: feature for name, feature in features.items()}},
            videos={new[name]: places for name, places in self.videos.items()},
            load_statistics=load_statistics,
        )


def cameras_on_video(info: Mapping) -> list[str]:
    """Return the features whose frames are in video files."""
    return [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
