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
from .files import FilePaths
from .json_files import as_statistics, load_statistics_file, naming_the_remedy, read_json_lines, recompute
from .metadata import INFO_PATH, DatasetMetadata, Statistics, VideoPlaces, cameras_on_video
from .paths import PathTemplate

TASKS_PATH = "meta/tasks.jsonl"
EPISODES_PATH = "meta/episodes.jsonl"
EPISODES_STATISTICS_PATH = "meta/episodes_stats.jsonl"
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
CHUNK_SIZE = 1000  # episodes per folder
_LARGEST = 2**31  # above any number of frames or episodes


def read_v2_0(root: Path, info: dict) -> DatasetMetadata:
    """Read version 2.0, whose statistics are of the whole dataset."""
    return _read(root, info, partial(load_statistics_file, root))


def read_v2_1(root: Path, info: dict) -> DatasetMetadata:
    """Read version 2.1, whose statistics are of single episodes and are pooled; quantiles cannot be."""
    return _read(root, info, partial(load_pooled_statistics, root))


def load_pooled_statistics(root: Path) -> Statistics:
    """Pool `meta/episodes_stats.jsonl`; a feature of which some episodes have no statistics has none.

    Raises:
        DatasetFormatError: it cannot be read, or the statistics of two episodes do not fit together.
    """
    path = root / EPISODES_STATISTICS_PATH
    with naming_the_remedy(root):
        rows = _by_episode(root, EPISODES_STATISTICS_PATH, {"episode_index": int, "stats": dict})
        listed = (row["episode_index"] for row in _by_episode(root, EPISODES_PATH, {"episode_index": int}))
        lacking = sorted(set(listed) - {row["episode_index"] for row in rows})
        if lacking:
            raise DatasetFormatError(f"{path} lacks {len(lacking)} episode(s), the first of them {lacking[0]}.")
        episodes = [as_statistics(row["stats"], f"Episode {row['episode_index']} in {path}") for row in rows]
    pooled = {}
    for name in dict.fromkeys(name for episode in episodes for name in episode):
        try:
            pooled[name] = pool_statistics([episode[name] for episode in episodes])
        except KeyError:
            pooled[name] = {}  # of some episodes there are none
        except ValueError as error:
            raise DatasetFormatError(
                f"{path} has statistics of {name} of another shape in some episodes: {error}. {recompute(root)}"
            ) from error
    return pooled


def _read(root: Path, info: dict, load_statistics: Callable[[], Statistics]) -> DatasetMetadata:
    tasks = read_json_lines(root, TASKS_PATH, {"task_index": int, "task": str})
    episodes = _by_episode(root, EPISODES_PATH, {"episode_index": int, "length": int})
    numbers, lengths = (np.asarray([row[key] for row in episodes]) for key in ("episode_index", "length"))
    ends = np.cumsum(lengths)
    return DatasetMetadata(
        root=root,
        info=info,
        tasks={row["task_index"]: row["task"] for row in sorted(tasks, key=lambda row: row["task_index"])},
        tasks_path=TASKS_PATH,
        episode_numbers=numbers,
        episode_starts=ends - lengths,
        episode_ends=ends,
        data_paths=_paths(info, "data_path", DATA_PATH, numbers),
        videos={
            camera: VideoPlaces(_paths(info, "video_path", VIDEO_PATH, numbers, camera), np.zeros(len(numbers)))
            for camera in cameras_on_video(info)
        },
        load_statistics=load_statistics,
    )


def _by_episode(root: Path, name: str, keys: dict[str, type]) -> list[dict]:
    """Return the rows ordered by episode; numbers of deleted episodes may be left out."""
    rows = sorted(read_json_lines(root, name, keys), key=lambda row: row["episode_index"])
    numbers = [row["episode_index"] for row in rows]
    beyond = [row for row in rows for key, kind in keys.items() if kind is int and not 0 <= row[key] < _LARGEST]
    if not rows or beyond or len(set(numbers)) < len(numbers):
        problem = f"it has {beyond[0]}" if beyond else f"it has {len(rows)} lines for {len(set(numbers))} episodes"
        raise DatasetFormatError(
            f"{root / name} must list episodes, each once, with numbers that are not negative; {problem}. Download "
            f"it again."
        )
    return rows


def _paths(info: dict, key: str, default: str, numbers: np.ndarray, camera: str | None = None) -> FilePaths:
    video = () if camera is None else ("video_key",)
    template = PathTemplate(info.get(key) or default, key, ("episode_chunk", "episode_index", *video))
    size = info.get("chunks_size") or CHUNK_SIZE
    if not isinstance(size, int) or size < 1:
        raise DatasetFormatError(
            f"{INFO_PATH} has chunks_size {size!r}; expected the number of episodes per folder, such as {CHUNK_SIZE}."
        )
    return FilePaths(template, {"episode_chunk": numbers // size, "episode_index": numbers}, camera)
