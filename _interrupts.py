"""How a command ends: what an interrupted one keeps, and the command that goes on; in one process of several."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ._processes import INTERRUPTED, SIGNALS, Processes, is_lost_contact, launched
from .errors import LostProcessError, ManipulatorsError


@contextmanager
def clean_interrupts(options: argparse.Namespace) -> Iterator[None]:
    """End the process at once when an interrupt comes in the middle of an import.

    Raised there, KeyboardInterrupt becomes an ImportError of some library, or aborts one that is written in C++. The
    main process of several takes a launcher's SIGTERM for an interrupt too, and the first of several for all.
    """
    processes = launched()
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    process, numbers = os.getpid(), SIGNALS if processes.count > 1 else SIGNALS[:1]

    def handle(number: int, frame: FrameType | None) -> None:
        if processes.count > 1 and os.getpid() == process:
            for other in numbers:
                signal.signal(other, signal.SIG_IGN)
        while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        if frame is None or os.getpid() != process:  # or a worker, whose parent speaks
            raise KeyboardInterrupt
        processes.leave(INTERRUPTED, lambda: say_what_is_kept(options, ""))

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_what_is_kept(options: argparse.Namespace, note: str) -> None:
    """Print one line: what an interrupted command keeps, and the command that goes on."""
    kept, command = options.kept(options, note)
    count = launched().count
    again = f"\nLaunch it in {count} processes, as before." if count > 1 else ""
    sys.stderr.write(f"\nStopped. {kept} {shlex.join(['manipulators', *command])}{again}\n")
    sys.stderr.flush()


def ended(processes: Processes, status: int, say: Callable[[], None], patience: float = 0.0) -> int:
    """Say why a command ended, in one process, and return its exit status."""
    if processes.count > 1:
        processes.leave(status, say, patience)
    say()
    return status


def say_error(error: ManipulatorsError) -> None:
    """Print the error that ended a command."""
    lines = [f"\n{type(error).__name__}: {error}", *notes(error)]
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def say_unexpected(error: Exception, options: argparse.Namespace) -> None:
    """Show the error of one process of several, or what the loss of another one leaves."""
    if is_lost_contact(error):
        say_error(
            LostProcessError(
                "Another process of the run has ended without a word, as when it is killed or its computer is short "
                "of memory."
            )
        )
    else:
        traceback.print_exception(error)
    say_what_is_kept(options, "")


def notes(error: BaseException) -> Sequence[str]:
    """Return what `errors.add_note` added to an error."""
    return getattr(error, "__notes__", ())


def kept_by_any(options: argparse.Namespace, note: str) -> tuple[str, list[str]]:
    """Return what an interrupted command keeps, and the command that goes on: the same.

    Args:
        options: of the command, with its `arguments`.
        note: what the interrupt itself says is kept; empty for nothing.
    """
    if note:
        return f"{note} To go on:", options.arguments
    return "Nothing was finished. To begin again:", options.arguments


def kept_by_recording(options: argparse.Namespace, note: str) -> tuple[str, list[str]]:
    """Return what an interrupted recording keeps, and the command that goes on."""
    from .data.recording.place import count_kept_episodes

    if not note and (count := count_kept_episodes(options.output)):  # a second interrupt came before the note
        note = f"{count} finished episodes are kept beside {options.output}."
    return kept_by_any(options, note)


def kept_by_evaluation(options: argparse.Namespace, note: str) -> tuple[str, list[str]]:
    """Return what an interrupted evaluation keeps, and the command that goes on."""
    if options.output is None:
        return "No episode is kept without --output FILE. To begin again:", options.arguments
    from ._files import partial_path

    path = partial_path(options.output)
    if not note and path.is_file():  # as above
        note = f"Finished episodes are kept in {path}."
    return kept_by_any(options, note)


def kept_by_training(options: argparse.Namespace, note: str) -> tuple[str, list[str]]:
    """Return what an interrupted training keeps, and the command that goes on."""
    recipe = options.loaded
    folder = None if recipe is None else Path(recipe.output)
    if folder is None or not folder.is_dir() or not any(folder.iterdir()):
        return kept_by_any(options, note)
    from transformers.trainer_utils import get_last_checkpoint

    from .checkpoint import CONFIG_FILE

    checkpoint, is_trained = get_last_checkpoint(folder), (folder / CONFIG_FILE).is_file()
    if is_trained:
        note = f"The trained policy is in {folder}. {note}".strip()
    if checkpoint is not None:
        resumed = options.arguments if options.resume else [*options.arguments, "--resume"]
        return f"{note if is_trained else f'{checkpoint} is kept.'} To go on:", resumed
    if is_trained and recipe.evaluation is not None:
        section = recipe.evaluation
        words = ["eval", folder, "--env", section.environment, "--episodes", section.episodes, "--seed", section.seed]
        words += ["--num-envs", section.num_envs, "--output", folder / "evaluation.json"]
        words += [] if section.horizon is None else ["--horizon", section.horizon]
        return f"{note} To evaluate it:", [str(word) for word in words]
    return (
        f"No checkpoint was written; --training.save_strategy steps --training.save_steps 500 writes some. To begin "
        f"again, rm -r {folder} and:",
        options.arguments,
    )
