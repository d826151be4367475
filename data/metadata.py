"""What a LeRobot v3.0 dataset says about itself: `meta/info.json`, tasks, episodes and statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DatasetFormatError, DatasetNotFoundError, DatasetVersionError

INFO_PATH = "meta/info.json"
STATISTICS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FORMAT_VERSION = "v3.0"

# The columns every dataset has beside its own features, in LeRobot's order.
INDEX_FEATURES = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


@dataclass(frozen=True)
class VideoPlaces:
    """Where the frames of one camera are: one entry per episode."""

    paths: list[str]  # relative to the dataset's root; many episodes share one file
    from_timestamp: np.ndarray  # (episodes,) time of the episode's first frame in its file [s]


@dataclass(frozen=True)
class DatasetMetadata:
    """Everything a reader needs before it opens data or video files."""

    root: Path
    fps: float
    robot_type: str | None
    features: dict[str, dict]
    tasks: dict[int, str]
    episode_starts: np.ndarray  # (episodes,) row of the first frame
    episode_ends: np.ndarray  # (episodes,) one past the row of the last frame
    data_paths: list[str]  # distinct files, in the order of their rows
    videos: dict[str, VideoPlaces]

    def load_statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Read `meta/stats.json`: feature → statistic → float32 array; (c, 1, 1) in [0, 1] for cameras."""
        statistics = _read_json(self.root, STATISTICS_PATH)
        try:
            return {
                feature: {name: np.asarray(value, dtype=np.float32) for name, value in values.items()}
                for feature, values in statistics.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise DatasetFormatError(
                f"{self.root / STATISTICS_PATH} must map each feature to its statistics, lists of numbers: "
                f"{error}. Download or write it again."
            ) from error


def load_metadata(root: Path) -> DatasetMetadata:
    """Read and check everything in `meta/` except the statistics.

    Raises:
        DatasetNotFoundError: a file is missing.
        DatasetVersionError: the dataset is not of format version 3.
        DatasetFormatError: a file cannot be read or contradicts another.
    """
    info = _read_json(root, INFO_PATH)
    _check_version(root, info)
    missing = sorted({"fps", "features"} - set(info))
    if missing:
        raise DatasetFormatError(f"{root / INFO_PATH} lacks {', '.join(missing)}; it has {', '.join(info)}.")
    features, fps = info["features"], info["fps"]
    if not isinstance(fps, int | float) or fps <= 0:
        raise DatasetFormatError(f"{root / INFO_PATH} has fps {fps!r}; expected a positive number.")
    for name, feature in features.items():
        if not isinstance(feature, dict) or not {"dtype", "shape"} <= set(feature):
            raise DatasetFormatError(f"{root / INFO_PATH} describes {name!r} as {feature!r}, without dtype or shape.")

    cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
    episodes = _read_episodes(root, cameras)
    starts, ends = episodes["dataset_from_index"], episodes["dataset_to_index"]
    if starts[0] != 0 or np.any(starts[1:] != ends[:-1]) or np.any(ends - starts != episodes["length"]):
        raise DatasetFormatError(
            f"The episodes in {root / 'meta/episodes'} do not follow one another: each must start at the row "
            f"where the one before ends, and its length must be the number of its rows. Download it again."
        )
    return DatasetMetadata(
        root=root,
        fps=float(fps),
        robot_type=info.get("robot_type"),
        features=features,
        tasks=_read_tasks(root),
        episode_starts=starts,
        episode_ends=ends,
        data_paths=list(dict.fromkeys(_paths(info.get("data_path") or DATA_PATH, episodes, "data"))),
        videos={
            camera: VideoPlaces(
                _paths(info.get("video_path") or VIDEO_PATH, episodes, f"videos/{camera}", camera),
                episodes[f"videos/{camera}/from_timestamp"].astype(np.float64),
            )
            for camera in cameras
        },
    )


def _check_version(root: Path, info: dict) -> None:
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        raise DatasetVersionError(
            f"{root} is a LeRobot dataset of version {version}; expected {FORMAT_VERSION}. Many Hub "
            f'datasets keep it under a tag, so try revision="{FORMAT_VERSION}"; or convert it with LeRobot: '
            f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=<org/name>"
        )


def _read_json(root: Path, name: str) -> dict:
    path = root / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetNotFoundError(
            f"{root} is not a complete LeRobot dataset: it has no {name}. Give the folder that contains "
            f"meta/, data/ and videos/."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetFormatError(f"{path} is not valid JSON: {error}. Download or write it again.") from error
    if not isinstance(value, dict):
        raise DatasetFormatError(f"{path} must hold a JSON object; got {type(value).__name__}.")
    return value


def _read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns)
    except (pa.ArrowException, OSError) as error:
        raise DatasetFormatError(f"{path} is not a readable parquet file: {error}.") from error


def _read_tasks(root: Path) -> dict[int, str]:
    path = root / TASKS_PATH
    if not path.is_file():
        raise DatasetNotFoundError(f"{root} is not a complete LeRobot dataset: it has no {TASKS_PATH}.")
    table = _read_parquet(path)
    # The instruction is the index of a pandas table, which not every writer names.
    text = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(text) != 1:
        raise DatasetFormatError(f"{path} must have the columns task and task_index; got {table.column_names}.")
    pairs = zip(table["task_index"].to_pylist(), table[text[0]].to_pylist(), strict=True)
    return {int(index): str(task) for index, task in sorted(pairs)}


def _read_episodes(root: Path, cameras: list[str]) -> dict[str, np.ndarray]:
    """Return the columns that say where each episode is, ordered by episode; statistics are left unread."""
    files = sorted(root.glob("meta/episodes/*/*.parquet"))
    if not files:
        raise DatasetNotFoundError(f"{root} is not a complete LeRobot dataset: it has no meta/episodes/*/*.parquet.")
    columns = ["episode_index", "length", "dataset_from_index", "dataset_to_index"]
    columns += ["data/chunk_index", "data/file_index"]
    for camera in cameras:
        columns += [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    tables = []
    for path in files:
        table = _read_parquet(path, columns)
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise DatasetFormatError(f"{path} lacks the columns {', '.join(missing)}.")
        tables.append(table.select(columns))
    table = pa.concat_tables(tables, promote_options="permissive").sort_by("episode_index")
    episodes = {name: table[name].to_numpy() for name in columns}
    count = len(episodes["episode_index"])
    if count == 0 or np.any(episodes["episode_index"] != np.arange(count)):
        raise DatasetFormatError(f"{root / 'meta/episodes'} must list the episodes 0, 1, 2, …, each once.")
    return episodes


def _paths(template: str, episodes: dict[str, np.ndarray], prefix: str, camera: str = "") -> list[str]:
    places = zip(episodes[f"{prefix}/chunk_index"], episodes[f"{prefix}/file_index"], strict=True)
    try:
        return [template.format(video_key=camera, chunk_index=int(c), file_index=int(f)) for c, f in places]
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetFormatError(
            f"{INFO_PATH} has a path that cannot be filled in, {template!r}: {error!r}."
        ) from error
