"""Errors of a full disk, with the name of the disk."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DiskFullError

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def naming_a_full_disk(folder: str | Path) -> Iterator[None]:
    """Turn an error that a full disk caused into a `DiskFullError` naming the disk of `folder`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not _caused_by_full_disk(error):
            raise
        raise DiskFullError(full_disk_message(Path(folder))) from error


def mount_point(path: str | Path) -> Path:
    """Return where the disk that holds `path` is mounted; `path` need not exist."""
    path = Path(path).resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path


def full_disk_message(folder: Path) -> str:
    """Return a message with the full disk and the folder that was not written."""
    disk = mount_point(folder)
    try:
        usage = shutil.disk_usage(disk)
        space = f" with {usage.free / 2**20:.1f} MB of {usage.total / 2**20:.0f} MB free"
    except OSError:
        space = ""
    return (
        f"The disk mounted at {disk} is full{space}: {folder} could not be written, and what was written of it is "
        f"removed. Free space there, or choose a folder on another disk."
    )


def _caused_by_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
