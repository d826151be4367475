"""The layout of version 3.0: data and video files shared by many episodes, and a table that says where each is.

```text
meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
data/chunk-000/file-000.parquet
videos/<camera>/chunk-000/file-000.mp4
```
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import DatasetFormatError
from ..windows import exact_times
from .files import FilePaths
from .json_files import incomplete, load_statistics_file
from .metadata import DatasetMetadata, VideoPlaces, cameras_on_video
from .paths import PathTemplate

FORMAT_VERSION = "v3.0"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNK_SIZE = 1000  # files per folder


class FileNumbering:
    """Count through a growing series of files: `chunk_index` and `file_index` of the current one."""

    def __init__(self):
        self._count = -1

    def next(self) -> None:
        """Go on to the next file."""
        self._count += 1

    @property
    def place(self) -> dict[str, int]:
        """The current file."""
        return {"chunk_index": self._count // CHUNK_SIZE, "file_index": self._count % CHUNK_SIZE}


def read(root: Path, info: dict) -> DatasetMetadata:
    """Read version 3.0."""
    cameras = cameras_on_video(info)
    episodes = _read_episodes(root, cameras, info["fps"])
    starts, ends = episodes["dataset_from_index"], episodes["dataset_to_index"]
    wrong = (starts != np.concatenate([[0], ends[:-1]])) | (ends - starts != episodes["length"])
    if np.any(wrong):
        raise DatasetFormatError(
            f"Episode {episodes['episode_index'][wrong][0]} in {root / 'meta/episodes'} does not follow the one "
            f"before: each must start at the row where the one before ends, and be as long as the number of its rows. "
            f"Download or write the dataset again."
        )
    return DatasetMetadata(
        root=root,
        info=info,
        tasks=_read_tasks(root),
        tasks_path=TASKS_PATH,
        episode_numbers=episodes["episode_index"],
        episode_starts=starts,
        episode_ends=ends,
        data_paths=_paths(info, "data_path", DATA_PATH, episodes, "data"),
        videos={
            camera: VideoPlaces(
                _paths(info, "video_path", VIDEO_PATH, episodes, f"videos/{camera}", camera),
                episodes[f"videos/{camera}/from_timestamp"],
            )
            for camera in cameras
        },
        load_statistics=partial(load_statistics_file, root),
    )


def _read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetFormatError(f"{path} is not a readable parquet file: {error}. Download it again.") from error


def _read_tasks(root: Path) -> dict[int, str]:
    path = root / TASKS_PATH
    if not path.is_file():
        raise incomplete(root, TASKS_PATH)
    table = _read_parquet(path)
    # The instruction is the index of a pandas table, which not every writer names.
    text = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(text) != 1:
        raise DatasetFormatError(
            f"{path} must have the columns task and task_index; got {table.column_names}. Download it again."
        )
    tasks = list(zip(table["task_index"].to_pylist(), table[text[0]].to_pylist(), strict=True))
    wrong = [row for row in tasks if type(row[0]) is not int or not isinstance(row[1], str)]
    if wrong:
        raise DatasetFormatError(f"{path} must give every whole number a text; it has {wrong[0]}. Download it again.")
    return dict(sorted(tasks))


def _read_episodes(root: Path, cameras: list[str], fps: float) -> dict[str, np.ndarray]:
    """Return the columns that say where each episode is, ordered by episode; statistics are left unread."""
    files = sorted(root.glob("meta/episodes/*/*.parquet"))
    if not files:
        raise incomplete(root, "meta/episodes/*/*.parquet")
    columns = ["episode_index", "length", "dataset_from_index", "dataset_to_index"]
    columns += ["data/chunk_index", "data/file_index"]
    for camera in cameras:
        columns += [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    tables = []
    for path in files:
        table = _read_parquet(path, columns)
        missing = [name for name in columns if name not in table.column_names]
        if missing:
            raise DatasetFormatError(f"{path} lacks the columns {', '.join(missing)}. Download it again.")
        tables.append(table.select(columns))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
        episodes = {name: _numbers(name, table[name], fps) for name in columns}
    except (pa.ArrowException, ValueError) as error:
        raise DatasetFormatError(f"{root / 'meta/episodes'} cannot be read: {error}. Download it again.") from error
    order = np.argsort(episodes["episode_index"], kind="stable")
    episodes = {name: values[order] for name, values in episodes.items()}
    found = episodes["episode_index"]
    if not found.size or found[0] < 0 or np.any(np.diff(found) < 1):
        raise DatasetFormatError(f"{root / 'meta/episodes'} must list episodes, each once. Download it again.")
    return episodes


def _numbers(name: str, column: pa.ChunkedArray, fps: float) -> np.ndarray:
    """Return a column as int64, times as float64 [s].

    Raises:
        ValueError, pa.ArrowException: it holds something else, or nothing in some row.
    """
    if column.null_count:
        raise ValueError(f"{name} has no value in {column.null_count} row(s)")
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ValueError(f"{name} holds {column.type} instead of numbers")
    of_times = name.endswith("from_timestamp")
    values = column.cast(pa.float64() if of_times else pa.int64()).to_numpy()
    if of_times and not np.isfinite(values).all():
        raise ValueError(f"{name} has times that are not finite")
    is_rounded = of_times and column.type in (pa.float16(), pa.float32())
    return exact_times(values, np.rint(values * fps), fps) if is_rounded else values


def _paths(
    info: dict, key: str, default: str, episodes: dict[str, np.ndarray], prefix: str, camera: str | None = None
) -> FilePaths:
    video = () if camera is None else ("video_key",)
    template = PathTemplate(info.get(key) or default, key, ("chunk_index", "file_index", *video))
    return FilePaths(template, {name: episodes[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}, camera)
