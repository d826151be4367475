"""The video files of a dataset that is made of others: packets are copied, never encoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import VideoError
from ..features import holds_depth
from ..video.joining import VideoFiles, video_columns
from ..video.reader import VideoReader
from .source import Source

logger = logging.getLogger(__name__)

Bar = Callable[[Iterable, str], Iterable]


class Piece(NamedTuple):
    """Episodes of one dataset that follow one another in another: `positions` among those of the metadata."""

    source: Source
    positions: np.ndarray


@dataclass(frozen=True)
class VideoColumn:
    """Where the frames of one camera are: one entry per episode that is written."""

    camera: str
    chunk: np.ndarray
    file: np.ndarray
    start: np.ndarray  # [s]

    def columns(self, number: int, seconds: float) -> dict:
        """Return the columns of `meta/episodes` of an episode."""
        place = {"chunk_index": int(self.chunk[number]), "file_index": int(self.file[number])}
        return video_columns(self.camera, place, float(self.start[number]), seconds)


class _Run(NamedTuple):
    """Episodes that follow one another in a file of their dataset, and are copied together."""

    path: Path
    start: float  # of the first frame [s]
    lengths: list[int]  # frames of each
    offsets: list[float]  # of each behind `start` [s]

    @property
    def num_frames(self) -> int:
        return sum(self.lengths)


def write_videos(
    folder: Path, camera: str, pieces: Sequence[Piece], fps: float, size_in_mb: float, bar: Bar
) -> VideoColumn:
    """Copy the frames of `camera` of all episodes into new files under `folder`, and return where they are.

    Raises:
        VideoError: a video cannot be read, is too short, or does not decode to the same frames once it is copied.
    """
    files = VideoFiles(folder, camera, fps, size_in_mb)
    chunk, file, start, ends, in_front = [], [], [], [], 0
    try:
        for run in bar(list(_runs(camera, pieces, fps)), camera.rpartition(".")[2]):
            part = files.append_part(run.path, run.start, run.num_frames)
            chunk += [part.place["chunk_index"]] * len(run.lengths)
            file += [part.place["file_index"]] * len(run.lengths)
            start += [_whole(part.start + offset, fps) for offset in run.offsets]
            ends.append((run, VideoFiles.path(camera, **part.place), part.start))
            in_front += part.in_front
    finally:
        files.close()
    if in_front:
        logger.warning(
            "%s: %d frames of episodes that are left out stay in the files, where nothing reads them: the kept "
            "episodes do not begin with keyframes, and nothing is encoded again.",
            camera,
            in_front,
        )
    if not holds_depth(pieces[0].source.features[camera]):
        _require_same_frames(folder, ends, fps)
    return VideoColumn(camera, np.asarray(chunk), np.asarray(file), np.asarray(start))


def _runs(camera: str, pieces: Sequence[Piece], fps: float) -> Iterator[_Run]:
    """Yield the episodes' videos, those that follow one another in a file together."""
    for source, positions in pieces:
        places, run, end = source.metadata.videos[camera], None, 0.0
        for position in positions.tolist():
            path, first = source.root / places.paths[position], float(places.from_timestamp[position])
            if run is None or path != run.path or abs(first - end) > 0.5 / fps:
                if run is not None:
                    yield run
                run = _Run(path, first, [], [])
            run.lengths.append(source.length(position))
            run.offsets.append(first - run.start)
            end = first + source.length(position) / fps
        if run is not None:
            yield run


def _whole(seconds: float, fps: float) -> float:
    """Return the time of a frame without what additions have rounded."""
    exact = round(seconds * fps) / fps
    return exact if abs(exact - seconds) < 1e-9 * max(1.0, seconds) else seconds


def _require_same_frames(folder: Path, ends: Sequence[tuple[_Run, str, float]], fps: float) -> None:
    """Decode the first and last frame of every run from both files, and compare them."""
    old, new = VideoReader(), VideoReader()
    for run, path, start in ends:
        seconds = np.asarray([0.0, run.offsets[-1] + (run.lengths[-1] - 1) / fps])
        half = 0.5 / fps  # whether the times are exact is for those to say who read the dataset
        copied = new.frames(folder / path, start + seconds, half)
        if not copied.equal(old.frames(run.path, run.start + seconds, half)):
            raise VideoError(
                f"{run.path} does not decode to the same frames once it is copied, from {run.start:.3f} s on. Record "
                f"these episodes again, or encode the video anew with constant frame rate."
            )
    old.close(), new.close()
