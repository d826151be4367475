"""Video files that many episodes share: their videos joined without being encoded again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av

from ...errors import VideoError
from ..layouts.v3 import VIDEO_PATH, FileNumbering


@dataclass(frozen=True)
class AppendedPart:
    """Where a part of a video has been copied to."""

    place: dict[str, int]  # `chunk_index` and `file_index`
    start: float  # time of its first frame there [s]
    in_front: int  # frames of others that had to be copied with it


class VideoFiles:
    """The video files of one camera, each shared by many episodes."""

    def __init__(self, folder: Path, camera: str, fps: float, size_in_mb: float):
        self._folder, self._camera, self._fps, self._limit = folder, camera, fps, size_in_mb * 2**20
        self._numbering, self._file = FileNumbering(), None

    @staticmethod
    def path(camera: str, chunk_index: int, file_index: int) -> str:
        """Return where such a file is, relative to the dataset's root."""
        return VIDEO_PATH.format(video_key=camera, chunk_index=chunk_index, file_index=file_index)

    def append(self, video: Path, num_frames: int) -> tuple[dict[str, int], float]:
        """Append a copy of `video`, which holds at least `num_frames`; return its place and its first time [s].

        A video encoded with other settings than the file begins a new file: nothing is encoded again.

        Raises:
            VideoError: `video` cannot be read, or is shorter.
        """
        if self._file is not None and self._file.size + video.stat().st_size >= self._limit:
            self.close()
        with self._copying(video) as (source, stream):
            first = self._file.num_frames
            found = self._file.append(source, stream, num_frames)
        if found < num_frames:
            raise _too_short(video, found, num_frames)
        return self._numbering.place, first / self._fps

    def append_part(self, video: Path, start: float, num_frames: int) -> AppendedPart:
        """Append a copy of the `num_frames` frames of `video` that begin at `start` [s].

        Packets are copied from the keyframe before them, so that frames of others may stand in front of them.

        Raises:
            VideoError: `video` cannot be read, or has fewer frames there.
        """
        with self._copying(video) as (source, stream):
            seconds = float(stream.duration * stream.time_base) if stream.duration else math.inf
            size = video.stat().st_size * min(1.0, num_frames / self._fps / seconds)
            if self._file.num_frames and self._file.size + size >= self._limit:
                self.close()
                self._open_next()
            first, lead, in_front, found = self._file.append_part(source, stream, start, num_frames)
        if found < num_frames:
            raise _too_short(video, found, num_frames, f" from {start:.3f} s on")
        return AppendedPart(self._numbering.place, first / self._fps + lead, in_front)

    @contextmanager
    def _copying(self, video: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        """Open a video whose packets go into the present file, or into a new one where they do not fit."""
        try:
            with av.open(str(video)) as source:
                stream = source.streams.video[0]
                if self._file is not None and not self._file.fits(stream):
                    self.close()
                if self._file is None:
                    self._open_next()
                yield source, stream
        except (av.FFmpegError, IndexError) as error:
            raise VideoError(f"{video} cannot be copied: {error}. Download or record it again.") from error

    def _open_next(self) -> None:
        self._numbering.next()
        path = self._folder / self.path(self._camera, **self._numbering.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _JoinedVideo(path, self._fps)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def video_columns(camera: str, place: dict[str, int], start: float, seconds: float) -> dict:
    """Return the columns that say where an episode's frames of `camera` are, as `meta/episodes` names them."""
    columns = place | {"from_timestamp": start, "to_timestamp": start + seconds}
    return {f"videos/{camera}/{key}": value for key, value in columns.items()}


class _JoinedVideo:
    """Join videos made with the same settings into one file without encoding them again."""

    def __init__(self, path: str | Path, fps: float):
        self.fps, self.num_frames, self.size = fps, 0, 0  # size: bytes of the frames so far
        self._container = av.open(str(path), "w")
        self._stream = self._settings = self._last_dts = None

    def fits(self, stream: av.VideoStream) -> bool:
        """Whether the packets of `stream` can be decoded with what the file's header says."""
        return self._settings in (None, _settings(stream))

    def append(self, source: av.container.InputContainer, stream: av.VideoStream, num_frames: int) -> int:
        """Append a video that starts where this file ends; return how many frames it holds."""
        self._begin(stream)
        rate = self.fps * float(stream.time_base)  # frames per tick
        offset = round(self.num_frames / rate)
        found, last = 0, 0
        for packet in source.demux(stream):
            if packet.dts is None:  # the empty packet that ends a stream
                continue
            found, last = found + 1, max(last, packet.pts)
            self._copy(packet, offset)
        # A video may go on beyond its episode; the next one must not begin before its end.
        self.num_frames += max(num_frames, found, round(last * rate) + 1)
        return found

    def append_part(
        self, source: av.container.InputContainer, stream: av.VideoStream, start: float, num_frames: int
    ) -> tuple[int, float, int, int]:
        """Append the frames that begin at `start` [s], and those from the keyframe before them.

        Returns:
            the place of the first one copied, counted in frames; how long after it `start` is [s]; how many frames
            stand in front of `start`; how many of the `num_frames` there are.
        """
        self._begin(stream)
        tick = float(stream.time_base)
        low, high = start - 0.5 / self.fps, start + (num_frames - 0.5) / self.fps
        keyframe, position, offset, last, in_front, found, waiting = None, self.num_frames, 0, 0, 0, 0, []
        for packet in _packets_from(source, stream, start, 0.5 / self.fps):
            if packet.dts * tick >= high:  # as is everything behind it: no frame is shown before it is decoded
                break
            if keyframe is None:
                keyframe = last = packet.pts
                offset = round(position / (self.fps * tick)) - keyframe
                if self._last_dts is not None and packet.dts + offset <= self._last_dts:
                    position += math.ceil((self._last_dts + 1 - packet.dts - offset) * tick * self.fps)
                    offset = round(position / (self.fps * tick)) - keyframe
            if packet.pts < keyframe:  # needs what stands before the keyframe
                continue
            # What lies behind the end is needed only where frames before it refer to it.
            waiting.append(packet)
            if packet.pts * tick < high:
                found, in_front = found + (packet.pts * tick >= low), in_front + (packet.pts * tick < low)
                for needed in waiting:
                    last = max(last, needed.pts)
                    self._copy(needed, offset)
                waiting = []
        if keyframe is not None:
            self.num_frames = position + round((last - keyframe) * tick * self.fps) + 1
        return position, 0.0 if keyframe is None else start - keyframe * tick, in_front, found

    def _begin(self, stream: av.VideoStream) -> None:
        if self._stream is None:
            self._stream = self._container.add_stream_from_template(stream, opaque=True)
            self._stream.time_base = stream.time_base
            self._settings = _settings(stream)

    def _copy(self, packet: av.Packet, offset: int) -> None:
        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
        packet.stream = self._stream
        self._last_dts = packet.dts
        self.size += packet.size
        self._container.mux(packet)

    def close(self) -> None:
        """Write the index and close the file."""
        self._container.close()


def _packets_from(
    source: av.container.InputContainer, stream: av.VideoStream, start: float, half: float
) -> Iterator[av.Packet]:
    """Yield the packets from the keyframe on that is needed to decode the frame at `start` [s]."""
    back = 0.0
    while True:
        target = max(start - back, 0.0)
        source.seek(round(target / stream.time_base), stream=stream, backward=True, any_frame=False)
        packets = (packet for packet in source.demux(stream) if packet.dts is not None)  # not the one that ends it
        first = next(packets, None)
        # With reordered frames a container may land one keyframe too late; then go back further.
        if target == 0.0 or (first is not None and first.pts * stream.time_base <= start + half):
            break
        back = 2 * back + 1.0
    if first is not None:
        yield first
        yield from packets


def _too_short(video: Path, found: int, needed: int, where: str = "") -> VideoError:
    return VideoError(
        f"{video} holds {found} frames{where}; its episodes need {needed}. It is cut short, or belongs to another "
        f"dataset; download or record it again."
    )


def _settings(stream: av.VideoStream) -> tuple:
    context = stream.codec_context
    return (
        context.name,
        context.width,
        context.height,
        context.pix_fmt,
        context.extradata,
        stream.time_base,
    )
