"""FrameCache: frames that are decoded once and then read from a memory-mapped file.

Notation: n frames, h height, w width.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

from ..._disk import full_disk_message, naming_disk_errors
from ...errors import DiskFullError, VideoError
from ..table.fingerprint import fingerprint


class FrameCache:
    """The decoded frames of one camera, each kept when it is first read; shared by all processes.

    The disk space of every frame, 3·h·w bytes, is reserved at once: writing into a mapped file on a full disk
    would kill the process. Memory is the operating system's file cache, which it takes back when needed. A
    checksum tells whether a frame is complete; after a killed process or a lost write it is decoded again.

    Args:
        folder (`Path`): where the files are; another version of the same videos gets other files.
        camera (`str`): the feature's name.
        videos (`Iterable[Path]`): the files that the frames come from.
        num_frames (`int`): frames of the whole dataset.
        size (`tuple[int, int]`): (h, w).

    Raises:
        DiskFullError: there is no space for the frames.
        ReadOnlyError: the folder cannot be written.
    """

    def __init__(self, folder: Path, camera: str, videos: Iterable[Path], num_frames: int, size: tuple[int, int]):
        self._camera, self._shape = camera, (num_frames, 3, *size)
        # The name as it is in a web address: a camera's may hold what separates folders.
        stem = folder / f"{quote(camera, safe='')}-{fingerprint(sorted(set(videos)), repr(self._shape))}"
        self._paths = stem.with_name(stem.name + ".frames"), stem.with_name(stem.name + ".checksums")
        with naming_disk_errors(folder, remedy="another folder: decoded_cache= (train: --data.decoded_cache)"):
            folder.mkdir(parents=True, exist_ok=True)
            for path, size in zip(self._paths, (int(np.prod(self._shape)), 4 * num_frames), strict=True):
                _reserve(path, size)
        self._map()

    def frames(self, rows: np.ndarray, decode: Callable[[np.ndarray], Sequence[torch.Tensor]]) -> torch.Tensor:
        """Return the frames of `rows` as uint8 (n, 3, h, w).

        Args:
            rows (`np.ndarray`): (n,) rows of the dataset, each once.
            decode: positions in `rows` → their frames (3, h, w), called for those not kept yet.

        Raises:
            VideoError: a decoded frame has another size than the dataset states.
        """
        found = self._pixels[rows]  # (n, 3, h, w), a copy
        stored = self._checksums[rows]
        missing = [i for i, kept in enumerate(stored) if not kept or kept != _checksum(found[i])]
        if missing:
            for position, frame in zip(missing, decode(np.asarray(missing)), strict=True):
                if tuple(frame.shape) != self._shape[1:]:
                    raise VideoError(
                        f"{self._camera} has frames of {tuple(frame.shape[1:])}; meta/info.json says "
                        f"{self._shape[2:]}. Correct its shape there, or read without decoded_cache."
                    )
                found[position] = frame.numpy()
                self._pixels[rows[position]] = found[position]
                self._checksums[rows[position]] = _checksum(found[position])
        return torch.from_numpy(found)

    def _map(self) -> None:
        pixels, checksums = self._paths
        self._pixels = np.memmap(pixels, dtype=np.uint8, mode="r+", shape=self._shape)
        self._checksums = np.memmap(checksums, dtype=np.uint32, mode="r+", shape=self._shape[:1])

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pixels", "_checksums")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()


def _checksum(frame: np.ndarray) -> int:
    return zlib.crc32(frame) or 1  # 0 marks a frame that is not stored yet


def _reserve(path: Path, size: int) -> None:
    """Create a file of `size` zeros, unless it exists."""
    if path.is_file() and path.stat().st_size == size:
        return
    try:
        with path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(path.parent).free < size:
                raise DiskFullError(full_disk_message(path))
            file.truncate(size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
