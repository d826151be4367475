"""The frames of the episode being recorded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from ..features import CAMERAS
from ..images import encode_png
from ..statistics.computing import ImageStatistics
from ..video.encoder import VideoEncoder


class Episode:
    """The frames since the last episode: numbers in memory, images encoded as they come."""

    def __init__(self, folder: Path, features: dict[str, dict], fps: int, codec: str):
        self._folder, self._fps, self._codec = folder, fps, codec
        self._kinds = {name: feature["dtype"] for name, feature in features.items()}
        self._encoders: dict[str, VideoEncoder] = {}
        self.columns: dict[str, list] = {}
        self.tasks: list[str] = []
        self.image_statistics: dict[str, ImageStatistics] = {}

    @property
    def length(self) -> int:
        return len(self.tasks)

    def add(self, frame: dict[str, np.ndarray], task: str) -> None:
        for name, value in frame.items():
            kind = self._kinds[name]
            if kind in CAMERAS:
                self.image_statistics.setdefault(name, ImageStatistics()).add(value)
            if kind == "video":
                self._encoder(name).add(value)
            else:
                column = self.columns.setdefault(name, [])
                column.append({"bytes": encode_png(value), "path": None} if kind == "image" else value)
        self.tasks.append(task)

    def finish(self) -> None:
        """Complete the episode's own videos, `<camera>.mp4` in its folder."""
        for encoder in self._encoders.values():
            encoder.close()

    def discard(self) -> None:
        for encoder in self._encoders.values():
            with suppress(Exception):  # on a full disk, where the file is removed all the same
                encoder.discard()
        self._encoders, self.tasks = {}, []

    def _encoder(self, camera: str) -> VideoEncoder:
        if camera not in self._encoders:
            self._folder.mkdir(exist_ok=True)
            self._encoders[camera] = VideoEncoder(self._folder / f"{camera}.mp4", self._fps, self._codec)
        return self._encoders[camera]
