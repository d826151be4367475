"""Where a chunk's time goes: per stage what it takes on a CPU, and what its products and its weights alone would."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from timing import seconds_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from manipulators.modeling.policy import PolicyModel
from manipulators.modeling.stages import observed_stages

ROUNDS = 7
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"}


class Stopwatch:
    """Take the seconds of a block."""

    def __enter__(self) -> Stopwatch:
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.start


class TimedProducts(TorchDispatchMode):
    """Add up the seconds spent in matrix products, convolutions and attention."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.seconds += time.perf_counter() - start
        return result


def machine_rates() -> tuple[float, float]:
    """Return this machine's operations per second in a large product, and the bytes per second that it reads."""
    matrix = torch.ones(2048, 2048)
    arithmetic = 2 * 2048**3 / min(seconds_of(lambda: matrix @ matrix) for _ in range(10))
    memory = torch.ones(2**28)  # 1 GiB: larger than any cache
    return arithmetic, memory.nbytes / min(seconds_of(memory.sum) for _ in range(5))


def metered(
    policy: PolicyModel,
    sample: Callable[[], object],
    meter: Callable[[], Any],
    reading: Callable[[Any], float],
    rounds: int,
) -> dict[str, list[float]]:
    """Return per stage what a meter, set around each of its calls, reads afterwards."""
    readings: dict[str, list[float]] = defaultdict(list)

    def around(stage: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with meter() as used:
                result = call(*args, **kwargs)
            readings[stage].append(reading(used))
            return result

        return run

    with observed_stages(policy, around):
        for _ in range(rounds):
            sample()
    return readings


def roofline(policy: PolicyModel, sample: Callable[[], object], weights: Mapping[str, Iterable[nn.Module]]) -> str:
    """Return the table of a policy's stages.

    Args:
        sample: predicts a chunk.
        weights: per stage what it reads.
    """
    seconds = metered(policy, sample, Stopwatch, lambda watch: watch.seconds, ROUNDS)
    products = metered(policy, sample, TimedProducts, lambda mode: mode.seconds, ROUNDS)
    operations = metered(policy, sample, partial(FlopCounterMode, display=False), FlopCounterMode.get_total_flops, 1)
    chunk = float(np.median([seconds_of(sample) for _ in range(ROUNDS)]))
    arithmetic, bandwidth = machine_rates()
    lines = [
        f"This machine multiplies large matrices at {arithmetic / 1e9:.0f} GFLOP/s, reads {bandwidth / 1e9:.1f} GB/s.",
        "",
        "| stage | calls | measured [ms] | of which products [ms] | products at the machine's rate [ms] "
        "| weights read once per call [ms] |",
        "|---|---|---|---|---|---|",
    ]
    sums = np.zeros(4)
    for stage, times in seconds.items():
        calls = len(times) // ROUNDS
        read = calls * sum(weight.nbytes for module in weights[stage] for weight in module.parameters())
        per_call = (float(np.median(times)), float(np.median(products[stage])))
        row = 1000 * np.array([*(calls * t for t in per_call), sum(operations[stage]) / arithmetic, read / bandwidth])
        sums += row
        lines.append(f"| {stage} | {calls} | {' | '.join(f'{value:.0f}' for value in row)} |")
    lines.append(f"| all | | {' | '.join(f'{value:.0f}' for value in sums)} |")
    return "\n".join([*lines, "", f"A chunk takes {1000 * chunk:.0f} ms."]) + "\n"
