"""The finished episodes of a recording, each safe on the disk from the moment it is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..._files import read_json, replace_folder, write_text
from ...errors import CorruptFileError, DifferentRecordingError, OutputExistsError
from ..statistics.computing import ImageStatistics
from .place import EPISODE_FILE, EPISODE_FOLDER, EPISODE_PATTERN

DATASET_FOLDER = "dataset"  # in it: the dataset that is prepared
SETTINGS_FILE, DATA_FILE, PUBLISHED_FILE = "recording.json", "data.parquet", "published"


@dataclass(frozen=True)
class KeptEpisode:
    """Describe a finished episode.

    Args:
        length (`int`): its frames.
        tasks (`list[str]`): its instructions, each once.
        statistics (`dict`): feature → statistic → plain numbers.
        histograms (`dict`): camera → the pixels' counts (c, 256) and the number of images.
        note (`dict`): plain values of whoever records.
    """

    length: int
    tasks: list[str]
    statistics: dict[str, dict[str, list]]
    histograms: dict[str, tuple[list[list[int]], int]] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)

    def image_statistics(self, camera: str) -> ImageStatistics:
        """Return the counts of a camera's pixels."""
        statistics = ImageStatistics()
        histogram, statistics.num_images = self.histograms[camera]
        statistics.histogram = np.asarray(histogram)
        return statistics


class KeptEpisodes:
    """Keep finished episodes in a folder of their own each, until they are joined into a dataset.

    Args:
        folder (`Path`): of the recording; its parent exists.
        settings (`Mapping[str, Any]`): plain values that all episodes share, such as features and rate.

    Raises:
        DifferentRecordingError: the folder holds episodes of other settings.
        OutputExistsError: it holds something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        settings = json.loads(json.dumps(settings))  # as they are read back
        clear_published(folder)
        path = folder / SETTINGS_FILE
        if path.is_file() and self._folder_of(0).is_dir():
            self._compare(read_json(path), settings)
        elif not path.is_file() and folder.is_dir() and _is_in_use(folder):
            raise OutputExistsError(folder)
        else:
            folder.mkdir(exist_ok=True)
            write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        self.episodes: list[KeptEpisode] = []
        while self._folder_of(len(self.episodes)).is_dir():
            self.episodes.append(self._read(self._folder_of(len(self.episodes))))

    @property
    def dataset(self) -> Path:
        """The folder in which the dataset is prepared."""
        return self.folder / DATASET_FOLDER

    @property
    def current(self) -> Path:
        """The folder of the episode that is not finished."""
        return self.folder / "current"

    def add(self, episode: KeptEpisode, table: pa.Table) -> None:
        """Keep an episode, whose videos are in `current`: after this it survives a kill and a power cut."""
        self.current.mkdir(exist_ok=True)
        pq.write_table(table, self.current / DATA_FILE, row_group_size=len(table))
        (self.current / EPISODE_FILE).write_text(json.dumps(asdict(episode), ensure_ascii=False), encoding="utf-8")
        finished = self._folder_of(len(self.episodes))
        try:
            replace_folder(self.current, finished)
        finally:
            if finished.is_dir():  # also when an interrupt comes just after
                self.episodes.append(episode)

    def table(self, index: int) -> pa.Table:
        """Return an episode's rows."""
        path = self._folder_of(index) / DATA_FILE
        try:
            return pq.ParquetFile(path).read()
        except (pa.ArrowException, OSError) as error:
            raise CorruptFileError(path, "parquet file", error) from error

    def video(self, index: int, camera: str) -> Path:
        """Return where an episode's video is."""
        return self._folder_of(index) / f"{camera}.mp4"

    def publish(self, root: Path) -> None:
        """Give the prepared dataset its name, and remove what it was made of."""
        (self.folder / PUBLISHED_FILE).touch()
        replace_folder(self.dataset, root)
        self.remove()

    def discard_current(self) -> None:
        """Remove what is left of an episode that is not finished."""
        shutil.rmtree(self.current, ignore_errors=True)

    def remove(self) -> None:
        """Remove the recording."""
        _remove(self.folder)

    def _folder_of(self, index: int) -> Path:
        return self.folder / EPISODE_FOLDER.format(index)

    def _compare(self, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        others = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
        if others:
            count = len(list(self.folder.glob(EPISODE_PATTERN)))
            raise DifferentRecordingError(
                self.folder, count, {name: (found.get(name), settings.get(name)) for name in others}
            )

    @staticmethod
    def _read(folder: Path) -> KeptEpisode:
        path = folder / EPISODE_FILE
        try:
            return KeptEpisode(**read_json(path))
        except (TypeError, OSError) as error:
            if isinstance(error, CorruptFileError):
                raise
            raise CorruptFileError(path, "record of an episode", error) from error


def _is_in_use(folder: Path) -> bool:
    return any(not entry.name.startswith(".") for entry in folder.iterdir())


def clear_published(folder: Path) -> None:
    """Remove what is left of a recording whose dataset was finished just before the run was killed."""
    if (folder / PUBLISHED_FILE).exists() and not (folder / DATASET_FOLDER).exists():
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a recording so that a kill meanwhile leaves a shorter one, or one that is known as published."""
    entries = sorted(folder.glob("*"), reverse=True)
    for path in sorted(entries, key=lambda path: (path.name == PUBLISHED_FILE, path.name == SETTINGS_FILE)):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
