"""FileCache: copies of files in a folder of bounded size, which all processes of a computer may share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..._disk import naming_disk_errors
from ...errors import InvalidConfigError

_GB = 10**9
_TEMPORARY = "manipulators-stream-"  # how the names of temporary folders begin
_OWNER, _LOCKS, _PART = ".owner", ".locks", ".part"


class FileCache:
    """Keep files that are made when first needed, and remove those not used for longest.

    A temporary folder is removed when the program ends; one that a killed program left is removed by the next.
    While a file is made, the folder may exceed its size by that file, one per process.

    Args:
        folder (`Path`, *optional*): where the files are, also after the program; by default a temporary folder.
        limit_gb (`float`): size of all files together [GB].

    Raises:
        InvalidConfigError: no size, or a file that is larger than all may be together.
        DiskError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, limit_gb: float):
        if not limit_gb > 0:
            raise InvalidConfigError(f"cache_gb={limit_gb} must be greater than 0 [GB].")
        self._limit = int(limit_gb * _GB)
        if folder is not None:
            self.folder = folder.expanduser().resolve()
            return
        _remove_abandoned()
        self.folder, owner = _temporary_folder()
        self.remove = weakref.finalize(self, _remove, self.folder, owner, os.getpid())

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the file called `name`, a relative path; `make` writes it to the path that it is given."""
        path = self.folder / name
        if _touch(path):
            return path
        remedy = "another folder: cache_folder= (train: --data.cache_folder)"
        with naming_disk_errors(self.folder, remedy=remedy), self._locked(name):
            if not _touch(path):  # by another process meanwhile
                part = path.with_name(f".{path.name}{_PART}")
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    make(part)
                    self._admit(name, part, path)
                finally:
                    part.unlink(missing_ok=True)
        return path

    def size(self) -> int:
        """Return the bytes of all files."""
        with self._locked(""):  # while no file takes another's place
            return sum(size for _, size, _ in self._files())

    def _admit(self, name: str, part: Path, path: Path) -> None:
        """Remove the files not used for longest until a new one fits, and give it its name."""
        size = part.stat().st_size
        if size > self._limit:
            raise InvalidConfigError(
                f"cache_gb={self._limit / _GB:g} is less than the one file {name} takes, {size / _GB:.3g} GB. Allow "
                f"several such files: cache_gb= (train: --data.cache_gb)."
            )
        with self._locked(""):  # until it has its name, so that others count it
            files = sorted(self._files())
            total = size + sum(size for _, size, _ in files)
            for _, freed, unused in files:
                if total <= self._limit:
                    break
                unused.unlink(missing_ok=True)
                total -= freed
            os.replace(part, path)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield last use, size and path of every finished file."""
        for folder, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if not name.startswith("."):
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        yield status.st_mtime_ns, status.st_size, path

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Let one thread of one process at a time make the file called `name`."""
        path = self.folder / _LOCKS / hashlib.sha256(name.encode()).hexdigest()[:16]
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "remove"}  # the owner's


def _touch(path: Path) -> bool:
    """Say that a file is used; return whether it is there."""
    try:
        os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _temporary_folder() -> tuple[Path, int]:
    """Return a new folder and the descriptor of its locked mark, which a killed program gives up."""
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    mark = folder / f"{_OWNER}{_PART}"
    descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    mark.rename(folder / _OWNER)  # under this name it is locked from the first
    return folder, descriptor


def _remove_abandoned() -> None:
    """Remove the temporary folders whose programs have ended."""
    for mark in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*/{_OWNER}"):
        with suppress(OSError):  # in use, another user's, or removed meanwhile
            descriptor = os.open(mark, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(mark.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


def _remove(folder: Path, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked worker
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
