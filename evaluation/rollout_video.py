"""Rollout videos: the first episodes of an evaluation, side by side in one file that a browser plays."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import new_file
from .._lock import locked
from ..errors import InvalidEnvironmentError, MissingRendererError
from .specification import specification

if TYPE_CHECKING:
    import gymnasium

    from ..data.video.encoder import VideoEncoder

logger = logging.getLogger(__name__)

EPISODES = 4
RATE = 20  # frames per second: every control step is a frame, so fast control is watched in slow motion
BORDER = 4  # pixels around a solved episode
GREEN = (46, 160, 67)
KEYFRAME_INTERVAL = 10  # frames; the file is played, not read in random order


class Film:
    """Film nothing: the film of an evaluation without a video.

    Args:
        note (`str`, *optional*): why there is no video although one was asked for.
    """

    name: str | None = None  # of the file

    def __init__(self, note: str | None = None):
        self.note = note

    def begin(self, environments: Sequence[Any], episodes: Sequence[Any]) -> None:
        """Begin a group, just reset."""

    def add(self, environments: Sequence[Any], episodes: Sequence[Any]) -> None:
        """Add the pictures after one control step."""

    def close(self) -> None:
        """Finish the file."""


class RolloutVideo(Film):
    """Film the first episodes of an evaluation while they run.

    Episodes of one group of environments stand side by side; a group with fewer leaves places black. An episode
    that is over keeps its last picture, with a green border when it was solved.

    Args:
        path (`str` or `Path`): the file to write, `.mp4` (H.264).
        fps (`int`): control steps per second of simulated time [1/s].
        episodes (`int`, *optional*, defaults to 4): how many to film.
        name (`str`, *optional*): the file's name in the end, where it gets another one.
    """

    def __init__(self, path: str | Path, fps: int, episodes: int = EPISODES, name: str | None = None):
        self.path, self.fps, self.rate = Path(path), fps, min(RATE, fps)
        self.name = name or self.path.name
        self.wanted, self.seeds, self.places = episodes, [], 0
        self._encoder: VideoEncoder | None = None
        self._pictures: list[np.ndarray] = []
        self._done: list[bool] = []

    @property
    def note(self) -> str:
        """A sentence about the video, for the card."""
        speed = "in real time" if self.rate == self.fps else f"at {self.rate / self.fps:.2g} of real speed"
        count = len(self.seeds)
        what = f"The first {count} episodes" if count > 1 else "The first episode"
        return f"{what} of the evaluation, {speed}; a green border means solved."

    def begin(self, environments: Sequence[Any], episodes: Sequence[Any]) -> None:
        """Begin a group, just reset: `episodes` have `seed`, `success` and `over`."""
        count = min(len(episodes), self.wanted - len(self.seeds))
        pictures = [_drawn(environment) for environment in environments[:count]]  # (h, w, 3) each
        drawn = next((picture for picture in pictures if picture is not None), None)
        if drawn is None:  # nothing left to film, or nothing draws
            self._pictures, self._done = [], []
            return
        self.seeds += [episode.seed for episode in episodes[:count]]
        self._pictures = [np.zeros_like(drawn) if picture is None else picture for picture in pictures]
        self._done = [episode.over for episode in episodes[:count]]
        self.places = self.places or count
        self._write()

    def add(self, environments: Sequence[Any], episodes: Sequence[Any]) -> None:
        """Add the pictures after one control step; the last one of a group is shown for a second."""
        if all(self._done):  # also when none of the group is filmed
            return
        for row, episode in enumerate(episodes[: len(self._pictures)]):
            if not self._done[row]:
                picture = self._pictures[row] if (drawn := _drawn(environments[row])) is None else drawn
                self._pictures[row] = _bordered(picture) if episode.over and episode.success else picture
                self._done[row] = episode.over
        for _ in range(self.rate if all(self._done) else 1):
            self._write()

    def close(self) -> None:
        """Finish the file."""
        if self._encoder is not None:
            self._encoder.close()

    def _write(self) -> None:
        empty = [np.zeros_like(self._pictures[0])] * (self.places - len(self._pictures))
        frame = np.concatenate([*self._pictures, *empty], axis=1)  # (h, places · w, 3)
        if self._encoder is None:
            # Imported here: it imports PyAV, which an evaluation without a video does not need.
            from ..data.video.encoder import VideoEncoder

            self._encoder = VideoEncoder(self.path, self.rate, keyframe_interval=KEYFRAME_INTERVAL)
        self._encoder.add(frame)


@contextmanager
def filming(path: str | os.PathLike | None, environment: gymnasium.Env, seed: int) -> Iterator[Film]:
    """Yield a film of `path`, which appears complete or not at all; without a renderer, of a film without a file.

    Args:
        path: the file to write; None for no video.
        environment: one of the environments to film; it is reset and rendered once to see whether it can be.
        seed: to reset it with.
    """
    if path is None:
        yield Film()
        return
    spec = specification(environment)
    try:
        environment.reset(seed=seed)
        picture_of(environment)
    except MissingRendererError as error:
        yield Film(f"There is no video: nothing on the machine of the evaluation draws. {error.remedy}")
    except InvalidEnvironmentError:
        yield Film(f"There is no video: {spec.name} does not draw itself.")
    except Exception as error:  # of one seed, perhaps; it must not cost the evaluation
        yield Film(f"There is no video: {spec.name} raised {type(error).__name__}: {error}")
    else:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, "the video of an evaluation"), new_file(path) as beside:
            film = RolloutVideo(beside, spec.fps, name=path.name)
            try:
                yield film
            finally:
                film.close()


def picture_of(environment: Any) -> np.ndarray:
    """Return the picture of `render()`, uint8 (h, w, 3), cropped to even sides.

    Raises:
        MissingRendererError: no renderer works on this machine.
        InvalidEnvironmentError: the environment has no picture.
    """
    try:
        picture = environment.render()
    except NotImplementedError:
        picture = None
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3:
        raise InvalidEnvironmentError(
            f"The environment draws {type(picture).__name__}; a video needs render() to return uint8 (h, w, 3)."
        )
    height, width, _ = picture.shape
    return picture[: height - height % 2, : width - width % 2]  # H.264 has no odd sides


def _drawn(environment: gymnasium.Env) -> np.ndarray | None:
    """Return the picture of an environment; None when it raises, which must not cost an episode."""
    try:
        return picture_of(environment)
    except Exception as error:
        logger.warning("A picture is missing in the video: %s: %s", type(error).__name__, error)
        return None


def _bordered(picture: np.ndarray) -> np.ndarray:
    picture = picture.copy()
    for edge in (np.s_[:BORDER], np.s_[-BORDER:], np.s_[:, :BORDER], np.s_[:, -BORDER:]):
        picture[edge] = GREEN
    return picture
