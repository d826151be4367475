"""How long a chunk takes on a GPU: policies at real size, with random weights, in one mode after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_equality import compile_options, difference, forget_others, graph_skips, moved, other_numbers
from gpu_rows import Row, Suite, keep_text
from networks import (
    OBSERVED,
    act_config,
    diffusion_config,
    gr00t_config,
    gr00t_n1_config,
    native_pi0,
    native_pi0_inputs,
    pi0_config,
    pi0_inputs,
)
from timing import alternate, seconds_of
from torch import nn

from manipulators.modeling.policy import LABELS, PolicyModel
from manipulators.modeling.registry import policy_class

WARMUP = 5
GOALS = {"π0": 16.0, "GR00T N1.5": 12.0}  # [ms] with three cameras
LARGEST = 15  # kernels that a profile shows


class Bench:
    """A policy on the device with two observations, the chunks that it gives for them eagerly, and perhaps a peer.

    Args:
        policy: in evaluation mode.
        inputs: that make sampling a function of them.
        native: transformers' own network with the same weights, where there is one.
        given: its inputs for the first observation.
    """

    def __init__(
        self,
        policy: PolicyModel,
        inputs: Mapping[str, Any],
        native: nn.Module | None = None,
        given: Mapping[str, Any] | None = None,
    ):
        self.policy, self.inputs, self.native, self.given = policy, dict(inputs), native, given
        self.other = other_numbers(self.inputs)
        self.expected = [self.sample(), self.sample(self.other)]
        self.weights = sum(parameter.nbytes for parameter in policy.parameters())

    def sample(self, inputs: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Return a chunk, from inputs to actions on the device."""
        return self.policy.predict_action_chunk(**(self.inputs if inputs is None else inputs))

    def peer(self) -> torch.Tensor:
        """Return transformers' chunk for the first observation; it changes the noise that it is given."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.native.sample_actions(**self.given, noise=self.inputs["noise"].clone()).clone()

    def switch_on(self, mode: str, on_gpu: bool) -> None:
        """Sample in a mode from now on: eager, fused, compiled or graphs; there is no way back to an earlier one."""
        if mode != "eager":
            self.policy.fuse()
        if mode in ("compiled", "graphs"):
            forget_others(self.policy)
            self.policy.compile(inputs=self.inputs, **compile_options(mode, on_gpu))


def build(config: Any, suite: Suite, dtype: torch.dtype | None = None) -> PolicyModel:
    """Return a policy with random weights, drawn on the device."""
    torch.manual_seed(0)
    with suite.device:
        policy = policy_class(config.model_type)._from_config(config, dtype=dtype or suite.dtype)
    return policy.to(suite.device).eval()  # tables that are always computed on the CPU


def in_parts_float32(policy: PolicyModel) -> PolicyModel:
    """Return a policy in bfloat16 with those parts in float32 that stay so when a checkpoint is loaded."""
    kept = set(policy._keep_in_fp32_modules_strict or ())
    for name, parameter in policy.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return policy


def pi0(suite: Suite, cameras: int, beside: bool = True, as_loaded: bool = False) -> Bench:
    """Return our π0 and, beside it, transformers' own with the same weights and noise."""
    config = pi0_config(suite.size, cameras)
    policy = build(config, suite)
    if as_loaded:
        policy = in_parts_float32(policy)
    inputs = moved(pi0_inputs(config, 1), suite.device, suite.dtype)
    observed = {name: inputs[name] for name in OBSERVED}
    sampling = observed | {"noise": inputs["noise"]}
    if not beside:
        return Bench(policy, sampling)
    native = native_pi0(policy).eval()
    return Bench(policy, sampling, native, native_pi0_inputs(observed, native.config.vlm_config.image_token_id))


def other(suite: Suite, config: Any) -> Bench:
    """Return a policy that no peer is measured beside."""
    policy = build(config, suite)
    inputs = {name: x for name, x in config.example_inputs(1).items() if name not in LABELS}
    return Bench(policy, moved(inputs | config.example_draws(1), suite.device, suite.dtype))


