"""Errors of a disk that is full or cannot be written, with its name."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CacheError, DiskFullError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


@contextmanager
def naming_a_full_disk(folder: str | Path, remedy: str = "a folder on another disk") -> Iterator[None]:
    """Turn an error that a full disk caused into a `DiskFullError` naming the disk of `folder`.

    Args:
        folder: what is written.
        remedy: what else may be chosen.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _caused_by_full_disk(error):
            raise
        raise DiskFullError(full_disk_message(Path(folder), remedy)) from error


@contextmanager
def naming_cache_errors(folder: Path, setting: str) -> Iterator[None]:
    """Turn errors of writing into a cache folder into one that says how to choose another folder.

    Args:
        folder: of the cache.
        setting: what names it, such as `decoded_cache=`.

    Raises:
        DiskFullError: its disk is full.
        CacheError: it cannot be written, or is no folder.
    """
    with naming_a_full_disk(folder, f"another folder: {setting}"):
        try:
            yield
        except Exception as error:
            for cause in _causes(error):
                if getattr(cause, "errno", None) in _NOT_WRITABLE and _is_in(getattr(cause, "filename", None), folder):
                    raise CacheError(
                        f"The cache folder {folder} cannot be written: {cause.strerror} ({cause.filename}). Choose "
                        f"another folder: {setting}"
                    ) from error
            raise


def mount_point(path: str | Path) -> Path:
    """Return where the disk that holds `path` is mounted; `path` need not exist."""
    path = Path(path).resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def full_disk_message(folder: Path, remedy: str = "a folder on another disk") -> str:
    """Return a message with the full disk and the folder that was not written."""
    disk = mount_point(folder)
    try:
        usage = shutil.disk_usage(disk)
        space = f" with {usage.free / 2**20:.1f} MB of {usage.total / 2**20:.0f} MB free"
    except OSError:
        space = ""
    return (
        f"The disk mounted at {disk} is full{space}: {folder} could not be written, and what was written of it is "
        f"removed. Free space there, or choose {remedy}."
    )


def _caused_by_full_disk(error: BaseException) -> bool:
    return any(
        getattr(cause, "errno", None) in _FULL or "Not enough disk space" in str(cause)  # so 🤗 datasets says it
        for cause in _causes(error)
        if isinstance(cause, OSError)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_in(filename: object, folder: Path) -> bool:
    """Tell whether a file is a folder, in it, or above it."""
    if not isinstance(filename, str | bytes | Path):
        return False
    path, folder = Path(os.fsdecode(filename)).absolute(), folder.absolute()
    return path.is_relative_to(folder) or folder.is_relative_to(path)
