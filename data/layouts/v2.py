"""The layout of versions 2.0 and 2.1: one data file, and one video of each camera, per episode.

```text
meta/info.json  meta/tasks.jsonl  meta/episodes.jsonl
meta/stats.json                     version 2.0: statistics of the whole dataset
meta/episodes_stats.jsonl           version 2.1: statistics of every episode
data/chunk-000/episode_000000.parquet
videos/chunk-000/<camera>/episode_000000.mp4
```
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import DatasetFormatError
from ..statistics import pool_statistics
from .json_files import as_statistics, load_statistics_file, read_json_lines
from .metadata import INFO_PATH, DatasetMetadata, Statistics, VideoPlaces, cameras_on_video

TASKS_PATH = "meta/tasks.jsonl"
EPISODES_PATH = "meta/episodes.jsonl"
EPISODES_STATISTICS_PATH = "meta/episodes_stats.jsonl"
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
CHUNK_SIZE = 1000  # episodes per folder


def read_v2_0(root: Path, info: dict) -> DatasetMetadata:
    """Read version 2.0, whose statistics are of the whole dataset."""
    return _read(root, info, partial(load_statistics_file, root))


def read_v2_1(root: Path, info: dict) -> DatasetMetadata:
    """Read version 2.1, whose statistics are of single episodes and are pooled; quantiles cannot be."""
    return _read(root, info, partial(load_pooled_statistics, root))


def load_pooled_statistics(root: Path) -> Statistics:
    """Pool `meta/episodes_stats.jsonl`.

    Raises:
        DatasetFormatError: an episode is not listed, or the statistics of two do not fit together.
    """
    path = root / EPISODES_STATISTICS_PATH
    rows = _by_episode(root, EPISODES_STATISTICS_PATH, {"episode_index": int, "stats": dict})
    episodes = [as_statistics(row["stats"], f"Episode {row['episode_index']} in {path}") for row in rows]
    pooled = {}
    for name in dict.fromkeys(name for episode in episodes for name in episode):
        try:
            pooled[name] = pool_statistics([episode[name] for episode in episodes])
        except KeyError as error:
            raise DatasetFormatError(
                f"{path} has no statistics of {name}, or not its {error}, in some episodes. Recompute them: "
                f"manipulators convert-dataset {root} <new folder>"
            ) from error
        except ValueError as error:
            raise DatasetFormatError(
                f"{path} has statistics of {name} of another shape in some episodes: {error}. Download it again."
            ) from error
    return pooled


def _read(root: Path, info: dict, load_statistics: Callable[[], Statistics]) -> DatasetMetadata:
    tasks = read_json_lines(root, TASKS_PATH, {"task_index": int, "task": str})
    episodes = _by_episode(root, EPISODES_PATH, {"episode_index": int, "length": int})
    lengths = np.asarray([row["length"] for row in episodes], dtype=np.int64)
    if np.any(lengths < 0):
        raise DatasetFormatError(f"{root / EPISODES_PATH} has a negative length. Download or write it again.")
    ends = np.cumsum(lengths)
    count = len(episodes)
    return DatasetMetadata(
        root=root,
        info=info,
        tasks={row["task_index"]: row["task"] for row in sorted(tasks, key=lambda row: row["task_index"])},
        tasks_path=TASKS_PATH,
        episode_starts=ends - lengths,
        episode_ends=ends,
        data_paths=_paths(info, "data_path", DATA_PATH, count),
        videos={
            camera: VideoPlaces(_paths(info, "video_path", VIDEO_PATH, count, camera), np.zeros(count))
            for camera in cameras_on_video(info)
        },
        load_statistics=load_statistics,
    )


def _by_episode(root: Path, name: str, keys: dict[str, type]) -> list[dict]:
    rows = sorted(read_json_lines(root, name, keys), key=lambda row: row["episode_index"])
    found = [row["episode_index"] for row in rows]
    if not rows or found != list(range(len(rows))):
        raise DatasetFormatError(
            f"{root / name} must list the episodes 0, 1, 2, …, each once; it has {len(rows)} lines. Download it again."
        )
    return rows


def _paths(info: dict, key: str, default: str, count: int, camera: str = "") -> list[str]:
    template, size = info.get(key) or default, info.get("chunks_size") or CHUNK_SIZE
    try:
        return [
            template.format(episode_chunk=episode // size, episode_index=episode, video_key=camera)
            for episode in range(count)
        ]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DatasetFormatError(
            f"{INFO_PATH} has a {key} that cannot be filled in, {template!r}: {error!r}. Correct or remove it."
        ) from error
