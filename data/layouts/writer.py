"""Write the metadata of a LeRobot v3.0 dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .episodes import EpisodeRows
from .json_files import STATISTICS_PATH
from .metadata import INFO_PATH, cameras_on_video
from .v3 import CHUNK_SIZE, DATA_PATH, FORMAT_VERSION, TASKS_PATH, VIDEO_PATH

_OPTIONAL = ("tools",)  # what LeRobot may add to info.json: the functions that a language model may call


def write_metadata(
    folder: Path,
    info: Mapping,
    tasks: Mapping[int, str],
    episodes: Sequence[Mapping],
    statistics: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Write all files of `meta/`.

    Args:
        folder (`Path`): the dataset's root.
        info (`Mapping`): fps, features, robot_type and sizes; versions, counts and paths are added.
        tasks (`Mapping[int, str]`): task_index → instruction.
        episodes (`Sequence[Mapping]`): one row per episode, as `EPISODES_PATH` holds them.
        statistics (`Mapping`): feature → statistic → array, over the whole dataset.
    """
    rows = EpisodeRows(folder, info["data_files_size_in_mb"])
    for row in episodes:
        rows.append(row)
    rows.close()
    write_summary(folder, info, tasks, len(episodes), sum(row["length"] for row in episodes), statistics)


def write_summary(
    folder: Path,
    info: Mapping,
    tasks: Mapping[int, str],
    num_episodes: int,
    num_frames: int,
    statistics: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Write all files of `meta/` but those that list the episodes; arguments as in `write_metadata`."""
    write_tasks(folder, tasks)
    write_statistics(folder, statistics)
    counts = {
        "codebase_version": FORMAT_VERSION,
        "fps": info["fps"],
        "features": info["features"],
        "total_episodes": num_episodes,
        "total_frames": num_frames,
        "total_tasks": len(tasks),
        "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": info["data_files_size_in_mb"],
        "video_files_size_in_mb": info["video_files_size_in_mb"],
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if cameras_on_video(info) else None,
        "robot_type": info.get("robot_type"),
        "splits": info.get("splits") or {"train": f"0:{num_episodes}"},
    }
    _write_json(folder / INFO_PATH, counts | {name: info[name] for name in _OPTIONAL if info.get(name)})


def write_tasks(folder: Path, tasks: Mapping[int, str]) -> None:
    """Write `meta/tasks.parquet`."""
    pq.write_table(_task_table(tasks), folder / TASKS_PATH)


def write_statistics(folder: Path, statistics: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write `meta/stats.json`."""
    _write_json(folder / STATISTICS_PATH, {name: plain_statistics(values) for name, values in statistics.items()})


def statistics_columns(name: str, statistics: Mapping[str, np.ndarray]) -> dict[str, pa.Array]:
    """Return the columns of the episodes' statistics of one feature, each (episodes, …), as lists."""
    return {
        f"stats/{name}/{key}": _as_lists(value.astype(np.int64 if key == "count" else np.float64))
        for key, value in statistics.items()
    }


def _as_lists(values: np.ndarray) -> pa.Array:
    lists = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        offsets = np.arange(0, len(lists) + 1, size, dtype=np.int32)
        lists = pa.ListArray.from_arrays(pa.array(offsets), lists)
    return lists


def plain_statistics(statistics: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Return the statistics of one feature as lists, counts as whole numbers."""
    return {
        key: value.astype(np.int64 if key == "count" else np.float64).tolist() for key, value in statistics.items()
    }


def _write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False), encoding="utf-8")


def _task_table(tasks: Mapping[int, str]) -> pa.Table:
    """Return the tasks as pandas stores a table whose index is the column `task`."""
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, (kind, numpy) in kinds.items()
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table(
        {"task_index": pa.array(list(tasks), pa.int64()), "task": pa.array(list(tasks.values()), pa.string())}
    )
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