# Under the name in the table: cameras → what is measured.
BUILDERS: dict[str, Callable[[Suite, int], Bench]] = {
    "π0": pi0,
    "π0 as loaded": partial(pi0, beside=False, as_loaded=True),
    "GR00T N1.5": lambda suite, cameras: other(suite, gr00t_config(suite.size, cameras)),
    "GR00T N1": lambda suite, cameras: other(suite, gr00t_n1_config(suite.size, cameras)),
    "ACT": lambda suite, _: other(suite, act_config(suite.size)),
    "Diffusion, DDIM 10": lambda suite, _: other(suite, diffusion_config(suite.size, "DDIM", 10)),
    "Diffusion, DDPM 100": lambda suite, _: other(suite, diffusion_config(suite.size, "DDPM", 100)),
}


def latency(suite: Suite, name: str, cameras: int, mode: str) -> dict[str, Any]:
    """Time chunks in a mode, after comparing them with what the policy gave before and with the peer's."""
    bench = suite.keep(key_of(name, cameras), lambda: BUILDERS[name](suite, cameras))
    held = torch.cuda.memory_allocated() if suite.on_gpu else 0
    skips, start = graph_skips(), time.perf_counter()
    bench.switch_on(mode, suite.on_gpu)
    switched = time.perf_counter() - start
    chunks = [bench.sample(inputs) for inputs in (bench.inputs, bench.other, bench.inputs)]
    apart = [difference(x, bench.expected[i % 2]).relative for i, x in enumerate(chunks)]
    numbers: dict[str, Any] = {}
    if suite.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        bench.sample()
        peak = bench.weights + torch.cuda.max_memory_allocated() - held
        numbers["peak [GB]"] = peak / 1e9
    if mode != "eager":
        numbers["from eager"] = max(apart)
    if mode in ("compiled", "graphs"):
        numbers |= {"compiling [s]": switched, "graphs skipped": graph_skips() - skips}
    if bench.native is not None:
        numbers["from transformers"] = difference(chunks[0], bench.peer()).relative
    numbers["ok"] = all(numbers.get(n, 0.0) <= suite.tolerance for n in ("from eager", "from transformers"))
    numbers["ok"] &= not numbers.get("graphs skipped", 0)
    return timed(suite, bench, GOALS.get(name) if cameras == 3 else None) | numbers


def timed(suite: Suite, bench: Bench, goal: float | None) -> dict[str, Any]:
    """Return what a chunk takes, in turn with the peer where there is one."""
    if bench.native is None:
        seconds = [seconds_of(bench.sample) for _ in range(WARMUP * suite.on_gpu + suite.rounds)]
        ours, theirs = seconds[-suite.rounds :], None
    else:
        warmup = WARMUP if suite.on_gpu else 0
        comparison = alternate("chunk", bench.sample, bench.peer, suite.rounds, warmup)
        ours, theirs = comparison.ours, comparison.theirs
    p50, p95 = (float(x) for x in 1000 * np.percentile(ours, [50, 95]))
    numbers = {"p50 [ms]": p50, "p95 [ms]": p95, **({"goal [ms]": goal} if goal else {}), "Hz": 1000 / p50}
    if theirs is not None:
        numbers["transformers p50 [ms]"] = 1000 * float(np.median(theirs))
        numbers["faster by"] = float(np.median(np.divide(theirs, ours)))
    return numbers | {"ours [s]": ours, "theirs [s]": theirs or []}


def native_compiled(suite: Suite, cameras: int) -> dict[str, Any]:
    """Compile all of transformers' sampling for CUDA graphs, loop unrolled, and time it in turn with ours."""
    bench = suite.keep(key_of("π0", cameras), lambda: BUILDERS["π0"](suite, cameras))
    options = compile_options("graphs", suite.on_gpu)
    bench.native.sample_actions = torch.compile(bench.native.sample_actions, fullgraph=True, **options)
    start = time.perf_counter()
    for _ in range(3):
        theirs = bench.peer()
    numbers = {"compiling [s]": time.perf_counter() - start}
    return timed(suite, bench, None) | numbers | {"from eager": difference(theirs, bench.expected[0]).relative}


