"""Take episodes and features out of a dataset, or distribute its episodes over several."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...errors import DatasetIndexError
from ..selection import choose_episodes, runs
from .agreement import common_info
from .compose import write_dataset
from .output import new_dataset
from .source import Source, open_source
from .videos import Piece

logger = logging.getLogger(__name__)


def select_from_dataset(
    source: str | Path,
    output: str | Path,
    *,
    episodes: Sequence[int] | None = None,
    remove_episodes: Sequence[int] | None = None,
    features: Sequence[str] | None = None,
    drop: Sequence[str] | None = None,
    rename_map: Mapping[str, str] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Path:
    """Write some episodes and features of `source` as the new LeRobot dataset `output`, and return it.

    Episodes are numbered anew in their order. Videos are cut without being encoded again: packets are copied from the
    keyframe in front of an episode on, and `meta/episodes` says where it begins; a warning counts frames of episodes
    left out that stay in the files so.

    Args:
        source (`str` or `Path`): a folder or Hub id of a dataset of version 3.0.
        output (`str` or `Path`): the folder to create; it appears complete or not at all.
        episodes (`Sequence[int]`, *optional*): the numbers of the episodes to keep; all by default.
        remove_episodes (`Sequence[int]`, *optional*): the numbers of those to leave out.
        features (`Sequence[str]`, *optional*): the features to keep, by their new names; all by default.
        drop (`Sequence[str]`, *optional*): the features to leave out.
        rename_map (`Mapping[str, str]`, *optional*): name of a feature in `source` → its name in `output`.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        progress (`bool`, *optional*, defaults to True): show progress bars.

    Raises:
        DatasetIndexError: an episode that does not exist, or none is left.
        UnknownDatasetFeatureError: a feature that does not exist, or none is left.
        OutputExistsError: `output` exists, or is or lies in `source`.
        DatasetVersionError, DatasetNotFoundError, DatasetFormatError, VideoError: `source` cannot be read.
        FolderInUseError, DiskError: another run writes `output`, or the disk does not take it.
    """
    opened = open_source(source, revision, rename_map, features, drop)
    numbers = opened.metadata.episode_numbers
    positions = choose_episodes(numbers, episodes)
    if remove_episodes is not None and len(remove_episodes):
        positions = np.setdiff1d(positions, choose_episodes(numbers, remove_episodes))
    if not len(positions):
        raise DatasetIndexError(
            f"No episode of {source} is left: remove_episodes={list(remove_episodes or ())} names all that were "
            f"chosen. It has {runs(numbers.tolist())}."
        )
    with new_dataset(output, [opened], f"a selection of {opened.name}") as folder:
        _write(folder, "manipulators dataset select", opened, positions, progress)
    return Path(output)


def split_dataset(
    source: str | Path,
    output: str | Path,
    *,
    fractions: Mapping[str, float] | None = None,
    episodes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    revision: str | None = None,
    progress: bool = True,
) -> dict[str, Path]:
    """Distribute the episodes of `source` over new LeRobot datasets `output/<name>`; return name → folder.

    Args:
        source (`str` or `Path`): a folder or Hub id of a dataset of version 3.0.
        output (`str` or `Path`): the folder to create, with a dataset per name; it appears complete or not at all.
        fractions (`Mapping[str, float]`, *optional*): name → its share of the episodes, in sum 1; which ones is drawn.
        episodes (`Mapping[str, Sequence[int]]`, *optional*): name → the numbers of its episodes; others are left out.
        seed (`int`, *optional*, defaults to 0): of the draw.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        progress (`bool`, *optional*, defaults to True): show progress bars.

    Raises:
        DatasetIndexError: not exactly one of `fractions` and `episodes`, a name that is no folder's, fractions that
            are not 1 in sum, a part without an episode, an episode in two parts or that does not exist.
        OutputExistsError: `output` exists, or is or lies in `source`.
        DatasetVersionError, DatasetNotFoundError, DatasetFormatError, VideoError: `source` cannot be read.
        FolderInUseError, DiskError: another run writes `output`, or the disk does not take it.
    """
    if bool(fractions) == bool(episodes):
        raise DatasetIndexError(
            "A split takes either fractions, --fractions train=0.9,val=0.1, or episodes, --episodes train=0-9 "
            "val=10-12."
        )
    for name in fractions or episodes:
        if not name or name.startswith(".") or set(name) & set("/\\\0"):
            raise DatasetIndexError(f"A part cannot be called {name!r}: its folder bears that name.")
    opened = open_source(source, revision)
    numbers = opened.metadata.episode_numbers
    parts = _drawn(numbers, fractions, seed) if fractions else _listed(numbers, episodes)
    with new_dataset(output, [opened], f"a split of {opened.name}") as folder:
        for name, positions in parts.items():
            (folder / name).mkdir()
            _write(folder / name, f"manipulators dataset split, {name}", opened, positions, progress)
    return {name: Path(output) / name for name in parts}


def _write(folder: Path, action: str, source: Source, positions: np.ndarray, progress: bool) -> None:
    source.fetch(positions)
    write_dataset(folder, action, [Piece(source, positions)], common_info([source]), progress)


def _drawn(numbers: np.ndarray, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Draw the positions of every part; sizes are rounded so that all episodes are in one."""
    shares = np.asarray(list(fractions.values()), dtype=np.float64)
    given = ", ".join(f"{name}={share:g}" for name, share in fractions.items())
    if not np.all(shares > 0) or not math.isclose(shares.sum(), 1.0, abs_tol=1e-6):
        raise DatasetIndexError(f"Fractions must be positive and 1 in sum; got {given}, in sum {shares.sum():g}.")
    exact = shares * len(numbers)
    counts = np.floor(exact + 1e-9).astype(int)
    largest = np.argsort(counts - exact, kind="stable")[: len(numbers) - counts.sum()]
    counts[largest] += 1
    if not counts.all():
        empty = ", ".join(name for name, count in zip(fractions, counts, strict=True) if not count)
        raise DatasetIndexError(
            f"{given} leaves {empty} without an episode: there are {len(numbers)}. Give it a larger share, or name "
            f"its episodes: --episodes NAME=0-9"
        )
    order = np.random.default_rng(seed).permutation(len(numbers))
    drawn = np.split(order, np.cumsum(counts)[:-1])
    return {name: np.sort(positions) for name, positions in zip(fractions, drawn, strict=True)}


def _listed(numbers: np.ndarray, episodes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Return the positions of every part."""
    parts = {name: choose_episodes(numbers, chosen) for name, chosen in episodes.items()}
    owner: dict[int, str] = {}
    for name, positions in parts.items():
        for position in positions.tolist():
            if position in owner:
                raise DatasetIndexError(
                    f"Episode {numbers[position]} is in {owner[position]} and in {name}; parts may share none."
                )
            owner[position] = name
    left = np.setdiff1d(np.arange(len(numbers)), list(owner))
    if len(left):
        logger.warning("%d episodes are in no part: %s.", len(left), runs(numbers[left].tolist()))
    return parts
