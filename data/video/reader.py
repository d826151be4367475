"""VideoReader: random access to the frames of many video files, through a few open decoders.

Notation: n frames, c channels, h height, w width; times in seconds from the start of the file.
"""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from ...errors import FrameNotFoundError, MissingVideoError, VideoError
from ..features import has_deep_grey
from ..remedies import LARGER_TOLERANCE, LEAVE_OUT_FEATURE

# Conversion to RGB starts a thread per core from PyAV 18 on; DataLoader workers already use every core.
_ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 18 else {}
_SHARE_OF_FILES = 4  # decoders take at most a quarter of the files that the process may open
_MEMORY = 512 * 2**20  # bytes of all decoders together, about; 180 of 480×640
RATE_TOLERANCE = 0.1  # relative; a container's average rate is not exact, a wrong rate is far off


class VideoReader:
    """Decode single frames out of many video files, keeping the last used ones open.

    Opening costs about as much as decoding two frames, so decoders stay open. Frames that lie apart do not need each
    other, so several decoders of one file work side by side. Nothing open is pickled or used across a fork: every
    process opens its own.

    Args:
        max_open (`int`, *optional*): open files, least recently used closed first; by default as many as the process
            may open, and about half a gigabyte of memory holds.
        decoders (`int`, *optional*): decoders per file that work side by side, each in one thread; by default as many
            as torch uses threads in the process: every core in a program, one in a DataLoader's worker.
        fps (`float`, *optional*): refuse a file that was recorded at another rate.
    """

    def __init__(self, max_open: int | None = None, decoders: int | None = None, fps: float | None = None):
        self.max_open, self.decoders, self.fps = max_open, decoders, fps
        self._open: OrderedDict[Path, list[_OpenVideo]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    @property
    def open_files(self) -> list[Path]:
        """The files open in this process, least recently used first."""
        return list(self._open) if self._process == os.getpid() else []

    def frames(self, path: str | Path, seconds: Sequence[float], tolerance_s: float = 1e-4) -> torch.Tensor:
        """Return the frames nearest to `seconds` as uint8 (n, 3, h, w), in the order given.

        Args:
            path (`str` or `Path`): a file with one video stream.
            seconds (`Sequence[float]`): times from the start of the file [s].
            tolerance_s (`float`, *optional*, defaults to 1e-4): largest distance to the frame found [s].

        Raises:
            MissingVideoError: there is no such file.
            VideoError: it cannot be decoded, or has another frame rate.
            FrameNotFoundError: no frame lies within `tolerance_s`.
        """
        videos = self._videos(Path(path))
        if not len(seconds):
            return torch.empty((0, 3, 0, 0), dtype=torch.uint8)
        order = np.argsort(seconds, kind="stable")  # forwards through the file: fewer seeks
        count = videos[0].useful_decoders(np.asarray(seconds)[order], self._decoders_here())
        while len(videos) < count:
            videos.append(self._opened(Path(path)))
        self._close_unused()
        frames = np.empty((len(seconds), 3, *videos[0].size), dtype=np.uint8)

        def decode(video: _OpenVideo, positions: np.ndarray) -> None:
            for position in positions:
                pixels = video.pixels(float(seconds[position]), tolerance_s)  # (h, w, 3)
                # By numpy: a copy this small costs torch's threads more to share than to make.
                frames[position] = pixels.transpose(2, 0, 1)  # (3, h, w)

        parts = np.array_split(order, count)
        if count == 1:
            decode(videos[0], parts[0])
        else:
            for _ in self._threads().map(decode, videos, parts):  # raises what a decoder raised
                pass
        return torch.from_numpy(frames)

    def close(self) -> None:
        """Close every file this process has opened."""
        if self._process == os.getpid():
            for videos in self._open.values():
                _close_all(videos)
        self._open = OrderedDict()

    def close_removed(self) -> None:
        """Close the files that are not in their folder any more, so that the disk gets their space back."""
        for path in [path for path in self.open_files if not path.exists()]:
            _close_all(self._open.pop(path))

    def _videos(self, path: Path) -> list[_OpenVideo]:
        """Return the open decoders of a file, at least one; the caller may add to the list."""
        if self._process != os.getpid():
            # A fork shares the file offsets with its parent; closing here could wait for threads that only
            # the parent has. So the parent's decoders are set aside, untouched.
            self._inherited = self._open, self._pool
            self._open, self._pool, self._process = OrderedDict(), None, os.getpid()
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        self._open[path] = [self._opened(path)]
        return self._open[path]

    def _opened(self, path: Path) -> _OpenVideo:
        """Open a file, others closed first where the process may open no more."""
        while True:
            try:
                return _OpenVideo(path, self.fps)
            except VideoError as error:
                unused = [other for other in self._open if other != path]
                if getattr(error.__cause__, "errno", None) != errno.EMFILE or not unused:
                    raise
                for other in unused[: (len(unused) + 1) // 2]:
                    _close_all(self._open.pop(other))

    def _close_unused(self) -> None:
        """Close the files that were used longest ago until the others are few enough; that used last stays."""
        decoders = [video for videos in self._open.values() for video in videos]
        count, memory = len(decoders), sum(video.memory for video in decoders)
        most = _most_decoders() if self.max_open is None else count
        while len(self._open) > 1 and (
            count > most or memory > _MEMORY or len(self._open) > (self.max_open or len(self._open))
        ):
            videos = self._open.popitem(last=False)[1]
            count, memory = count - len(videos), memory - sum(video.memory for video in videos)
            _close_all(videos)

    def _decoders_here(self) -> int:
        return torch.get_num_threads() if self.decoders is None else self.decoders

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._decoders_here(), thread_name_prefix="video")
        return self._pool

    def __getstate__(self) -> dict:
        return {"max_open": self.max_open, "decoders": self.decoders, "fps": self.fps}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _most_decoders() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(limit // _SHARE_OF_FILES, 1) if limit != resource.RLIM_INFINITY else 2**16


def _close_all(videos: list[_OpenVideo]) -> None:
    for video in videos:
        video.close()


class _OpenVideo:
    """One open file and the position of its decoder."""

    def __init__(self, path: Path, fps: float | None):
        self.path = path
        if not path.is_file():
            raise MissingVideoError(f"There is no video at {path}. Download or record the dataset again.")
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1  # more of them only add delay after a seek
            self._rate = float(self._stream.average_rate or self._stream.guessed_rate)
        except (av.FFmpegError, IndexError, TypeError) as error:
            raise self._unreadable(error) from error
        if has_deep_grey(self._stream.codec_context.pix_fmt):
            self._container.close()
            raise VideoError(
                f"{path} holds grey levels of more than eight bits ({self._stream.codec_context.pix_fmt}), such as "
                f"depth, not colours. {LEAVE_OUT_FEATURE}."
            )
        if fps is not None and abs(self._rate / fps - 1) > RATE_TOLERANCE:
            self._container.close()
            raise VideoError(
                f"{path} has {self._rate:g} frames per second, its dataset {fps:g}: one of the two is wrong. "
                f"Correct fps in meta/info.json, or download or record the video again."
            )
        # A frame's own conversion sets up a scaler each time, which costs ten times as much as using it.
        self._reformatter = VideoReformatter()
        self._frames: Iterator[av.VideoFrame] | None = None
        self._last: av.VideoFrame | None = None  # the frame decoded last
        self._keyframe_gap = 1  # frames between keyframes, the longest seen so far
        self._since_keyframe = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its frames."""
        return self._stream.codec_context.height, self._stream.codec_context.width

    @property
    def memory(self) -> int:
        """Bytes that it takes while it is open, about: the container's index, and four frames."""
        height, width = self.size
        return 2**20 + 6 * height * width

    def useful_decoders(self, seconds: np.ndarray, available: int) -> int:
        """Return how many decoders should share frames at these ascending times.

        Each of them begins at a keyframe, so that frames which follow one another closely are best left to one.
        """
        seeks = 1 + int((np.diff(seconds) > self._reach).sum())
        return max(1, min(available, max(seeks, len(seconds) // (self._keyframe_gap + 1))))

    @property
    def _reach(self) -> float:
        # Decoding on to a frame that lies within one keyframe interval costs no more than seeking to it.
        return (self._keyframe_gap + 1) / self._rate

    def pixels(self, seconds: float, tolerance_s: float) -> np.ndarray:
        """Return the frame nearest to `seconds` as (h, w, 3)."""
        frame = self.frame(seconds, tolerance_s)
        if frame.is_corrupt:
            raise self._unreadable(f"the frame at {frame.time:.6f} s is damaged")
        return self._reformatter.reformat(frame, format="rgb24", **_ONE_THREAD).to_ndarray()

    def frame(self, seconds: float, tolerance_s: float) -> av.VideoFrame:
        """Return the frame nearest to `seconds`; raise `FrameNotFoundError` beyond `tolerance_s`."""
        try:
            found = self._nearest(seconds)
        except av.FFmpegError as error:
            self._frames = self._last = None
            raise self._unreadable(error) from error
        if found is None or abs(found.time - seconds) > tolerance_s:
            closest = "it holds no frames" if found is None else f"the nearest frame is at {found.time:.6f} s"
            raise FrameNotFoundError(
                f"{self.path} has no frame within {tolerance_s:g} s of {seconds:.6f} s: {closest}. The "
                f"file is cut short or belongs to another dataset; download or record it again, or pass "
                f"{LARGER_TOLERANCE} if its timestamps are only approximate."
            )
        return found

    def close(self) -> None:
        self._frames = self._last = None
        self._container.close()

    def _nearest(self, seconds: float) -> av.VideoFrame | None:
        half = 0.5 / self._rate
        ahead = seconds - self._last.time if self._last is not None else -1.0
        if self._frames is None or not -half <= ahead <= self._reach:
            self._seek(seconds, half)
        before = self._last
        while before is not None and self._last.time < seconds - half:
            before = self._last
            if not self._advance():
                break
        if before is None or abs(self._last.time - seconds) <= abs(before.time - seconds):
            return self._last
        return before

    def _seek(self, seconds: float, half: float) -> None:
        """Move to the keyframe before `seconds` and decode it."""
        back = 0.0
        while True:
            target = max(seconds - back, 0.0)
            offset = round(target / float(self._stream.time_base))
            self._container.seek(offset, stream=self._stream, backward=True, any_frame=False)
            self._frames, self._last = self._container.decode(self._stream), None
            self._since_keyframe = 0
            # With reordered frames a container may land one keyframe too late; then go back further.
            if not self._advance() or self._last.time <= seconds + half or target == 0.0:
                return
            back = 2 * back + 1.0

    def _advance(self) -> bool:
        """Decode the next frame; return False at the end of the file."""
        frame = next((frame for frame in self._frames if frame.pts is not None), None)
        if frame is None:
            self._frames = None  # a drained decoder needs a seek before it decodes again
            return False
        self._since_keyframe = 0 if frame.key_frame else self._since_keyframe + 1
        self._keyframe_gap = max(self._keyframe_gap, self._since_keyframe)
        self._last = frame
        return True

    def _unreadable(self, error: object) -> VideoError:
        return VideoError(
            f"{self.path} cannot be decoded: {error}. The file may be cut short; download or record it again."
        )