def profile(suite: Suite, name: str, cameras: int) -> dict[str, Any]:
    """Say how long the GPU computes for a chunk and in how many kernels, and keep a table of the largest."""
    bench = suite.keep(key_of(name, cameras), lambda: BUILDERS[name](suite, cameras))
    for _ in range(2):
        bench.sample()
    # Beside CUDA graphs, tracing crashes where it is set up a second time.
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if suite.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        bench.sample()
        if suite.on_gpu:
            torch.cuda.synchronize()
    events = profiler.events()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = [event.name for event in events if event.name.startswith(("cudaGraphLaunch", "cuGraphLaunch"))]
    order = "self_device_time_total" if suite.on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=LARGEST, max_name_column_width=100)
    keep_text(suite.output / "profiles", f"{name}, {cameras} cameras", table)
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1000
    return {"computing [ms]": busy, "kernels": len(kernels), "graph launches": len(launches)}


# --- rows -------------------------------------------------------------------------------------------------


def key_of(name: str, cameras: int) -> str:
    """Return the name under which a policy is kept between rows."""
    return f"{name}, {cameras}"


def latency_row(name: str, cameras: int, mode: str, seconds: float) -> Row:
    """Return the row of a policy in a mode."""
    seen = f", {cameras} camera{'s' * (cameras > 1)}" if name.startswith(("π0", "GR00T")) else ""
    run = partial(latency, name=name, cameras=cameras, mode=mode)
    return Row(f"{name}{seen}, {mode}", seconds, run, key_of(name, cameras))


def speed_rows(on_gpu: bool) -> list[Row]:
    """Return what matters most: three cameras, both policies without compiling and then as CUDA graphs."""
    rows = [
        latency_row("π0", 3, "eager", 30),
        latency_row("π0", 3, "fused", 10),
        latency_row("GR00T N1.5", 3, "eager", 20),
        latency_row("GR00T N1.5", 3, "fused", 8),
    ]
    graphs = [latency_row("π0", 3, "graphs", 120), latency_row("GR00T N1.5", 3, "graphs", 100)]
    return rows + graphs * on_gpu


def profile_rows(on_gpu: bool) -> list[Row]:
    """Return where the time goes, of what was measured last."""
    return [
        Row(f"{name}, 3 cameras, profile", 12, partial(profile, name=name, cameras=3), key_of(name, 3))
        for name in ("π0", "GR00T N1.5")
    ]


def further_speed_rows(on_gpu: bool) -> list[Row]:
    """Return the rest of the table: other cameras, policies and modes."""
    quick = [
        latency_row("ACT", 1, "eager", 6),
        latency_row("Diffusion, DDIM 10", 1, "eager", 8),
        latency_row("Diffusion, DDPM 100", 1, "eager", 25),
        latency_row("π0 as loaded", 3, "eager", 20),
        latency_row("π0 as loaded", 3, "fused", 10),
        latency_row("GR00T N1", 3, "eager", 20),
        latency_row("GR00T N1", 3, "fused", 8),
    ]
    few_cameras = [
        latency_row(name, cameras, mode, seconds)
        for name in ("π0", "GR00T N1.5")
        for cameras in (2, 1)
        for mode, seconds in (("eager", 20), ("fused", 8))
    ]
    graphs = [
        latency_row("ACT", 1, "graphs", 40),
        latency_row("Diffusion, DDIM 10", 1, "graphs", 60),
        latency_row("GR00T N1", 3, "graphs", 100),
        latency_row("GR00T N1.5", 2, "graphs", 90),
        latency_row("π0", 2, "graphs", 110),
        latency_row("GR00T N1.5", 1, "graphs", 90),
        latency_row("π0", 1, "graphs", 110),
    ]
    compiled = [latency_row("GR00T N1.5", 3, "compiled", 100), latency_row("π0", 3, "compiled", 120)]
    peer = Row(
        "π0, 3 cameras, transformers' as CUDA graphs", 300, partial(native_compiled, cameras=3), key_of("π0", 3)
    )
    return quick + few_cameras + graphs * on_gpu + compiled + [peer] * on_gpu
