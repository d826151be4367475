"""Read the metadata of a dataset of any version of the LeRobot format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import DatasetFormatError, DatasetVersionError
from ..features import declared_features
from ..remedies import OTHER_REVISION
from . import v2, v3
from .json_files import read_json
from .metadata import INFO_PATH, DatasetMetadata, cameras_on_video
from .paths import is_inside

# How a version begins → what reads it: (root, info) → DatasetMetadata.
_READERS = {"v2.0": v2.read_v2_0, "v2.1": v2.read_v2_1, "v3.": v3.read}

_HIGHEST_RATE = 1e6  # frames per second


def load_metadata(root: Path, rename_map: Mapping[str, str] | None = None) -> DatasetMetadata:
    """Read and check everything in `meta/` except the statistics.

    Args:
        root (`Path`): the dataset's folder.
        rename_map (`Mapping[str, str]`, *optional*): name of a feature in the dataset → the name it has here.

    Raises:
        UnknownDatasetFeatureError: `rename_map` does not fit the dataset.
        DatasetNotFoundError: a file is missing.
        DatasetVersionError: the version is not 2.0, 2.1 or 3.
        DatasetFormatError: a file cannot be read or contradicts another.
    """
    info = read_json(root, INFO_PATH)
    version = str(info.get("codebase_version"))
    reader = next((reader for prefix, reader in _READERS.items() if version.startswith(prefix)), None)
    if reader is None:
        raise DatasetVersionError(
            f"{root} is a LeRobot dataset of version {version}; v2.0, v2.1 and v3.0 can be read. Many Hub "
            f"datasets keep them under tags, so try {OTHER_REVISION}."
        )
    _check_info(root, info)
    info = info | {"features": declared_features(info["features"])}
    _check_cameras(root, info)
    metadata = reader(root, info).renamed(rename_map)
    _check_cameras(root, metadata.info)
    _check_episodes(metadata)
    return metadata


def _check_info(root: Path, info: dict) -> None:
    path = root / INFO_PATH
    missing = sorted({"fps", "features"} - set(info))
    if missing:
        raise DatasetFormatError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(info)}. Download or write it again."
        )
    fps, features = info["fps"], info["features"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < _HIGHEST_RATE:
        raise DatasetFormatError(f"{path} has fps {fps!r:.50}; expected a positive number. Correct it.")
    if not isinstance(features, dict) or not features:
        raise DatasetFormatError(f"{path} has features {features!r}; expected a description per feature.")
    for name, feature in features.items():
        if not isinstance(feature, dict) or not {"dtype", "shape"} <= set(feature):
            raise DatasetFormatError(
                f"{path} describes {name!r} as {feature!r}, without dtype or shape. Add them or download it again."
            )
        if not isinstance(feature["dtype"], str):
            raise DatasetFormatError(f"{path} gives {name!r} the dtype {feature['dtype']!r}; expected a name.")
        sizes = feature["shape"] if isinstance(feature["shape"], list) else [feature["shape"]]
        if not all(isinstance(size, int | float) and size % 1 == 0 and 0 < size < 2**31 for size in sizes):
            raise DatasetFormatError(
                f"{path} gives {name!r} the shape {feature['shape']!r}; expected a list of sizes."
            )


def _check_cameras(root: Path, info: dict) -> None:
    """Refuse cameras by whose name a file of theirs would lie outside the folder it belongs in."""
    for name in cameras_on_video(info):
        if not is_inside(f"videos/{name}"):
            raise DatasetFormatError(
                f"{root / INFO_PATH} has a camera called {name!r}, by which its files would lie outside the dataset's "
                f"folder. Choose another name in meta/info.json."
            )


def _check_episodes(metadata: DatasetMetadata) -> None:
    path = metadata.root / INFO_PATH
    empty = np.flatnonzero(metadata.episode_starts == metadata.episode_ends)
    if empty.size:
        raise DatasetFormatError(
            f"Episode {metadata.episode_numbers[empty[0]]} of {metadata.root} has length 0 ({empty.size} such "
            f"episode(s)). Delete empty episodes with the tool that recorded the dataset, or record it again."
        )
    for name, found in (("episodes", len(metadata.episode_starts)), ("frames", int(metadata.episode_ends[-1]))):
        stated = metadata.info.get(f"total_{name}")
        if stated is not None and stated != found:
            raise DatasetFormatError(
                f"{path} says total_{name} = {stated}, but the episodes listed beside it are {found} {name}: one "
                f"of the two is from another state of the dataset. Download it again, or correct total_{name}."
            )
