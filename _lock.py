"""One run at a time in a folder: a lock that names its holder and leaves with it."""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ._disk import naming_disk_errors
from .errors import FolderInUseError

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: dict[Path, dict] = {}  # lock file → its holder: this process, or the one that it was forked from
_guard = threading.RLock()  # a forgotten lock may be released while another is taken


@contextmanager
def locked(path: str | os.PathLike, purpose: str) -> Iterator[None]:
    """Hold the lock of an output file or folder; see `OutputLock`."""
    lock = OutputLock(path, purpose)
    try:
        yield
    finally:
        lock.release()


def is_held(path: str | os.PathLike) -> bool:
    """Return whether this process holds the lock of an output."""
    return _held.get(_lock_file(path), {}).get("pid") == os.getpid()


class OutputLock:
    """Hold an output file or folder for one run, by a file `.<name>.lock` beside it.

    The operating system takes the lock back when the process ends, even when it is killed; a file that such a process
    left is taken over. A forked process, such as a worker of a DataLoader, neither holds the lock nor removes it. Of
    a run of several processes only one takes it.

    Args:
        path: what is written; it need not exist.
        purpose: what the run does, for whoever comes second, such as `"a training"`.

    Raises:
        FolderInUseError: another run holds it, or one on another computer left it.
        DiskError: the lock cannot be written.
    """

    def __init__(self, path: str | os.PathLike, purpose: str):
        self.file = _lock_file(path)
        holder = {
            "purpose": purpose,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(" ", "seconds"),
        }
        with _guard, naming_disk_errors(path):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if is_held(path):
                # Not opened again: closing a file gives up every lock that the process has on it.
                raise FolderInUseError(path, self.file, _held[self.file], in_this_process=True)
            descriptor = self._take(path)
            try:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            except OSError:
                _drop(self.file, descriptor)
                raise
            _held[self.file] = holder
        self.release = weakref.finalize(self, _release, self.file, descriptor, os.getpid())

    def _take(self, path: str | os.PathLike) -> int:
        """Return the descriptor of the locked file."""
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                # Not flock, whose locks forked processes would go on holding.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_free, are_locks_known = True, True
            except OSError as error:
                is_free, are_locks_known = False, error.errno not in _UNSUPPORTED
            if is_free and not _is_at(descriptor, self.file):
                os.close(descriptor)  # its holder removed it meanwhile
                continue
            holder = _read(descriptor, patient=not is_free)
            if holder and holder["host"] != socket.gethostname():
                is_free = False  # this computer may not see its lock
            elif not are_locks_known:
                is_free = not holder or not _is_running(holder["pid"])
            if is_free:
                return descriptor
            os.close(descriptor)
            raise FolderInUseError(path, self.file, holder, in_this_process=False)


def _lock_file(path: str | os.PathLike) -> Path:
    resolved = Path(path).resolve()
    return resolved.with_name(f".{resolved.name}.lock")


def _release(file: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:
        return
    with _guard:
        _held.pop(file, None)
        _drop(file, descriptor)


def _drop(file: Path, descriptor: int) -> None:
    """Remove a lock that is held; removed before it is free, it cannot be that of another run."""
    if _is_at(descriptor, file):
        file.unlink(missing_ok=True)
    os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except OSError:
        return False


def _read(descriptor: int, patient: bool) -> dict:
    """Return what a lock says of its holder, who writes it just after taking it; {} when it says nothing."""
    for _ in range(20 if patient else 1):
        try:
            content = json.loads(os.pread(descriptor, 4096, 0))
        except ValueError:
            time.sleep(0.01 if patient else 0)
        else:
            return content if isinstance(content, dict) and {"purpose", "pid", "host"} <= content.keys() else {}
    return {}


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
