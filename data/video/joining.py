"""Video files that many episodes share: their videos joined without being encoded again."""

from __future__ import annotations

from pathlib import Path

import av

from ...errors import VideoError
from ..layouts.v3 import VIDEO_PATH, FileNumbering


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
        try:
            with av.open(str(video)) as source:
                stream = source.streams.video[0]
                if self._file is not None and not self._file.fits(stream):
                    self.close()
                if self._file is None:
                    self._open_next()
                first = self._file.num_frames
                found = self._file.append(source, stream, num_frames)
        except (av.FFmpegError, IndexError) as error:
            raise VideoError(f"{video} cannot be copied: {error}. Download or record it again.") from error
        if found < num_frames:
            raise VideoError(
                f"{video} holds {found} frames; its episodes need {num_frames}. It is cut short, or belongs to "
                f"another dataset; download or record it again."
            )
        return self._numbering.place, first / self._fps

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
        self._stream = self._settings = None

    def fits(self, stream: av.VideoStream) -> bool:
        """Whether the packets of `stream` can be decoded with what the file's header says."""
        return self._settings in (None, _settings(stream))

    def append(self, source: av.container.InputContainer, stream: av.VideoStream, num_frames: int) -> int:
        """Append a video that starts where this file ends; return how many frames it holds."""
        if self._stream is None:
            self._stream = self._container.add_stream_from_template(stream, opaque=True)
            self._stream.time_base = stream.time_base
            self._settings = _settings(stream)
        rate = self.fps * float(stream.time_base)  # frames per tick
        offset = round(self.num_frames / rate)
        found, last = 0, 0
        for packet in source.demux(stream):
            if packet.dts is None:  # the empty packet that ends a stream
                continue
            found, last = found + 1, max(last, packet.pts)
            packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
            packet.stream = self._stream
            self.size += packet.size
            self._container.mux(packet)
        # A video may go on beyond its episode; the next one must not begin before its end.
        self.num_frames += max(num_frames, found, round(last * rate) + 1)
        return found

    def close(self) -> None:
        """Write the index and close the file."""
        self._container.close()


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
