"""Errors of a disk that does not take what is written, with the name of the disk."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DiskError, DiskFullError, ReadOnlyError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
_ELSEWHERE = "a folder on another disk"


@contextmanager
def naming_disk_errors(path: str | os.PathLike, kept: str = "", remedy: str = _ELSEWHERE) -> Iterator[None]:
    """Turn an error of the disk into one that names the disk and `path`, which is written in the block.

    Args:
        path: the file or folder that is written.
        kept: a sentence on what is not lost, for the message.
        remedy: what else may be chosen, for the message.

    Raises:
        DiskFullError: the disk is full.
        ReadOnlyError: it is read-only, or this user may not write there.
        DiskError: a limit on the size of files is reached, or the disk fails.
    """
    try:
        yield
    except Exception as error:
        cause = None if isinstance(error, DiskError) else _cause_on_disk(error)
        if cause is None:
            raise
        number, place = cause
        if place is not None and not _belongs_to(place, path):
            if number not in _FULL:
                raise  # such as a source that may not be read
            path = place  # such as a cache on another disk
        raise _named(number, Path(path), kept, remedy) from error


def mount_point(path: str | os.PathLike) -> Path:
    """Return where the disk that holds `path` is mounted; `path` need not exist."""
    path = Path(path).resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def full_disk_message(path: Path, kept: str = "", remedy: str = _ELSEWHERE) -> str:
    """Return a message with the full disk and the file or folder that was not written."""
    disk = mount_point(path)
    try:
        usage = shutil.disk_usage(disk)
        space = f" with {usage.free / 2**20:.1f} MB of {usage.total / 2**20:.0f} MB free"
    except OSError:
        space = ""
    return (
        f"The disk mounted at {disk} is full{space}: {path} could not be written. "
        f"{_kept(kept)}Free space there, or choose {remedy}."
    )


def _named(number: int, path: Path, kept: str, remedy: str) -> DiskError:
    if number in _FULL:
        return DiskFullError(full_disk_message(path, kept, remedy))
    disk = mount_point(path)
    if number == errno.EROFS:
        return ReadOnlyError(
            f"The disk mounted at {disk} is read-only: {path} cannot be written. {_kept(kept)}Choose {remedy}."
        )
    if number in _REFUSED:
        return ReadOnlyError(
            f"{path} may not be written: {os.strerror(number)}. {_kept(kept)}"
            f"Choose {remedy}, or change its permissions: ls -ld {path.parent}"
        )
    if number == errno.EFBIG:
        return DiskError(
            f"{path} could not be written: a file of it would be larger than a limit here allows. {_kept(kept)}"
            f"Raise the limit (ulimit -f unlimited), or choose {remedy}."
        )
    return DiskError(
        f"The disk mounted at {disk} failed ({os.strerror(number)}): {path} could not be written. {_kept(kept)}"
        f"Choose {remedy}."
    )


def _kept(kept: str) -> str:
    return f"{kept} " if kept else ""


def _cause_on_disk(error: BaseException | None) -> tuple[int, str | None] | None:
    """Return the number of the system's error behind `error`, and the file it names; None for other errors."""
    seen: set[int] = set()  # a chain may lead back to where it began: transformers raises errors that it has caught
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number, place = getattr(error, "errno", None), getattr(error, "filename", None)
        if number is None:  # libraries written in Rust report it as text
            told = re.search(r"\(os error (\d+)\)", str(error))
            number = int(told[1]) if told else None
        if number is None and isinstance(error, OSError) and "Not enough disk space" in str(error):
            number = errno.ENOSPC  # as 🤗 datasets says it before it writes
        if number in _FULL | _REFUSED | {errno.EFBIG, errno.EIO}:
            return number, place if isinstance(place, str | os.PathLike) else None
        error = error.__cause__ or error.__context__
    return None


def _belongs_to(place: str | os.PathLike, path: str | os.PathLike) -> bool:
    """Return whether `place` is `path`, lies in it, or beside it, where what becomes `path` is prepared."""
    place, path = Path(place).absolute(), Path(path).absolute()
    return place == path.parent or path.parent in place.parents or place in path.parents
