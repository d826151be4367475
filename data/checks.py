"""Check a dataset against its metadata, cheaply enough to do so whenever one is opened."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow.parquet as pq

from ..errors import DatasetFormatError
from .layouts.metadata import DatasetMetadata, Statistics
from .table import FrameTable

logger = logging.getLogger(__name__)


def check_table(
    metadata: DatasetMetadata, table: FrameTable, features: Mapping[str, dict], tolerance_s: float
) -> None:
    """Compare columns, numbers of rows, episode bounds and timestamps with the metadata.

    Of every episode only the first and the last row are read, so this does not touch most of the data.

    Raises:
        DatasetFormatError: they contradict each other.
    """
    absent = [name for name, feature in features.items() if feature["dtype"] != "video" and name not in table]
    if absent:
        raise DatasetFormatError(
            f"meta/info.json of {metadata.root} names {', '.join(absent)}; the data files have no such "
            f"column. Leave them out with features=[…]."
        )
    if len(table) != metadata.episode_ends[-1]:
        raise _wrong_counts(metadata, len(table))
    first, last = metadata.episode_starts, metadata.episode_ends - 1
    _check_bounds(metadata, table.numbers("episode_index", np.stack([first, last], axis=1), ()))
    _check_times(metadata, table.numbers("timestamp", first, ()), table.numbers("timestamp", last, ()), tolerance_s)


def warn_of_unlisted_files(metadata: DatasetMetadata) -> None:
    """Log data files that no episode refers to, such as those of a killed recording."""
    listed = set(metadata.data_files)
    found = (path.relative_to(metadata.root).as_posix() for path in metadata.root.glob("data/*/*.parquet"))
    unlisted = sorted(path for path in found if path not in listed)
    if unlisted:
        logger.warning(
            "%s has %d data file(s) that its metadata does not list, and which are not read: %s.",
            metadata.root,
            len(unlisted),
            ", ".join(unlisted[:4]),
        )


def check_statistics(metadata: DatasetMetadata, table: FrameTable, statistics: Statistics) -> None:
    """Refuse statistics that are not finite, and find the cause in the data.

    Raises:
        DatasetFormatError: some are not finite; the message names the feature, and the episode if there is one.
    """
    for name, values in statistics.items():
        wrong = [key for key, value in values.items() if not np.all(np.isfinite(value))]
        if not wrong:
            continue
        row = table.first_not_finite(name) if name in table else None
        if row is not None:
            raise not_finite(metadata, name, [row])
        raise DatasetFormatError(
            f"The statistics of {name} in {metadata.root} are not finite ({', '.join(wrong)}), though its data are. "
            f"Recompute them: manipulators convert-dataset {metadata.root} <new folder>"
        )


def instruction(metadata: DatasetMetadata, task_index: int, episode: int) -> str:
    """Return the instruction with that index, which a frame of `episode` refers to.

    Raises:
        DatasetFormatError: the dataset does not list it.
    """
    if task_index not in metadata.tasks:
        raise DatasetFormatError(
            f"Episode {episode} ({metadata.root / metadata.data_paths[episode]}) has task_index {task_index}, which "
            f"{metadata.tasks_path} does not list; it has {', '.join(map(str, list(metadata.tasks)[:12]))}. Add the "
            f"instruction there, or leave the episode out with episodes=[…]."
        )
    return metadata.tasks[task_index]


def not_finite(metadata: DatasetMetadata, name: str, rows: Iterable[int]) -> DatasetFormatError:
    """Return the error for NaN or infinity in the feature `name` at `rows` of the dataset."""
    row = min(int(row) for row in rows)
    episode = int(np.searchsorted(metadata.episode_ends, row, side="right"))
    return DatasetFormatError(
        f"{name} has NaN or infinity in frame {row - metadata.episode_starts[episode]} of episode {episode} "
        f"({metadata.root / metadata.data_paths[episode]}). Leave the feature out with features=[…] or the episode "
        f"out with episodes=[…], or correct the recording."
    )


def _wrong_counts(metadata: DatasetMetadata, found: int) -> DatasetFormatError:
    """Return the error that names the file whose number of rows is wrong."""
    expected: dict[str, int] = {}
    for path, start, end in zip(metadata.data_paths, metadata.episode_starts, metadata.episode_ends, strict=True):
        expected[path] = expected.get(path, 0) + int(end - start)
    rows = {path: pq.read_metadata(metadata.root / path).num_rows for path in expected}
    wrong = [path for path in expected if rows[path] != expected[path]]
    named = "; ".join(
        f"{path} has {rows[path]} for episode(s) {_span(metadata, path)}, expected {expected[path]}"
        for path in wrong[:4]
    )
    return DatasetFormatError(
        f"The data files of {metadata.root} hold {found} frames; its metadata lists "
        f"{metadata.episode_ends[-1]}. {named}. Download or write the dataset again."
    )


def _span(metadata: DatasetMetadata, path: str) -> str:
    episodes = [episode for episode, other in enumerate(metadata.data_paths) if other == path]
    return f"{episodes[0]}" if len(episodes) == 1 else f"{episodes[0]} … {episodes[-1]}"


def _check_bounds(metadata: DatasetMetadata, found: np.ndarray) -> None:
    """Compare the column `episode_index` in the first and last row of every episode, (episodes, 2)."""
    wrong = np.flatnonzero(np.any(found != np.arange(len(found))[:, None], axis=1))
    if wrong.size:
        episode = int(wrong[0])
        raise DatasetFormatError(
            f"Episode {episode} of {metadata.root} is not where its metadata says: "
            f"{metadata.data_paths[episode]} has episode_index {found[episode][0]} … {found[episode][1]} there "
            f"({wrong.size} such episode(s)). An episode is missing, or has another length than stated; download "
            f"or write the dataset again."
        )


def _check_times(metadata: DatasetMetadata, first: np.ndarray, last: np.ndarray, tolerance_s: float) -> None:
    """Compare the duration of every episode, from its first and last timestamp, with the frame rate."""
    steps = metadata.episode_ends - metadata.episode_starts - 1  # (episodes,)
    seconds = last.astype(np.float64) - first
    # An episode that is off by half a frame: row numbers no longer give times, and windows would be wrong.
    wrong = np.flatnonzero(~(np.abs(seconds - steps / metadata.fps) <= max(0.5 / metadata.fps, tolerance_s)))
    if wrong.size:
        episode = int(wrong[0])
        raise DatasetFormatError(
            f"Episode {episode} of {metadata.root} lasts {seconds[episode]:g} s by its timestamps, and "
            f"{steps[episode] / metadata.fps:g} s by its {steps[episode] + 1} frames at {metadata.fps:g} frames per "
            f"second ({wrong.size} such episode(s)). Correct fps in meta/info.json or record again; if the timestamps "
            f"are only approximate, pass a larger tolerance_s."
        )
