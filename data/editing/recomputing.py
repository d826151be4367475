"""Compute the statistics of a dataset anew, or compare those that are recorded."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..._disk import naming_disk_errors
from ..._files import new_file, write_text
from ..._lock import locked
from ...errors import DatasetFormatError, DatasetIndexError, StaleStatisticsError, UnknownDatasetFeatureError
from ..checks import check_size
from ..convert import FRAMES_AT_ONCE
from ..features import CAMERAS, INDEX_FEATURES, holds_depth
from ..images import NOT_AN_IMAGE, decode_image
from ..layouts.json_files import STATISTICS_PATH, load_statistics_file, read_json
from ..layouts.metadata import Statistics
from ..layouts.writer import plain_statistics
from ..statistics.computing import ImageStatistics, compute_statistics
from ..video.reader import VideoReader
from ..windows import exact_times
from .compose import column_statistics, is_number
from .source import AT_ONCE, EPISODE_FILES, Source, open_source

logger = logging.getLogger(__name__)

# How far recorded statistics may be from those of the data. Of numbers, relative to their range: they are stored in
# float32. Of pictures: most writers count a sample of the frames, and extremes hang on single pixels.
TOLERANCE, OF_PICTURES = 1e-4, 0.05
_EXTREMES = ("min", "max")


def recompute_statistics(
    source: str | Path,
    *,
    features: Sequence[str] | None = None,
    tolerance_s: float = 1e-4,
    progress: bool = True,
) -> Statistics:
    """Compute the statistics of every episode and of the whole dataset, with quantiles, and record them in its folder.

    All frames of cameras are decoded. Files are replaced one by one; an interrupted run leaves some statistics as they
    were, and is repeated.

    Args:
        source (`str` or `Path`): a folder of a dataset of version 3.0.
        features (`Sequence[str]`, *optional*): the features whose statistics are computed; all by default.
        tolerance_s (`float`, *optional*, defaults to 1e-4): how far a frame may be from its timestamp [s].
        progress (`bool`, *optional*, defaults to True): show progress bars.

    Returns:
        feature → min, max, mean, std, count, q01 … q99, float32; those of cameras (c, 1, 1) in [0, 1].

    Raises:
        DatasetIndexError: a dataset of the Hub.
        DatasetVersionError, DatasetNotFoundError, DatasetFormatError, VideoError: `source` cannot be read.
        UnknownDatasetFeatureError: a feature that it does not have.
        FolderInUseError, DiskError: another run writes there, or the disk does not take it.
    """
    opened = open_source(source, features=features)
    if opened.revision is not None:
        raise DatasetIndexError(
            f"{source} is on the Hub. Download it, compute its statistics and publish it: "
            f"hf download --repo-type dataset {source} --local-dir FOLDER"
        )
    root = opened.root
    with naming_disk_errors(root), locked(root, f"statistics of {opened.name}"):
        computation = _Computation(opened, features, tolerance_s, progress)
        for path in sorted(root.glob(EPISODE_FILES)):
            with new_file(path) as beside:
                computation.rewrite(path, beside)
        statistics = computation.whole()
        recorded = read_json(root, STATISTICS_PATH) if (root / STATISTICS_PATH).is_file() else {}
        recorded |= {name: plain_statistics(values) for name, values in statistics.items()}
        write_text(root / STATISTICS_PATH, json.dumps(recorded, indent=4, ensure_ascii=False))
    return statistics


def check_statistics(
    source: str | Path,
    *,
    features: Sequence[str] | None = None,
    revision: str | None = None,
    tolerance_s: float = 1e-4,
    progress: bool = True,
) -> Statistics:
    """Compute the statistics of a dataset as `recompute_statistics`, compare those recorded with them, return them.

    Numbers may differ by 1e-4 of their range. Of pictures mean, deviation and quantiles may differ by 0.05, since most
    writers count a sample of the frames; extremes are not compared.

    Raises:
        StaleStatisticsError: some differ or are absent; the message lists them.
        DatasetVersionError, DatasetNotFoundError, DatasetFormatError, VideoError: `source` cannot be read.
        UnknownDatasetFeatureError: a feature that it does not have.
    """
    opened = open_source(source, revision, features=features)
    opened.fetch(opened.every)
    recorded = load_statistics_file(opened.root)
    computation = _Computation(opened, features, tolerance_s, progress)
    for path in sorted(opened.root.glob(EPISODE_FILES)):
        computation.rewrite(path, None)
    statistics = computation.whole()
    problems = [
        f"{name}: {problem}"
        for name, values in statistics.items()
        if name in recorded or name not in INDEX_FEATURES
        for problem in _differences(recorded.get(name), values, opened.features[name]["dtype"] in CAMERAS)
    ]
    if problems:
        raise StaleStatisticsError(
            "\n".join(
                [
                    f"The statistics of {opened.name} are not those of its data:",
                    *(f"  {problem}" for problem in problems),
                    f"Compute them anew: manipulators dataset stats {shlex.quote(str(source))}",
                ]
            )
        )
    return statistics


def _differences(recorded: dict | None, computed: dict, of_pictures: bool) -> Iterator[str]:
    if recorded is None:
        yield "none are recorded"
        return
    span = 1.0 if of_pictures else np.maximum(computed["max"] - computed["min"], np.abs(computed["mean"]) * 1e-2)
    for key, value in computed.items():
        if key == "count" or (of_pictures and key in _EXTREMES):
            continue
        found = recorded.get(key)
        if found is None:
            yield f"{key} is not recorded"
            continue
        if found.size != value.size:
            yield f"{key} has {found.size} values, expected {value.size}"
            continue
        far = np.abs(found.reshape(value.shape) - value) > (OF_PICTURES if of_pictures else TOLERANCE) * span
        if np.any(far | ~np.isfinite(found.reshape(value.shape))):
            yield f"{key} is {_short(found)}, of the data {_short(value)}"


def _short(values: np.ndarray) -> str:
    flat = [f"{value:.6g}" for value in values.reshape(-1)[:8].tolist()]
    return f"[{', '.join(flat)}{', …' if values.size > 8 else ''}]"


class _Computation:
    """Statistics of every episode, a few hundred at a time, and of all of them."""

    def __init__(self, source: Source, names: Sequence[str] | None, tolerance_s: float, progress: bool):
        self._source, self._tolerance_s = source, tolerance_s
        computed = source.features if names is None else {name: source.features[name] for name in names}
        self._numbers = [name for name, feature in computed.items() if is_number(feature)]
        self._cameras = [
            name for name, feature in computed.items() if feature["dtype"] in CAMERAS and not holds_depth(feature)
        ]
        if not self._numbers and not self._cameras:
            raise UnknownDatasetFeatureError(f"None of {', '.join(computed)} has statistics: they hold no numbers.")
        self._pictures = {camera: ImageStatistics() for camera in self._cameras}
        self._reader = VideoReader(fps=source.metadata.fps)
        self._bar = tqdm(total=len(source.every), desc="statistics", disable=not progress, leave=False)

    def rewrite(self, path: Path, target: Path | None) -> None:
        """Write a file of meta/episodes with the statistics of its episodes; without `target` only count them."""
        metadata, writer = self._source.metadata, None
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(AT_ONCE):
                    table = pa.Table.from_batches([batch])
                    numbers = table["episode_index"].to_numpy()
                    positions = np.searchsorted(metadata.episode_numbers, numbers)
                    rows = [self._episode(*item) for item in self._episodes(positions)]
                    if target is None:
                        continue
                    table = _with_columns(table, rows)
                    if writer is None:
                        writer = pq.ParquetWriter(target, table.schema)
                    writer.write_table(table.cast(writer.schema))
        finally:
            if writer is not None:
                writer.close()

    def whole(self) -> Statistics:
        """Return the statistics of the whole dataset."""
        self._bar.close()
        self._reader.close()
        source, statistics = self._source, {}
        paths = [source.root / path for path in source.metadata.data_files]
        for name, feature in source.features.items():
            if name in self._pictures:
                statistics[name] = self._pictures[name].compute()
            elif name in self._numbers:
                statistics[name] = column_statistics(paths, name, tuple(feature["shape"]))
        return statistics

    def _episodes(self, positions: np.ndarray) -> Iterable[tuple[int, pa.Table]]:
        return zip(positions.tolist(), self._source.tables(positions), strict=True)

    def _episode(self, position: int, table: pa.Table) -> dict[str, object]:
        """Return the columns of statistics of an episode, and count its pictures."""
        row: dict[str, object] = {}
        for name in list(self._numbers):
            numbers = self._source.numbers(table, name)
            if not np.isfinite(numbers).all():
                logger.warning("%s has values that are not finite: it gets no statistics.", name)
                self._numbers.remove(name)
                continue
            row |= _columns(name, compute_statistics(numbers))
        for camera in self._cameras:
            counted = ImageStatistics()
            frames = self._decoded if camera in self._source.metadata.videos else self._stored
            for image in frames(camera, position, table):
                counted.add(image)
            self._pictures[camera].merge([counted])
            row |= _columns(camera, counted.compute())
        self._bar.update()
        return row

    def _decoded(self, camera: str, position: int, table: pa.Table) -> Iterator[np.ndarray]:
        """Yield the frames of an episode (3, h, w)."""
        places = self._source.metadata.videos[camera]
        path = self._source.root / places.paths[position]
        stated = self._source.numbers(table, "timestamp").reshape(-1)
        seconds = exact_times(stated, np.arange(len(table)), self._source.metadata.fps)
        for first in range(0, len(table), FRAMES_AT_ONCE):
            times = places.from_timestamp[position] + seconds[first:][:FRAMES_AT_ONCE]
            frames = self._reader.frames(path, times, self._tolerance_s)
            check_size(self._source.features, camera, path, frames.shape[-2:])
            yield from frames.numpy()

    def _stored(self, camera: str, position: int, table: pa.Table) -> Iterator[np.ndarray]:
        """Yield the pictures of an episode's rows (h, w, 3)."""
        for row in range(len(table)):
            try:
                yield decode_image(table[camera][row].as_py())
            except NOT_AN_IMAGE as error:
                raise DatasetFormatError(
                    f"{camera} in frame {row} of episode {self._source.metadata.episode_numbers[position]} is not a "
                    f"picture in colours or grey: {error}. Leave the episode out: manipulators dataset select"
                ) from error


def _columns(name: str, statistics: dict[str, np.ndarray]) -> dict[str, object]:
    return {f"stats/{name}/{key}": value for key, value in plain_statistics(statistics).items()}


def _with_columns(table: pa.Table, rows: Sequence[dict[str, object]]) -> pa.Table:
    """Return rows of meta/episodes with these statistics, in the columns that are there or in new ones."""
    for name in rows[0]:
        values = pa.array([row.get(name) for row in rows])
        place = table.schema.get_field_index(name)
        table = table.append_column(name, values) if place < 0 else table.set_column(place, name, values)
    return table
