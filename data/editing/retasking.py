"""Give episodes of a dataset other instructions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..._files import new_folder
from ...errors import DatasetIndexError, UnknownTaskError, nearest
from ..checks import instruction
from ..features import INDEX_FEATURES
from ..layouts.json_files import STATISTICS_PATH, read_json
from ..layouts.metadata import INFO_PATH
from ..layouts.v3 import TASKS_PATH
from ..layouts.writer import plain_statistics, write_tasks
from ..selection import choose_episodes
from ..statistics.computing import compute_statistics
from .compose import column_statistics
from .origin import record_origin
from .output import new_dataset
from .source import AT_ONCE, EPISODE_FILES, Source, open_source
from .videos import Piece

_ROWS = 65_536  # of data files in memory
_COLUMN = "task_index"


def retask_dataset(
    source: str | Path,
    output: str | Path | None = None,
    *,
    task: str | None = None,
    tasks: Mapping[str, str] | None = None,
    episodes: Sequence[int] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Path:
    """Give the frames of a LeRobot dataset other instructions, in place or in the copy `output`; return the folder.

    In place, a new folder is made beside the dataset, in which files that do not change are links to the present ones,
    and takes its place in the end: an interrupted run changes nothing.

    Args:
        source (`str` or `Path`): a folder of a dataset of version 3.0, or with `output` a Hub id.
        output (`str` or `Path`, *optional*): the folder to create, with copies of all files; by default in place.
        task (`str`, *optional*): the instruction of all chosen episodes.
        tasks (`Mapping[str, str]`, *optional*): present instruction → new one; frames with others keep theirs.
        episodes (`Sequence[int]`, *optional*): the numbers of the episodes; all by default.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        progress (`bool`, *optional*, defaults to True): show a progress bar.

    Raises:
        UnknownTaskError: `tasks` names an instruction that no frame of the episodes has, or one is empty.
        DatasetIndexError: an episode that does not exist; not exactly one of `task` and `tasks`; a dataset of the Hub
            without `output`.
        OutputExistsError: `output` exists, or is or lies in `source`.
        DatasetVersionError, DatasetNotFoundError, DatasetFormatError: `source` cannot be read.
        FolderInUseError, DiskError: another run writes there, or the disk does not take it.
    """
    if (task is None) == (not tasks):
        raise DatasetIndexError('Give one new instruction, --task "open the drawer", or pairs, --map "old=new".')
    opened = open_source(source, revision)
    if output is None and opened.revision is not None:
        raise DatasetIndexError(f"{source} is on the Hub; name the folder of a copy to change: --output FOLDER")
    positions = choose_episodes(opened.metadata.episode_numbers, episodes)
    opened.fetch(opened.every)
    change = _Retasking(opened, positions, task, tasks or {}, progress)
    purpose = f"other instructions for {opened.name}"
    if output is None:
        with new_folder(opened.root, purpose, replace=True) as folder:
            change.write(folder, os.link)
        return opened.root
    with new_dataset(output, [opened], purpose) as folder:
        change.write(folder, shutil.copyfile)
        record_origin(folder, "manipulators dataset retask", [Piece(opened, opened.every)])
    return Path(output)


class _Retasking:
    """The instructions that a dataset is given, read from its data files in one pass."""

    def __init__(
        self, source: Source, positions: np.ndarray, task: str | None, tasks: Mapping[str, str], progress: bool
    ):
        self._source, self._progress = source, progress
        for text in (task, *tasks.values()):
            if text is not None and not text.strip():
                raise UnknownTaskError("An instruction must be a text that is not empty.")
        self._numbers = source.metadata.episode_numbers[positions]
        chosen, self._texts, self._rows = set(positions.tolist()), {}, {}
        # Present index → new one, of frames in episodes that are chosen and in others.
        self._new: tuple[dict[int, int], dict[int, int]] = ({}, {})
        found: set[str] = set()
        indices = replace(source, features={name: source.features[name] for name in INDEX_FEATURES})
        for position, table in zip(source.every.tolist(), indices.tables(source.every), strict=True):
            old = source.numbers(table, _COLUMN).reshape(-1)
            is_chosen = position in chosen
            known = self._new[is_chosen]
            for index in dict.fromkeys(old.tolist()):
                text = instruction(source.metadata, index, position)
                if is_chosen:
                    found.add(text)
                    text = tasks.get(text, text) if task is None else task
                known.setdefault(index, self._texts.setdefault(text, len(self._texts)))
            new = np.asarray([known[index] for index in old.tolist()])
            is_constant = bool(np.all(new == new[0]))
            self._rows[int(source.metadata.episode_numbers[position])] = new[:1] if is_constant else new
        for text in tasks:
            if text not in found:
                raise UnknownTaskError(
                    f"No frame of the chosen episodes has the instruction {text!r}. {nearest(text, found)}"
                )

    def write(self, folder: Path, carry_over) -> None:
        """Write the dataset into the empty `folder`; `carry_over(path, new path)` links or copies a file."""
        source = self._source
        data = set(source.metadata.data_files)
        rewritten = {TASKS_PATH, STATISTICS_PATH, INFO_PATH}
        for path in sorted(path for path in source.root.rglob("*") if path.is_file()):
            name = path.relative_to(source.root).as_posix()
            if name in rewritten or path.match(EPISODE_FILES):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name not in data:
                _carry(path, folder / name, carry_over)
        for name in tqdm(source.metadata.data_files, desc="data", disable=not self._progress, leave=False):
            _rewrite(source.root / name, folder / name, self._with_tasks, _ROWS)
        for path in sorted(source.root.glob(EPISODE_FILES)):
            _rewrite(path, folder / path.relative_to(source.root), self._with_episode_tasks, AT_ONCE)
        write_tasks(folder, {number: text for text, number in self._texts.items()})
        info = read_json(source.root, INFO_PATH) | {"total_tasks": len(self._texts)}
        _write_json(folder / INFO_PATH, info)
        if (source.root / STATISTICS_PATH).is_file():
            statistics = read_json(source.root, STATISTICS_PATH)
            paths = [folder / name for name in source.metadata.data_files]
            statistics[_COLUMN] = plain_statistics(column_statistics(paths, _COLUMN, (1,)))
            _write_json(folder / STATISTICS_PATH, statistics)

    def _with_tasks(self, table: pa.Table) -> pa.Table:
        """Return rows of a data file with the new indices."""
        old, episode = table[_COLUMN].to_numpy(), table["episode_index"].to_numpy()
        is_chosen, new = np.isin(episode, self._numbers), np.array(old)
        for chosen, known in zip((False, True), self._new, strict=True):
            for before, after in known.items():
                new[(is_chosen == chosen) & (old == before)] = after
        return _with_column(table, _COLUMN, new)

    def _with_episode_tasks(self, table: pa.Table) -> pa.Table:
        """Return rows of meta/episodes with the new instructions, and statistics of their indices."""
        texts = list(self._texts)
        rows = [self._rows[number] for number in table["episode_index"].to_pylist()]
        named = [[texts[index] for index in dict.fromkeys(new.tolist())] for new in rows]
        table = _with_column(table, "tasks", named)
        prefix = f"stats/{_COLUMN}/"
        columns = [name for name in table.column_names if name.startswith(prefix)]
        if columns:
            lengths = table["length"].to_pylist()
            whole = [np.broadcast_to(new, length) for new, length in zip(rows, lengths, strict=True)]
            computed = [plain_statistics(compute_statistics(new[:, None])) for new in whole]
            for name in columns:
                table = _with_column(table, name, [row.get(name.removeprefix(prefix)) for row in computed])
        return table


def _carry(path: Path, target: Path, carry_over) -> None:
    try:
        carry_over(path.resolve(), target)
    except OSError:
        if carry_over is not os.link:
            raise
        shutil.copyfile(path, target)  # a file system without links


def _rewrite(path: Path, target: Path, change, rows: int) -> None:
    """Write a parquet file anew, with `change` applied to some rows at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetFile(path) as file, pq.ParquetWriter(target, file.schema_arrow) as writer:
        for table in _row_groups(file, rows):
            writer.write_table(change(table))


def _row_groups(file: pq.ParquetFile, rows: int) -> Iterator[pa.Table]:
    """Yield the row groups, large ones in parts."""
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(rows, row_groups=[group]):
            yield pa.Table.from_batches([batch])


def _with_column(table: pa.Table, name: str, values: Sequence) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.column_names.index(name), field, pa.array(values, type=field.type))


def _write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False), encoding="utf-8")
