"""π0 at its published size on a CPU: what loading a checkpoint and predicting one chunk take, in bytes and seconds.

    python benchmarks/pi0_memory.py --folder /tmp/pi0 --output outputs/benchmarks

The checkpoint holds 3.2 billion random numbers in bfloat16. It is written shard by shard, so that writing needs the
memory of one shard only, and removed afterwards. Loading and predicting run in a fresh process of their own. Weights
that keep their type stay mapped from the file, and are read when they are first used: the first chunk pays for that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from timing import machine

from manipulators import PI0Policy, PI0PolicyConfig, PolicyPipeline
from manipulators.processing.pi0 import PI0Processor
from manipulators.processing.word_tokenizer import word_tokenizer

THREADS = 2
SHARD = 2**30
CAMERAS = ("base", "left_wrist", "right_wrist")
TASK = "fold the towel"
WIDTH = 14
PACKAGES = ["torch", "transformers", "safetensors"]


def identity_statistics(config: PI0PolicyConfig) -> dict:
    """Return statistics that leave every number as it is."""
    features = config.input_features | config.output_features
    return {name: {"mean": [0.0] * f.shape[0], "std": [1.0] * f.shape[0]} for name, f in features.items()}


def write_checkpoint(folder: Path) -> int:
    """Write a whole checkpoint of random weights and return their bytes."""
    config = PI0PolicyConfig(
        input_features={
            **{f"observation.images.{camera}": {"type": "VISUAL", "shape": (3, 224, 224)} for camera in CAMERAS},
            "observation.state": {"type": "STATE", "shape": (WIDTH,)},
        },
        output_features={"action": {"type": "ACTION", "shape": (WIDTH,)}},
        dtype="bfloat16",
    )
    with torch.device("meta"):
        weights = PI0Policy(config).state_dict()
    config.save_pretrained(folder)
    PI0Processor.from_config(config, identity_statistics(config), tokenizer=word_tokenizer([TASK])).save_pretrained(
        folder
    )
    shards: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if size + 2 * weight.numel() > SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * weight.numel()
    generator = torch.Generator().manual_seed(0)
    index, total = {}, 0
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard = {
            name: torch.empty(weights[name].shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for name in names
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        total += sum(weight.nbytes for weight in shard.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


# --- in a process of its own ------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Return this process's memory in bytes: anonymous, pages of files, and the highest sum of both so far."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    values = {name: value.split() for name, value in lines}
    names = {"anonymous": "RssAnon", "files": "RssFile", "highest": "VmHWM"}
    return {ours: int(values[theirs][0]) * 1024 for ours, theirs in names.items()}


@contextmanager
def measured(results: dict, name: str) -> Iterator[None]:
    """Note the seconds of a block, and the memory after it."""
    start = time.perf_counter()
    yield
    results[name] = {"seconds": time.perf_counter() - start, "memory": memory()}


def measure(folder: Path) -> dict:
    """Load the checkpoint and predict a chunk twice; return what each took."""
    torch.set_num_threads(THREADS)
    results = {"before": memory()}
    with measured(results, "load"):
        pipeline = PolicyPipeline.from_pretrained(folder, device="cpu")
    policy = pipeline.policy
    results["weights"] = sum(parameter.nbytes for parameter in policy.parameters())
    results["parameters"] = policy.num_parameters()
    observation = {f"observation.images.{camera}": torch.rand(3, 224, 224) for camera in CAMERAS}
    observation["observation.state"] = torch.zeros(WIDTH)
    for name in ("first chunk", "second chunk"):
        with measured(results, name):
            chunk = pipeline.predict_chunk(observation, task=TASK)
        results["finite"] = bool(torch.isfinite(chunk).all()) and tuple(chunk.shape) == (50, WIDTH)
    return results


def report(results: dict, file_bytes: int) -> str:
    """Return the figures as a Markdown table."""
    base, weights = results["before"]["highest"], results["weights"]
    rows = [
        f"{results['parameters'] / 1e9:.3f} billion parameters; {file_bytes / 1e9:.2f} GB on disk, "
        f"{weights / 1e9:.2f} GB in memory (pictures, norms and projections in float32); finite: {results['finite']}",
        "",
        "| up to here | seconds | resident at most, GB | × the weights in memory | × the file | mapped files, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("load", "first chunk", "second chunk"):
        highest = results[name]["memory"]["highest"] - base
        rows.append(
            f"| {name} | {results[name]['seconds']:.1f} | {highest / 1e9:.2f} | {highest / weights:.3f} | "
            f"{highest / file_bytes:.3f} | {results[name]['memory']['files'] / 1e9:.2f} |"
        )
    rows += ["", f"Interpreter and libraries before loading, taken off above: {base / 1e9:.2f} GB."]
    return "\n".join(rows)


def main() -> None:
    """Write the checkpoint, measure it in a fresh process, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint; 7 GB, removed afterwards")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder)))
        return
    arguments.folder.mkdir(parents=True)
    try:
        file_bytes = write_checkpoint(arguments.folder)
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--measure"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results = json.loads(output.splitlines()[-1])
    finally:
        shutil.rmtree(arguments.folder)
    table = report(results, file_bytes)
    arguments.output.mkdir(parents=True, exist_ok=True)
    described = machine(PACKAGES) | {"threads": str(THREADS)}
    (arguments.output / "pi0_memory.json").write_text(json.dumps(described | {"results": results}, indent=2))
    print(table)


if __name__ == "__main__":
    main()
