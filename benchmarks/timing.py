"""Time two implementations in alternation: what disturbs the machine disturbs both, and cancels in the ratio."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Comparison:
    """Hold one figure's measurements: seconds per call of each side, round by round.

    Args:
        name: what was timed.
        ours, theirs: seconds; entry i of both was taken in the same round.
        items: samples that one call delivers, where the figure is a rate; None where it is a time.
    """

    name: str
    ours: list[float]
    theirs: list[float]
    items: int | None = None

    @property
    def speedups(self) -> np.ndarray:
        """How many times faster ours was, per round."""
        return np.divide(self.theirs, self.ours)

    def shown(self, seconds: list[float]) -> str:
        """Return the median of one side with its unit."""
        median = float(np.median(seconds))
        if self.items is not None:
            return f"{self.items / median:.3g} items/s"
        return f"{median:.2f} s" if median >= 0.9995 else f"{1000 * median:.3g} ms"

    def row(self) -> str:
        """Return the figure's line of the Markdown table."""
        low, median, high = np.percentile(self.speedups, [25, 50, 75])
        return (
            f"| {self.name} | {self.shown(self.ours)} | {self.shown(self.theirs)} "
            f"| **{median:.2f}×** ({low:.2f}–{high:.2f}) | {len(self.ours)} |"
        )


def alternate(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    warmup: int = 2,
    items: int | None = None,
) -> Comparison:
    """Time two calls in this process, in turn; which of them begins changes from round to round."""
    return compare(name, lambda: seconds_of(ours), lambda: seconds_of(theirs), rounds, warmup, items)


def alternate_processes(name: str, ours: str, theirs: str, rounds: int) -> Comparison:
    """Time two Python programs in fresh processes, in turn; each prints its own seconds on its last line.

    The first round, which reads the libraries' files from the disk, is not counted.
    """

    def run(program: str) -> float:
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        if result.returncode:
            raise RuntimeError(f"{name} failed:\n{result.stderr[-4000:]}")
        return float(result.stdout.split()[-1])

    return compare(name, lambda: run(ours), lambda: run(theirs), rounds, warmup=1)


def compare(
    name: str,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    rounds: int,
    warmup: int = 2,
    items: int | None = None,
) -> Comparison:
    """Take, in turn, the seconds that two calls report; those of the warm-up are not counted."""
    for _ in range(warmup):
        ours(), theirs()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    sides = {"ours": ours, "theirs": theirs}
    for index in range(rounds):
        for side in sorted(sides, reverse=bool(index % 2)):
            seconds[side].append(sides[side]())
    return Comparison(name, seconds["ours"], seconds["theirs"], items)


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long one call takes [s], an accelerator's work included and garbage collection left out."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    gc.collect()
    gc.disable()
    try:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start
    finally:
        gc.enable()


def require_equal(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Stop unless both compute the same: speed without it means nothing."""
    difference = (ours - theirs).abs().max().item()
    if ours.shape != theirs.shape or not difference <= tolerance:
        raise SystemExit(f"{name}: the two differ by {difference:.3g} (tolerance {tolerance:g}).")


def trainer_optimizer(policy: torch.nn.Module, folder: Path, learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimizer that our trainer builds by default, with one learning rate."""
    from manipulators import PolicyTrainer, PolicyTrainingArguments

    arguments = PolicyTrainingArguments(str(folder / "trainer"), learning_rate=learning_rate, use_cpu=True)
    optimizer_class, settings = PolicyTrainer.get_optimizer_cls_and_kwargs(arguments, policy)
    return optimizer_class(policy.parameters(), weight_decay=arguments.weight_decay, **settings)


def machine(packages: list[str]) -> dict[str, str]:
    """Return what the figures depend on: processor, cores, system, versions."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    described = {
        "processor": model,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return described | {"python": platform.python_version()} | {name: version(name) for name in packages}


def report(comparisons: list[Comparison], described: dict[str, str], peer: str) -> str:
    """Return the Markdown table and the machine it was measured on."""
    lines = [
        f"| figure | manipulators | {peer} | faster by (quartiles) | rounds |",
        "|---|---|---|---|---|",
        *(comparison.row() for comparison in comparisons),
        "",
        " · ".join(f"{name} {value}" for name, value in described.items()),
    ]
    return "\n".join(lines) + "\n"


def write(folder: Path, name: str, comparisons: list[Comparison], described: dict[str, str], peer: str) -> None:
    """Write `<name>.md`, the table, and `<name>.json`, every single measurement."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(report(comparisons, described, peer), encoding="utf-8")
    measured = [
        {
            "figure": c.name,
            "items": c.items,
            "ours_seconds": c.ours,
            "theirs_seconds": c.theirs,
            "median_speedup": float(np.median(c.speedups)),
        }
        for c in comparisons
    ]
    text = json.dumps({"machine": described, "figures": measured}, indent=2) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
