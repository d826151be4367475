"""Check a dataset against its metadata, cheaply enough to do so whenever one is opened."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping

import numpy as np

from ..configuration.features import ACTION
from ..errors import DatasetFormatError, VideoError
from .features import CAMERAS
from .images import NOT_AN_IMAGE, decode_image
from .layouts.metadata import DatasetMetadata
from .remedies import LARGER_TOLERANCE, LEAVE_OUT_FEATURE, LEAVE_OUT_FEATURE_OR_EPISODE, ONLY_EPISODES
from .table.frame_table import FrameTable
from .windows import OBSERVATION_PREFIX

logger = logging.getLogger(__name__)


def is_for_policies(name: str) -> bool:
    """Tell whether a policy may read a feature: only those have to be numbers that it can compute with."""
    return name == ACTION or name.startswith(OBSERVATION_PREFIX)


def check_table(
    metadata: DatasetMetadata, table: FrameTable, features: Mapping[str, dict], tolerance_s: float
) -> None:
    """Compare columns, numbers of rows, episode bounds and timestamps of the files that are here with the metadata.

    No row is read for it: the table's outline knows the first and the last of every episode.

    Raises:
        DatasetFormatError: they contradict each other.
    """
    check_columns(metadata, table, features)
    here = table.file_numbers  # of the distinct data files
    episodes = np.flatnonzero(np.isin(metadata.data_paths.file_of, here))
    first, last = metadata.episode_starts[episodes], metadata.episode_ends[episodes] - 1
    expected = np.bincount(metadata.data_paths.file_of[episodes], weights=last + 1 - first, minlength=here.max() + 1)
    if len(table) != expected[here].sum():
        raise _wrong_counts(metadata, here, table.file_rows, expected[here].astype(np.int64))
    check_episodes(metadata, episodes, *table.bounds(first, last), tolerance_s)


def check_columns(metadata: DatasetMetadata, table: FrameTable, features: Mapping[str, dict]) -> None:
    """Compare the columns of a table, and what they hold, with the declared features.

    Raises:
        DatasetFormatError: they contradict each other.
    """
    absent = [name for name, feature in features.items() if feature["dtype"] != "video" and name not in table]
    if absent:
        raise DatasetFormatError(
            f"meta/info.json of {metadata.root} names {', '.join(absent)}; the data files have no such "
            f"column. {LEAVE_OUT_FEATURE}."
        )
    for name, feature in features.items():
        _check_kind(metadata, table, name, feature)


def check_episodes(
    metadata: DatasetMetadata, episodes: np.ndarray, numbers: np.ndarray, times: np.ndarray, tolerance_s: float
) -> None:
    """Compare `episode_index` and `timestamp` in the first and last row of episodes with the metadata.

    Args:
        episodes (`np.ndarray`): (n,) where the episodes are among those of the metadata.
        numbers, times (`np.ndarray`): (n, 2) the two columns in the first and last row of each.

    Raises:
        DatasetFormatError: an episode is not where its metadata says, or has another duration.
    """
    _check_bounds(metadata, episodes, numbers)
    _check_times(metadata, episodes, times[:, 0], times[:, 1], tolerance_s)


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _check_kind(metadata: DatasetMetadata, table: FrameTable, name: str, feature: Mapping) -> None:
    """Compare what a column holds with the declared dtype."""
    dtype = feature["dtype"]
    if dtype == "video":
        return
    expected = "picture" if dtype in CAMERAS else "text" if dtype == "string" else "number"
    found = table.kind(name)
    if found != expected:
        raise DatasetFormatError(
            f"meta/info.json of {metadata.root} gives {name} the dtype {dtype!r}, but the data files hold {found} "
            f"there instead of {expected}. {LEAVE_OUT_FEATURE}, or correct its dtype."
        )


def warn_of_unlisted_files(metadata: DatasetMetadata) -> None:
    """Log data files that no episode refers to, such as those of a killed recording."""
    listed = set(metadata.data_files)
    folders = [entry for entry in _entries(metadata.root / "data") if entry.is_dir()]
    found = (f"data/{folder.name}/{entry.name}" for folder in folders for entry in _entries(folder))
    unlisted = sorted(path for path in found if path.endswith(".parquet") and path not in listed)
    if unlisted:
        logger.warning(
            "%s has %d data file(s) that its metadata does not list, and which are not read: %s.",
            metadata.root,
            len(unlisted),
            ", ".join(unlisted[:4]),
        )


def instruction(metadata: DatasetMetadata, task_index: int, episode: int) -> str:
    """Return the instruction with that index, which a frame of `episode` refers to.

    Raises:
        DatasetFormatError: the dataset does not list it.
    """
    if task_index not in metadata.tasks:
        raise DatasetFormatError(
            f"Episode {metadata.episode_numbers[episode]} ({metadata.root / metadata.data_paths[episode]}) has "
            f"task_index {task_index}, which {metadata.tasks_path} does not list; it has "
            f"{', '.join(map(str, list(metadata.tasks)[:12]))}. Add the instruction there, or read other episodes: "
            f"{ONLY_EPISODES}."
        )
    return metadata.tasks[task_index]


def not_finite(metadata: DatasetMetadata, name: str, rows: Iterable[int]) -> DatasetFormatError:
    """Return the error for NaN or infinity in the feature `name` at `rows` of the dataset."""
    row = min(int(row) for row in rows)
    episode = int(np.searchsorted(metadata.episode_ends, row, side="right"))
    return DatasetFormatError(
        f"{name} has NaN or infinity in frame {row - metadata.episode_starts[episode]} of episode "
        f"{metadata.episode_numbers[episode]} ({metadata.root / metadata.data_paths[episode]}). "
        f"{LEAVE_OUT_FEATURE_OR_EPISODE}, or correct the recording."
    )


def check_size(features: Mapping[str, Mapping], camera: str, place: object, found: tuple[int, ...]) -> None:
    """Compare the (h, w) of pictures at `place` with the declared ones.

    Raises:
        VideoError: they differ.
    """
    stated = tuple(features[camera]["shape"][:2])
    if tuple(found) != stated:
        raise VideoError(
            f"{place} has pictures of {found[0]} × {found[1]} (height × width); meta/info.json says {stated[0]} × "
            f"{stated[1]} of {camera}. {LEAVE_OUT_FEATURE_OR_EPISODE}, or correct the size there or the pictures."
        )


def picture(table: FrameTable, features: Mapping[str, Mapping], camera: str, row: int) -> np.ndarray:
    """Return the picture (h, w, 3) that a camera has in a row of the dataset.

    Raises:
        DatasetFormatError: there is none, or one that is not in colours or grey.
        VideoError: it has another size than declared.
    """
    (cell,) = table.values(camera, [row])
    try:
        pixels = decode_image(cell)
    except NOT_AN_IMAGE as error:
        path, row_in_file = table.place(row)
        raise DatasetFormatError(
            f"{camera} in row {row_in_file} of {path} is not a picture in colours or grey: {error}. "
            f"{LEAVE_OUT_FEATURE_OR_EPISODE}."
        ) from error
    if list(pixels.shape[:2]) != features[camera]["shape"][:2]:
        path, row_in_file = table.place(row)
        check_size(features, camera, f"Row {row_in_file} of {path}", pixels.shape[:2])
    return pixels


def _wrong_counts(
    metadata: DatasetMetadata, here: np.ndarray, found: np.ndarray, expected: np.ndarray
) -> DatasetFormatError:
    """Return the error that names the files whose number of rows is wrong, each (files,)."""
    wrong = np.flatnonzero(found != expected)
    named = "; ".join(
        f"{metadata.data_paths.files[here[i]]} has {found[i]} for episode(s) {_span(metadata, here[i])}, expected "
        f"{expected[i]}"
        for i in wrong[:4].tolist()
    )
    return DatasetFormatError(
        f"The data files of {metadata.root} hold {found.sum()} frames; its metadata lists {expected.sum()}. {named}. "
        f"Download or write the dataset again."
    )


def _span(metadata: DatasetMetadata, file: int) -> str:
    episodes = metadata.episode_numbers[metadata.data_paths.file_of == file]
    return f"{episodes[0]}" if len(episodes) == 1 else f"{episodes[0]} … {episodes[-1]}"


def _check_bounds(metadata: DatasetMetadata, episodes: np.ndarray, found: np.ndarray) -> None:
    """Compare the column `episode_index` in the first and last row of every episode, (episodes, 2)."""
    numbers = metadata.episode_numbers[episodes]
    wrong = np.flatnonzero(np.any(found != numbers[:, None], axis=1))
    if wrong.size:
        i = int(wrong[0])
        raise DatasetFormatError(
            f"Episode {numbers[i]} of {metadata.root} is not where its metadata says: "
            f"{metadata.data_paths[episodes[i]]} has episode_index {found[i][0]} … {found[i][1]} there "
            f"({wrong.size} such episode(s)). An episode is missing, or has another length than stated; download "
            f"or write the dataset again."
        )


def _check_times(
    metadata: DatasetMetadata, episodes: np.ndarray, first: np.ndarray, last: np.ndarray, tolerance_s: float
) -> None:
    """Compare the duration of every episode, from its first and last timestamp, with the frame rate."""
    steps = (metadata.episode_ends - metadata.episode_starts - 1)[episodes]
    seconds = last.astype(np.float64) - first
    # An episode that is off by half a frame: row numbers no longer give times, and windows would be wrong.
    wrong = np.flatnonzero(~(np.abs(seconds - steps / metadata.fps) <= max(0.5 / metadata.fps, tolerance_s)))
    if wrong.size:
        i = int(wrong[0])
        raise DatasetFormatError(
            f"Episode {metadata.episode_numbers[episodes[i]]} of {metadata.root} lasts {seconds[i]:g} s by its "
            f"timestamps, and {steps[i] / metadata.fps:g} s by its {steps[i] + 1} frames at {metadata.fps:g} frames "
            f"per second ({wrong.size} such episode(s)). Correct fps in meta/info.json or record again; if the "
            f"timestamps are only approximate, pass {LARGER_TOLERANCE}."
        )
