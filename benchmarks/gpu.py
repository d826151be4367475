"""π0 and GR00T N1.5 at real size on a GPU: eager, fused, compiled and as CUDA graphs, from one, two and three cameras.

    python benchmarks/gpu.py --output outputs/benchmarks
    python benchmarks/gpu.py --policies pi0 --cameras 3 --modes graphs --rounds 200

Weights are random, in bfloat16. π0 is measured beside transformers' own with the same weights, in turn and with the
same switch where it has it; both must give the same chunk. A chunk is timed from inputs to actions on the device.
`--size medium --device cpu --dtype float32` tries the script where there is no GPU; CUDA graphs are left out then.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import OBSERVED, SIZES, gr00t_config, native_pi0, native_pi0_inputs, pi0_config, pi0_inputs
from timing import alternate, machine, require_equal, seconds_of

from manipulators import GR00TN1_5Policy, PI0Policy

PACKAGES = ["torch", "transformers"]
MODES = ("eager", "fused", "compiled", "graphs")
WARMUP = 5
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of the chunk's largest number
Chunk = Callable[[], torch.Tensor]


def moved(inputs: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return inputs on the device, numbers with a point in the weights' type."""
    return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def compile_options(mode: str) -> dict[str, Any]:
    """Return the options of `torch.compile`; the modules stay as they are, and are not looked at in every call."""
    unguarded = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return unguarded | {"triton.cudagraphs": mode == "graphs"}


def switch_on(policy: PI0Policy | GR00TN1_5Policy, mode: str, inputs: dict[str, Any]) -> None:
    """Make a policy sample in a mode."""
    if mode != "eager":
        policy.fuse()
    if mode in ("compiled", "graphs"):
        policy.compile(inputs=inputs, options=compile_options(mode))


def pi0(mode: str, cameras: int, size: str, device: str, dtype: torch.dtype) -> tuple[Chunk, Chunk]:
    """Return how our π0 and transformers' sample a chunk from the same noise; theirs has nothing to fuse."""
    config = pi0_config(size, cameras)
    with torch.device(device):
        policy = PI0Policy._from_config(config, dtype=dtype).eval()
    inputs = moved(pi0_inputs(config, 1), device, dtype)
    observation, noise = {name: inputs[name] for name in OBSERVED}, inputs["noise"]
    native = native_pi0(policy).eval()
    given = native_pi0_inputs(observation, native.config.vlm_config.image_token_id)
    if mode in ("compiled", "graphs"):
        native.sample_actions = torch.compile(native.sample_actions, fullgraph=True, options=compile_options(mode))

    def theirs() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return native.sample_actions(**given, noise=noise.clone()).clone()

    switch_on(policy, mode, observation | {"noise": noise})
    return lambda: policy.predict_action_chunk(**observation, noise=noise), theirs


def gr00t(mode: str, cameras: int, size: str, device: str, dtype: torch.dtype) -> tuple[Chunk, None]:
    """Return how our GR00T N1.5 samples a chunk; nobody else has one that runs beside today's transformers."""
    config = gr00t_config(size, cameras)
    with torch.device(device):
        policy = GR00TN1_5Policy._from_config(config, dtype=dtype).eval()
    inputs = moved(config.example_inputs(1) | config.example_draws(1), device, dtype)
    switch_on(policy, mode, inputs)
    return lambda: policy.predict_action_chunk(**inputs), None


POLICIES = {"pi0": pi0, "gr00t_n1_5": gr00t}


def measure(ours: Chunk, theirs: Chunk | None, rounds: int, tolerance: float) -> dict[str, list[float]]:
    """Return the seconds of both, taken in turn, or of ours alone."""
    if theirs is None:
        return {"ours": [seconds_of(ours) for _ in range(WARMUP + rounds)][WARMUP:]}
    expected = theirs().float()
    scale = expected.abs().max()
    require_equal("chunk over its largest number", ours().float() / scale, expected / scale, tolerance)
    comparison = alternate("chunk", ours, theirs, rounds, WARMUP)
    return {"ours": comparison.ours, "theirs": comparison.theirs}


def row(policy: str, cameras: int, mode: str, seconds: dict[str, list[float]]) -> str:
    """Return a line of the table."""
    low, high = 1000 * np.percentile(seconds["ours"], [50, 95])
    beside = "| | |"
    if "theirs" in seconds:
        ratio = np.median(np.divide(seconds["theirs"], seconds["ours"]))
        beside = f"| {1000 * np.median(seconds['theirs']):.1f} | {ratio:.2f}× |"
    return f"| {policy} | {cameras} | {mode} | {low:.1f} | {high:.1f} | {1000 / low:.1f} {beside}"


def main() -> None:
    """Measure the chosen policies, cameras and modes; print the table and keep every measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--cameras", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--size", choices=SIZES, default="published")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    on_cuda = torch.device(arguments.device).type == "cuda"
    described = machine(PACKAGES) | {
        "device": torch.cuda.get_device_name(arguments.device) if on_cuda else arguments.device,
        "dtype": arguments.dtype,
        "size": arguments.size,
    }
    lines = [
        "| policy | cameras | mode | p50 [ms] | p95 [ms] | Hz | transformers p50 [ms] | faster by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured = []
    for policy in arguments.policies:
        for cameras in arguments.cameras:
            for mode in arguments.modes:
                if mode == "graphs" and not on_cuda:
                    continue
                torch._dynamo.reset()
                torch.manual_seed(0)
                dtype = getattr(torch, arguments.dtype)
                sides = POLICIES[policy](mode, cameras, arguments.size, arguments.device, dtype)
                seconds = measure(*sides, arguments.rounds, TOLERANCE[arguments.dtype])
                lines.append(row(policy, cameras, mode, seconds))
                print(lines[-1], flush=True)
                measured.append({"policy": policy, "cameras": cameras, "mode": mode, "seconds": seconds})
                del sides
    table = "\n".join([*lines, "", " · ".join(f"{name} {value}" for name, value in described.items())]) + "\n"
    print("\n" + table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gpu.md").write_text(table, encoding="utf-8")
    text = json.dumps({"machine": described, "figures": measured}, indent=2) + "\n"
    (arguments.output / "gpu.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
