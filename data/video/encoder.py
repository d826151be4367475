"""VideoEncoder: write frames to a video file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from ...errors import VideoError, nearest

# Codec → the encoder and its options. Without reordering (bf=0) a decoder needs only the frames from the last keyframe
# to the requested one.
ENCODERS = {
    "h264": ("libx264", {"crf": "23", "bf": "0"}),
    "av1": ("libsvtav1", {"crf": "30", "preset": "12"}),
}
PIXEL_FORMAT = "yuv420p"  # what every player, and LeRobot itself, can read
KEYFRAME_INTERVAL = 2  # frames: training reads in random order, so at most one other frame is decoded first


class VideoEncoder:
    """Write frames to one video file.

    Args:
        path (`str` or `Path`): the file to write, `.mp4`.
        fps (`int`): frames per second.
        codec (`str`, *optional*, defaults to `"h264"`): `"h264"` or `"av1"`.
        keyframe_interval (`int`, *optional*, defaults to 2): frames from one keyframe to the next.
        crf (`int`, *optional*): quality, lower is better; defaults to 23 for H.264 and 30 for AV1.
    """

    def __init__(
        self,
        path: str | Path,
        fps: int,
        codec: str = "h264",
        keyframe_interval: int = KEYFRAME_INTERVAL,
        crf: int | None = None,
    ):
        if codec not in ENCODERS:
            raise VideoError(f"There is no codec {codec!r}. {nearest(codec, ENCODERS)}")
        name, options = ENCODERS[codec]
        # SVT-AV1 reports its settings on stderr for every file; 1 lets only its errors through.
        os.environ.setdefault("SVT_LOG", "1")
        self.path, self.num_frames, self._closed = Path(path), 0, False
        self._codec = codec
        self._options = {**options, "g": str(keyframe_interval)} | ({} if crf is None else {"crf": str(crf)})
        self._size: tuple[int, int] | None = None
        try:
            self._container = av.open(str(path), "w")
            self._stream = self._container.add_stream(name, rate=fps, options=self._options)
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{path} cannot be written as {codec}: {error}.") from error

    def add(self, frame: np.ndarray) -> None:
        """Append one uint8 frame (h, w, 3); all frames have one size, and even sides for H.264."""
        height, width, _ = frame.shape
        if self._size is None:
            check_size(str(self.path), frame.shape, self._codec)
            self._size = (height, width)
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = PIXEL_FORMAT
        if (height, width) != self._size:
            raise VideoError(f"{self.path} holds frames of {self._size}; got one of {(height, width)}.")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts = self.num_frames
        self._mux(picture)
        self.num_frames += 1

    def close(self) -> None:
        """Write the frames that the encoder still buffers, and close the file; closing twice is harmless."""
        try:
            if self.num_frames and not self._closed:
                self._mux(None)
        finally:
            self._closed = True
            self._container.close()

    def discard(self) -> None:
        """Close and delete the file."""
        self._closed = True
        try:
            with suppress(OSError):
                os.truncate(self.path, 0)  # on a full disk closing fails, and an open file keeps its space
            self._container.close()
        finally:
            self.path.unlink(missing_ok=True)

    def _mux(self, picture: av.VideoFrame | None) -> None:
        try:
            for packet in self._stream.encode(picture):
                self._container.mux(packet)
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{self.path} cannot be encoded: {error}.") from error

    def __enter__(self) -> VideoEncoder:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_size(name: str, shape: Sequence[int], codec: str) -> None:
    """Raise `VideoError` if frames of `shape` (h, w, 3) cannot be encoded."""
    height, width, _ = shape
    if codec == "h264" and (height % 2 or width % 2):
        raise VideoError(
            f"H.264 needs even sides; {name} has frames of {height}×{width}. Crop them, or pass "
            f'codec="av1" or use_videos=False.'
        )
