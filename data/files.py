"""The growing files of a recording: parquet and video files shared by many episodes, split at a size."""

from __future__ import annotations

from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq

from .metadata import DATA_PATH, VIDEO_PATH

CHUNK_SIZE = 1000  # files per folder


class _Numbering:
    """Chunk and file numbers of a growing series of files."""

    def __init__(self):
        self._count = -1

    def next(self) -> None:
        self._count += 1

    @property
    def place(self) -> dict[str, int]:
        return {"chunk_index": self._count // CHUNK_SIZE, "file_index": self._count % CHUNK_SIZE}


class DataFiles:
    """Parquet files with one row group per episode."""

    def __init__(self, folder: Path, size_in_mb: float):
        self._folder, self._limit = folder, size_in_mb * 2**20
        self._numbering, self._writer, self._sink = _Numbering(), None, None
        self.paths: list[Path] = []
        self._rows = 0

    def append(self, table: pa.Table) -> dict[str, int]:
        # The rows already in the file tell how much the new ones will add to it.
        if self._writer is not None and self._sink.tell() * (1 + len(table) / self._rows) >= self._limit:
            self.close()
        if self._writer is None:
            self._numbering.next()
            path = self._folder / DATA_PATH.format(**self._numbering.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.paths.append(path)
            self._sink, self._rows = pa.OSFile(str(path), "wb"), 0
            self._writer = pq.ParquetWriter(self._sink, table.schema)
        self._writer.write_table(table, row_group_size=len(table))
        self._rows += len(table)
        return {f"data/{key}": value for key, value in self._numbering.place.items()}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = self._sink = None


class VideoFiles:
    """The video files of one camera, each shared by many episodes."""

    def __init__(self, folder: Path, camera: str, fps: int, size_in_mb: float):
        self._folder, self._camera, self._fps, self._limit = folder, camera, fps, size_in_mb * 2**20
        self._numbering, self._file = _Numbering(), None

    def append(self, episode: Path, length: int) -> dict:
        if self._file is not None and self._file.size + episode.stat().st_size >= self._limit:
            self.close()
        if self._file is None:
            self._numbering.next()
            path = self._folder / VIDEO_PATH.format(video_key=self._camera, **self._numbering.place)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _JoinedVideo(path, self._fps)
        first = self._file.num_frames
        self._file.append(episode, length)
        episode.unlink()
        place = self._numbering.place | {
            "from_timestamp": first / self._fps,
            "to_timestamp": (first + length) / self._fps,
        }
        return {f"videos/{self._camera}/{key}": value for key, value in place.items()}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _JoinedVideo:
    """Join encoded episodes, all made with the same settings, into one file without encoding them again."""

    def __init__(self, path: str | Path, fps: int):
        self.fps, self.num_frames, self.size = fps, 0, 0  # size: bytes of the frames so far
        self._container = av.open(str(path), "w")
        self._stream = None

    def append(self, episode: str | Path, num_frames: int) -> None:
        """Append the video `episode`, whose `num_frames` frames start where this file ends."""
        with av.open(str(episode)) as source:
            stream = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(stream, opaque=True)
                self._stream.time_base = stream.time_base
            offset = round(self.num_frames / self.fps / float(stream.time_base))
            for packet in source.demux(stream):
                if packet.dts is None:  # the empty packet that ends a stream
                    continue
                packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                packet.stream = self._stream
                self.size += packet.size
                self._container.mux(packet)
        self.num_frames += num_frames

    def close(self) -> None:
        """Write the index and close the file."""
        self._container.close()
