"""The processes that a launcher such as torchrun starts for one run: who works, who waits, and how all of them end."""

from __future__ import annotations

import functools
import logging
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import LaunchError

if TYPE_CHECKING:
    from torch.distributed import Store

INTERRUPTED = 130  # exit status, as shells have it
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # by which a launcher, or a terminal, ends its processes
# Names of a process's number and of their count: of torchrun, accelerate and DeepSpeed, then of MPI.
_NAMES = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
# Every other process keeps to itself what all of them would say.
_QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_OVER = "over"  # in the store: how many processes have ended the run
_PATIENCE = {True: 3.0, False: 6.0}  # of the main process and of others, once a signal has come [s]


def launched() -> Processes:
    """Return the processes of this run, as the launcher's environment counts them; one without a launcher."""
    for rank, count in _NAMES:
        if rank in os.environ and count in os.environ:
            return _of(int(os.environ[rank]), int(os.environ[count]))
    return _of(0, 1)


@functools.cache
def _of(rank: int, count: int) -> Processes:
    return Processes(rank, count)


class Processes:
    """The processes of one run.

    They meet in the launcher's key-value store. Waiting there has no time-out, because a recording or an evaluation
    may take hours, and it needs no process group.

    Args:
        rank: number of this process, from 0.
        count: how many there are.
    """

    def __init__(self, rank: int, count: int):
        self.rank, self.count = rank, count
        self.is_main = rank == 0
        self._meetings = 0
        self._store: Store | None = None

    def quieten(self) -> None:
        """Leave warnings and progress bars to the main process; to be called before other libraries are imported."""
        if self.count > 1:
            # torch looks for unused parameters in every step, and says in every process when there are none.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if not self.is_main:
            warnings.simplefilter("ignore")
            logging.getLogger(__package__).setLevel(logging.ERROR)
            for name, value in _QUIET.items():
                os.environ.setdefault(name, value)

    def connect(self) -> None:
        """Connect to the launcher's store, once.

        Raises:
            LaunchError: there is none.
        """
        if self.count == 1 or self._store is not None:
            return
        from torch.distributed import PrefixStore, rendezvous

        try:
            store = next(iter(rendezvous("env://", self.rank, self.count)))[0]
        except (ValueError, RuntimeError) as error:
            raise LaunchError(
                f"The environment says that this is process {self.rank} of {self.count}, but they do not find each "
                f"other: {error}\nStart all by a launcher, such as torchrun --nproc-per-node {self.count} -m "
                f"manipulators …, or unset RANK and WORLD_SIZE."
            ) from error
        self._store = PrefixStore("manipulators", store)

    # --- waiting --------------------------------------------------------------------------------------

    def wait_for_main(self) -> None:
        """Wait until the main process has come as far as this call, however long that takes."""
        self._meetings += 1
        if self.count == 1:
            return
        self.connect()
        name, pause = f"main-{self._meetings}", 0.02
        if self.is_main:
            self._store.set(name, "here")
            return
        while not self._store.check([name]):
            if self._store.check([_OVER]):
                raise SystemExit(1)  # the process that ended the run has said why
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def wait_for_all(self) -> None:
        """Wait for the main process, which may hold the store and goes on once the others know that it is here."""
        self.wait_for_main()
        if self.count > 1:
            name = f"all-{self._meetings}"
            self._store.add(name, 1)
            while self.is_main and self._store.add(name, 0) < self.count and not self._store.check([_OVER]):
                time.sleep(0.02)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in the others."""
        if not self.is_main:
            self.wait_for_main()
        yield
        if self.is_main:
            self.wait_for_main()

    def part(self) -> None:
        """Give up the process group, if there is one: nothing is left to do together."""
        if self.count > 1:
            from torch import distributed

            if distributed.is_initialized():
                distributed.destroy_process_group()

    # --- ending ---------------------------------------------------------------------------------------

    def ends_first(self, patience: float = 0.0) -> bool:
        """Return whether this process is the first to end the run, so that it is the one to say why.

        Args:
            patience: how long another may still come first [s].
        """
        if self.count == 1:
            return True
        if self._store is None:
            return self.is_main
        try:
            until = time.monotonic() + patience
            while time.monotonic() < until and not self._store.check([_OVER]):
                time.sleep(0.05)
            return self._store.add(_OVER, 1) == 1
        except RuntimeError:  # the store ended with its host
            return self.is_main

    @contextmanager
    def ending_together(self, say: Callable[[], None]) -> Iterator[None]:
        """End this process inside the block when a signal comes, or when another one has ended the run.

        Python handles a signal only between two of its own instructions, which a process that waits for another one
        does not reach. So a thread watches, and ends the process when it has not ended by itself.

        Args:
            say: says what an interrupted run keeps; called in one process.
        """
        if self.count == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # Only the main process has something to put in order; see `_interrupts.clean_interrupts`.
        numbers = () if self.is_main else SIGNALS
        handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(reading, say, over), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            signal.set_wakeup_fd(-1)
            os.write(writing, b"\0")  # wakes the watcher
            watcher.join()
            os.close(writing)
            os.close(reading)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _watch(self, reading: int, say: Callable[[], None], over: threading.Event) -> None:
        """Wait for a signal, or for the end of the run in another process."""
        while not over.is_set():
            came = select.select([reading], [], [], 1.0)[0] and os.read(reading, 64)
            if came and not set(came).isdisjoint(SIGNALS):
                if self.is_main:
                    over.wait(_PATIENCE[True])  # the main thread speaks, unless it waits for another process
                if not over.is_set():
                    self.leave(INTERRUPTED, say, _PATIENCE[False] * (not self.is_main))
            elif not over.is_set() and self._is_over():
                over.wait(_PATIENCE[True])
                if not over.is_set():
                    self.leave(1)

    def _is_over(self) -> bool:
        try:
            return self._store is not None and self._store.check([_OVER])
        except RuntimeError:
            return False  # its host has ended, and the launcher ends the others

    def leave(self, status: int, say: Callable[[], None] | None = None, patience: float = 0.0) -> None:
        """End this process at once, without the collectives that an orderly end would wait for."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # the launcher's, which ends the others too
                signal.signal(number, signal.SIG_IGN)
        if say is not None and self.ends_first(patience):
            say()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _forget_signals() -> None:
    """Let a forked process, such as a worker of a DataLoader, end by its own signals without a word to its parent."""
    if launched().count > 1 and signal.set_wakeup_fd(-1) != -1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_signals)


def is_lost_contact(error: BaseException) -> bool:
    """Return whether an error says that another process has ended; gloo and NCCL say it in many words."""
    from torch.distributed import DistError

    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )
