"""What a control step costs that only takes the next queued action: reading and checking its observation.

Tiny networks with three cameras of 480×640, uint8, as their processors get them from a robot.

    python benchmarks/steps.py
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from time import thread_time

import numpy as np
import torch

from manipulators import AutoPolicy, PolicyPipeline
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer

TINY = runpy.run_path(str(Path(__file__).parent.parent / "tests" / "policy_cases.py"))
CAMERAS = dict.fromkeys(("wrist", "left", "right"), (3, 480, 640))
LONG = {"chunk_size": 200}
POLICIES = {
    "act": lambda: TINY["tiny_act"](CAMERAS, **LONG),
    "diffusion": lambda: TINY["tiny_diffusion"](CAMERAS, horizon=104, n_action_steps=100, **TINY["LANGUAGE"]),
    "pi0": lambda: TINY["tiny_pi0"](CAMERAS, **LONG),
    "gr00t_n1_5": lambda: TINY["tiny_gr00t_n1_5"](CAMERAS, action_head_cfg=_head(TINY["tiny_gr00t_n1_5"])),
    "gr00t_n1": lambda: TINY["tiny_gr00t_n1"](CAMERAS, action_head_cfg=_head(TINY["tiny_gr00t_n1"])),
    "composed": lambda: TINY["tiny_composed"]("act", "diffusion", CAMERAS, chunk_size=104),
}


def _head(tiny) -> dict:
    return tiny().action_head_cfg | {"action_horizon": 200, "max_seq_len": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=2, help="chunks whose popped steps are timed (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| policy | steps | p50 [µs] | p95 [µs] |\n|---|---|---|---|")
    for name, config in POLICIES.items():
        seconds = popped_steps(pipeline_of(config()), options.chunks)
        low, high = 1e6 * np.percentile(seconds, [50, 95])
        print(f"| {name} | {len(seconds)} | {low:.0f} | {high:.0f} |")


def pipeline_of(config) -> PolicyPipeline:
    """Return the pipeline of a tiny policy, with statistics of all its features."""
    torch.manual_seed(0)
    features = config.input_features | config.output_features
    ends = {"mean": 0.5, "std": 0.25, "min": 0.0, "max": 1.0, "q01": 0.0, "q99": 1.0}
    statistics = {
        name: {which: [end] * feature.shape[0] for which, end in ends.items()} for name, feature in features.items()
    }
    words = {"tokenizer": word_tokenizer(["push the red button"])} if config.reads_instruction else {}
    processor = processor_class(config).from_config(config, statistics, **words)
    return PolicyPipeline(model=AutoPolicy.from_config(config), processor=processor, device="cpu")


def popped_steps(pipeline: PolicyPipeline, chunks: int) -> list[float]:
    """Return the seconds of each step that takes its action from the queue."""
    generator = np.random.default_rng(0)
    task = "push the red button" if pipeline.policy.config.reads_instruction else None
    seconds = []
    observation = {
        name: generator.integers(0, 256, (480, 640, 3), np.uint8) for name in pipeline.processor.pictures.cameras
    }
    state = generator.random(3, np.float32)
    for _ in range(chunks):
        for step in range(pipeline.policy.config.n_action_steps):
            for picture in observation.values():
                picture[0, 0] = generator.integers(0, 256, 3)  # a simulator writes into the same array
            began = thread_time()
            pipeline(observation | {"observation.state": state}, task)
            seconds += [thread_time() - began] if step else []
    return seconds


if __name__ == "__main__":
    main()
