"""Tell files apart by what they hold, never by when they were touched: a copied file keeps its time."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_WHOLE = 64 * 2**20  # files that are smaller together are read whole
_PART = 2**14  # of others the beginning, the end and parts between, each of so many bytes
_TICK = 2 * 10**9  # far more than a tick of a file system's clock [ns]
_IS_DATED = os.name == "posix"
_FEWEST, _MOST = 2, 64  # of such parts per file


def fingerprint(paths: Iterable[Path], salt: str = "") -> str:
    """Return a name for the content of files, in their order.

    Where the whole is too much to read, size and parts stand for it. A parquet file's footer is read in any case: it
    lists the number of rows, and place, size and range of every column in every row group.
    """
    paths = list(paths)
    sizes = [path.stat().st_size for path in paths]
    whole = sum(sizes) <= _WHOLE
    parts = min(max(_WHOLE // (_PART * max(len(paths), 1)), _FEWEST), _MOST)
    digest = hashlib.blake2b(salt.encode(), digest_size=12)
    for path, size in zip(paths, sizes, strict=True):
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            if whole or size <= parts * _PART:
                digest.update(file.read())
                continue
            for part in range(parts):
                file.seek((size - _PART) * part // (parts - 1))
                digest.update(file.read(_PART))
            file.seek(size - _footer_size(file, size))
            digest.update(file.read())
    return digest.hexdigest()


def remembered_fingerprint(paths: Sequence[Path], stats: Sequence[os.stat_result], salt: str, memory: Path) -> str:
    """Return the `fingerprint` of files, read again only if one of them has changed since the last time.

    The operating system dates every change of a file's content, place or times, and nobody can set that date.

    Args:
        stats: what the operating system says of each file.
        memory (`Path`): the folder in which fingerprints are kept; one that cannot be written keeps none.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=12)
    for path, stat in zip(paths, stats, strict=True):
        seen = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
        digest.update(f"{path}\0{seen}\n".encode(errors="surrogateescape"))
    place = memory / digest.hexdigest()
    try:
        if _IS_DATED and re.fullmatch("[0-9a-f]{24}", known := place.read_text()):
            return known
    except (OSError, ValueError):
        pass
    found = fingerprint(paths, salt)
    # A file that changes twice within one tick of the clock has one date.
    if _IS_DATED and time.time_ns() - max(stat.st_ctime_ns for stat in stats) > _TICK:
        with suppress(OSError):
            memory.mkdir(parents=True, exist_ok=True)
            place.write_text(found)
    return found


def _footer_size(file: BinaryIO, size: int) -> int:
    """Return how many bytes at the end of a parquet file are its footer; 0 of another file."""
    file.seek(size - 8)
    end = file.read(8)
    return min(8 + int.from_bytes(end[:4], "little"), size) if end[4:] == b"PAR1" else 0
