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

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from ...errors import DatasetFormatError
from ..statistics.computing import pool_exactly
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
_POOLED_TOGETHER = 1000  # episodes whose statistics are in memory
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
    numbers: list[int] = []
    with naming_the_remedy(root):
        parts = list(_pooled_blocks(root, numbers))
        _check_numbers(path, numbers)
        lacking = np.setdiff1d(_read_episodes(root)["episode_index"], numbers)
        if lacking.size:
            raise DatasetFormatError(f"{path} lacks {len(lacking)} episode(s), the first of them {lacking[0]}.")
    pooled = _pooled(root, parts)
    return {name: {key: value.astype(np.float32) for key, value in values.items()} for name, values in pooled.items()}


def _pooled_blocks(root: Path, numbers: list[int]) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Yield the pooled statistics of some episodes at a time, and add their numbers to `numbers`."""
    rows = read_json_lines(root, EPISODES_STATISTICS_PATH, {"episode_index": int, "stats": dict})
    while block := sorted(islice(rows, _POOLED_TOGETHER), key=itemgetter(0)):
        numbers += [number for number, _ in block]
        path = root / EPISODES_STATISTICS_PATH
        yield _pooled(root, [as_statistics(stats, f"Episode {number} in {path}") for number, stats in block])


def _pooled(root: Path, parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of all parts, in float64; none of a feature of which a part has none."""
    pooled = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        try:
            pooled[name] = pool_exactly([part[name] for part in parts])
        except KeyError:
            pooled[name] = {}  # of some episodes there are none
        except ValueError as error:
            raise DatasetFormatError(
                f"{root / EPISODES_STATISTICS_PATH} has statistics of {name} of another shape in some episodes: "
                f"{error}. {recompute(root)}"
            ) from error
    return pooled


def _read(root: Path, info: dict, load_statistics: Callable[[], Statistics]) -> DatasetMetadata:
    tasks = dict(sorted(read_json_lines(root, TASKS_PATH, {"task_index": int, "task": str}), key=itemgetter(0)))
    numbers, lengths = _read_episodes(root).values()
    ends = np.cumsum(lengths)
    return DatasetMetadata(
        root=root,
        info=info,
        tasks=tasks,
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


def _read_episodes(root: Path) -> dict[str, np.ndarray]:
    """Return number and length of every episode, in their order; numbers of deleted episodes may be left out."""
    keys = {"episode_index": int, "length": int}
    rows = [value for row in read_json_lines(root, EPISODES_PATH, keys) for value in row]
    beyond = next((i for i, value in enumerate(rows) if not 0 <= value < _LARGEST), None)
    if beyond is not None:
        first = beyond - beyond % len(keys)
        raise _not_a_list(root / EPISODES_PATH, f"it has {dict(zip(keys, rows[first:], strict=False))}")
    numbers, lengths = np.asarray(rows, dtype=np.int64).reshape(-1, 2).T
    _check_numbers(root / EPISODES_PATH, numbers.tolist())
    order = np.argsort(numbers)
    return {"episode_index": numbers[order], "length": lengths[order]}


def _check_numbers(path: Path, numbers: Sequence[int]) -> None:
    beyond = next((number for number in numbers if not 0 <= number < _LARGEST), None)
    if beyond is not None:
        raise _not_a_list(path, f"it has {beyond}")
    distinct = len(set(numbers))
    if not numbers or distinct < len(numbers):
        raise _not_a_list(path, f"it has {len(numbers)} lines for {distinct} episodes")


def _not_a_list(path: Path, problem: str) -> DatasetFormatError:
    return DatasetFormatError(
        f"{path} must list episodes, each once, with numbers that are not negative; {problem}. Download it again."
    )


def _paths(info: dict, key: str, default: str, numbers: np.ndarray, camera: str | None = None) -> FilePaths:
    video = () if camera is None else ("video_key",)
    template = PathTemplate(info.get(key) or default, key, ("episode_chunk", "episode_index", *video))
    size = info.get("chunks_size") or CHUNK_SIZE
    if not isinstance(size, int) or size < 1:
        raise DatasetFormatError(
            f"{INFO_PATH} has chunks_size {size!r}; expected the number of episodes per folder, such as {CHUNK_SIZE}."
        )
    return FilePaths(template, {"episode_chunk": numbers // size, "episode_index": numbers}, camera)
