"""Where a chunk's time goes: per stage what it takes on a CPU, and what its products and its weights alone would."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
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


def roofline(policy: PolicyModel, sample: Callable[[], object], weights: Mapping[str, Iterable[nn.Module]]) -> str:
    """Return the table of a policy's stages.

    Args:
        sample: predicts a chunk.
        weights: per stage what it reads.
    """
    seconds, products = defaultdict(list), defaultdict(list)
    operations: dict[str, int] = defaultdict(int)

    def timed(stage: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            seconds[stage].append(time.perf_counter() - start)
            return result

        return run

    def timed_products(stage: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with TimedProducts() as mode:
                result = call(*args, **kwargs)
            products[stage].append(mode.seconds)
            return result

        return run

    def counted(stage: str, call: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = call(*args, **kwargs)
            operations[stage] += counter.get_total_flops()
            return result

        return run

    for around, rounds in ((counted, 1), (timed, ROUNDS), (timed_products, ROUNDS)):
        with observed_stages(policy, around):
            for _ in range(rounds):
                sample()
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
        row = 1000 * np.array([*(calls * t for t in per_call), operations[stage] / arithmetic, read / bandwidth])
        sums += row
        lines.append(f"| {stage} | {calls} | {' | '.join(f'{value:.0f}' for value in row)} |")
    lines.append(f"| all | | {' | '.join(f'{value:.0f}' for value in sums)} |")
    return "\n".join([*lines, "", f"A chunk takes {1000 * chunk:.0f} ms."]) + "\n"
