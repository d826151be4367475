"""Rows of a table measured one after the other within a time: what a row is, and how none spoils the others."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CLOSING = 3  # seconds before the deadline that are left for the end
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of a chunk's largest number


class OutOfTimeError(BaseException):
    """End a row that takes too long; no library may take this for an error of its own."""


@dataclass(frozen=True)
class Row:
    """Describe one measurement.

    Args:
        name: of the row.
        seconds: that it takes on a GPU, about.
        run: measures, and returns numbers under their names. A list is kept and not shown; `ok` says whether they are
            as they should be.
        uses: name of what the row keeps on the device for rows after it; freed when no more rows use it.
    """

    name: str
    seconds: float
    run: Callable[[Suite], dict[str, Any]]
    uses: str | None = None


@dataclass
class Suite:
    """Hold where and how to measure, and what rows share.

    Args:
        device, dtype, size: of the networks.
        rounds: how often a chunk is timed.
        steps: of an optimizer.
        golden: folder of reference outputs.
        output: folder of the results.
        folder: for files of rows.
        deadline: in the seconds of `time.monotonic`.
    """

    device: torch.device
    dtype: torch.dtype
    size: str
    rounds: int
    steps: int
    golden: Path
    output: Path
    folder: Path
    deadline: float
    kept: dict[str, Any] = field(default_factory=dict)
    row_ends: float = 0.0

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def tolerance(self) -> float:
        """The difference of a chunk, over its largest number, that rounding in the weights' type explains."""
        return TOLERANCE[str(self.dtype).removeprefix("torch.")]

    def keep(self, name: str, build: Callable[[], Any]) -> Any:
        """Return what is kept under a name, built first where it is not there."""
        if name not in self.kept:
            self.kept[name] = build()
        return self.kept[name]

    @property
    def is_real(self) -> bool:
        """Whether this is no dry run: networks of published size, on a GPU."""
        return self.on_gpu and self.size == "published"

    def free(self, used: set[str | None]) -> None:
        """Forget what no row uses any more, and empty the device's cache."""
        self.kept = {name: value for name, value in self.kept.items() if name in used}
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# --- one row ----------------------------------------------------------------------------------------------


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(suite: Suite, row: Row) -> dict[str, Any]:
    """Return a row's record: `result` is ok, CHECK, FAILED or skipped."""
    expected = row.seconds if suite.is_real else 0.0
    start = time.perf_counter()
    if expected > suite.left - CLOSING:
        numbers = {"why": f"needs about {expected:.0f} s, {max(suite.left, 0):.0f} s are left"}
        return {"row": row.name, "result": "skipped", "seconds": 0.0, "numbers": numbers}
    limit = suite.left - CLOSING
    if suite.is_real:
        limit = min(limit, 2 * expected + 25)
    suite.row_ends = time.monotonic() + limit
    try:
        with time_limit(limit):
            numbers = row.run(suite)
        if "skipped" in numbers:
            result, numbers = "skipped", {"why": numbers["skipped"]}
        else:
            result = "ok" if numbers.pop("ok", True) else "CHECK"
    except (Exception, OutOfTimeError, SystemExit) as error:
        result = "FAILED"
        text = " ".join(str(error).split())
        numbers = {"why": f"{type(error).__name__}: {text[-300:]}"}
        keep_traceback(suite.output, row.name)
        # Frames of the traceback hold on to tensors.
        traceback.clear_frames(error.__traceback__)
    return {"row": row.name, "result": result, "seconds": time.perf_counter() - start, "numbers": numbers}


def keep_traceback(output: Path, name: str) -> None:
    """Write the traceback of the error at hand to a file of this name."""
    keep_text(output / "errors", name, traceback.format_exc())


def keep_text(folder: Path, name: str, text: str) -> None:
    """Write a text to a file of this name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{re.sub(r'[^0-9A-Za-z._-]+', '_', name.replace('π', 'pi'))}.txt").write_text(text, encoding="utf-8")


def shown(record: dict[str, Any]) -> str:
    """Return a record as a line of the table."""
    numbers = " · ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in record["numbers"].items()
        if not isinstance(value, (list, dict))
    )
    return f"| {record['row']} | {record['result']} | {record['seconds']:.1f} | {numbers.replace('|', '/')} |"


def is_broken(suite: Suite) -> bool:
    """Return whether an error has left the device unusable in this process."""
    try:
        if suite.on_gpu:
            torch.cuda.synchronize()
            torch.ones(1, device=suite.device).item()
    except Exception:
        return True
    return False


# --- all rows ---------------------------------------------------------------------------------------------


def run_rows(suite: Suite, rows: Sequence[Row], first: int) -> list[dict[str, Any]]:
    """Measure the rows from the first one on; print and keep each at once."""
    records = []
    for index, row in list(enumerate(rows))[first:]:
        record = measure(suite, row)
        records.append(record)
        line = shown(record)
        print(line, flush=True)
        with (suite.output / "gpu_suite.md").open("a", encoding="utf-8") as table:
            table.write(line + "\n")
        with (suite.output / "gpu_suite.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, default=str) + "\n")
        if record["result"] == "FAILED" and is_broken(suite):
            restart(suite, index + 1)
        suite.free({later.uses for later in rows[index + 1 :]})
    return records


def restart(suite: Suite, row: int) -> None:
    """Go on with a row in a fresh process: an error on the device outlives the row that made it."""
    print("(the device does not answer after this error; the rows after it run in a fresh process)", flush=True)
    shutil.rmtree(suite.folder, ignore_errors=True)
    own = [a for a in sys.argv[1:] if not a.startswith(("--first-row", "--seconds"))]
    command = [sys.executable, sys.argv[0], *own, f"--first-row={row}", f"--seconds={suite.left:.0f}"]
    os.execv(sys.executable, command)
