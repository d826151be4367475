"""The files of a dataset as numbers: names of a hundred thousand episodes' files are made when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

_FEW = 100  # files that are looked for one by one; of more of them, whole folders are listed


class Template(Protocol):
    """What fills numbers into the path of a file."""

    def fill(self, **values: int | str) -> str:
        """Return the path of one file, which is inside the dataset's folder."""

    def filled(self, **values: int | str) -> str:
        """Return the path of one file, of which that is known."""


class FileList(Sequence[str]):
    """Paths relative to the dataset's folder: a template, and the numbers to fill in.

    Args:
        template: fills them in.
        numbers (`Mapping[str, np.ndarray]`): name in the template → (files,) numbers.
        camera (`str`, *optional*): the `video_key` of all files.

    Raises:
        DatasetFormatError: a file would be outside the dataset's folder.
    """

    def __init__(self, template: Template, numbers: Mapping[str, np.ndarray], camera: str | None = None):
        self._template, self._numbers = template, dict(numbers)
        self._camera = {} if camera is None else {"video_key": camera}
        # Numbers lead nowhere else: if the first and the longest path are inside, all are.
        ends = [0, *(int(np.abs(each).argmax()) for each in self._numbers.values())] if len(self) else []
        for i in dict.fromkeys(ends):
            template.fill(**self._values(i))

    def __len__(self) -> int:
        return len(next(iter(self._numbers.values())))

    def __getitem__(self, chosen: int | slice | np.ndarray) -> str | FileList:
        if isinstance(chosen, (slice, np.ndarray)):
            part = object.__new__(FileList)
            part.__dict__ = self.__dict__ | {"_numbers": {name: n[chosen] for name, n in self._numbers.items()}}
            return part
        return self._template.filled(**self._values(chosen))

    def __iter__(self) -> Iterator[str]:
        names, fill = list(self._numbers), self._template.filled
        for values in zip(*(numbers.tolist() for numbers in self._numbers.values()), strict=True):
            yield fill(**dict(zip(names, values, strict=True)), **self._camera)

    def _values(self, i: int) -> dict[str, int | str]:
        return {name: int(numbers[i]) for name, numbers in self._numbers.items()} | self._camera


class FilePaths(Sequence[str]):
    """The file of every episode; many episodes may share one.

    Args:
        template, camera: as of `FileList`.
        numbers (`Mapping[str, np.ndarray]`): name in the template → (episodes,) numbers.
    """

    def __init__(self, template: Template, numbers: Mapping[str, np.ndarray], camera: str | None = None):
        stacked = np.stack(list(numbers.values()), axis=1)  # (episodes, names)
        first, file_of = _distinct(stacked)
        files = FileList(template, {name: values[first] for name, values in numbers.items()}, camera)
        names: dict[str, int] = {}
        same = np.asarray([names.setdefault(name, len(names)) for name in files])  # a template may leave a number out
        if len(names) < len(files):
            files, file_of = files[np.unique(same, return_index=True)[1]], same[file_of]
        self.files = files  # the distinct ones, in the order of their episodes
        self.file_of = file_of.astype(np.int32)  # (episodes,) where each episode's is among them

    def __len__(self) -> int:
        return len(self.file_of)

    def __getitem__(self, episode: int | slice) -> str | list[str]:
        if isinstance(episode, slice):
            return [self.files[number] for number in self.file_of[episode]]
        return self.files[self.file_of[episode]]

    def of(self, episodes: np.ndarray) -> FileList:
        """Return the distinct files of some episodes, in the order of all."""
        return self.files[np.unique(self.file_of[episodes])]

    def numbers_of(self, paths: Iterable[str]) -> np.ndarray:
        """Return where paths are among the distinct files."""
        numbers = {path: number for number, path in enumerate(self.files)}
        return np.asarray([numbers[path] for path in paths], dtype=np.int64)


class FilesAt(Sequence[Path]):
    """The files of a list, in a folder."""

    def __init__(self, root: Path, files: FileList):
        self.root, self._files = root, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int | slice) -> Path | FilesAt:
        return FilesAt(self.root, self._files[i]) if isinstance(i, slice) else self.root / self._files[i]

    def __iter__(self) -> Iterator[Path]:
        return (self.root / name for name in self._files)


def are_files(paths: Sequence[str | os.PathLike]) -> np.ndarray:
    """Return which of many paths are files, (paths,)."""
    if len(paths) <= _FEW:
        return np.asarray([os.path.isfile(path) for path in paths], dtype=bool)
    listed: dict[str, set[str]] = {}
    found = np.zeros(len(paths), dtype=bool)
    for i, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = _files_in(folder)
        found[i] = name in listed[folder]
    return found


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each distinct row is first, in their order, and which of those every row is."""
    if (np.diff(rows[:, -1]) == 1).all() and len(rows):  # of one file per episode
        return np.arange(len(rows)), np.arange(len(rows))
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[inverse.reshape(-1)]
