"""A policy of published size on a CPU: what loading a checkpoint and predicting a chunk take, in bytes and seconds.

    python benchmarks/memory.py pi0 --folder /tmp/pi0 --output outputs/benchmarks
    python benchmarks/memory.py pi05 --folder /tmp/pi05 --chunks 1
    python benchmarks/memory.py gr00t_n1_5 --folder /tmp/gr00t --output outputs/benchmarks

The checkpoint holds billions of random numbers in bfloat16: those of π0 and π0.5 in our layout, GR00T's in NVIDIA's,
with all that is in it and nothing reads. It is written shard by shard, so that writing needs the memory of one shard
only, and removed afterwards. Loading and predicting run in a fresh process of their own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from networks import features
from safetensors.torch import save_file
from timing import machine
from transformers import SiglipVisionConfig, SiglipVisionModel

from manipulators import (
    GR00TN1_5Config,
    GR00TN1_5Policy,
    GR00TN1Config,
    GR00TN1Policy,
    PI0Policy,
    PI0PolicyConfig,
    PI05Policy,
    PI05PolicyConfig,
    PolicyPipeline,
)
from manipulators.processing.pi0 import PI0PolicyProcessor
from manipulators.processing.pi05 import PI05PolicyProcessor
from manipulators.processing.word_tokenizer import word_tokenizer

THREADS = 2
SHARD = 2**30
CAMERAS = ("base", "left_wrist", "right_wrist")
TASK = "fold the towel"
CHUNKS = ("first chunk", "second chunk")
WIDTH = 14
IMAGE_TOKEN = 4
PACKAGES = ["torch", "transformers", "safetensors"]
Shapes = Mapping[str, torch.Size]


def write_shards(folder: Path, shapes: Shapes) -> int:
    """Write random weights of the given shapes, a file at a time, and return their bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    generator = torch.Generator().manual_seed(0)
    index, total = {}, 0
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard = {
            name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for name in names
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        total += sum(weight.nbytes for weight in shard.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def write_pi0(folder: Path, model_type: str) -> int:
    """Write π0 or π0.5 in our layout and return the weights' bytes."""
    config_class, policy_class, processor_class = {
        "pi0": (PI0PolicyConfig, PI0Policy, PI0PolicyProcessor),
        "pi05": (PI05PolicyConfig, PI05Policy, PI05PolicyProcessor),
    }[model_type]
    config = config_class(**features(CAMERAS, WIDTH), dtype="bfloat16")
    with torch.device("meta"):
        weights = policy_class(config).state_dict()
    config.save_pretrained(folder)
    # Statistics that leave every number as it is.
    named = config.input_features | config.output_features
    same = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    statistics = {name: {key: [x] * f.shape[0] for key, x in same.items()} for name, f in named.items()}
    tokenizer = word_tokenizer([TASK, "Task State Action", *map(str, range(256))])
    processor_class.from_config(config, statistics, tokenizer=tokenizer).save_pretrained(folder)
    return write_shards(folder, {name: weight.shape for name, weight in weights.items()})


def write_gr00t(folder: Path, model_type: str) -> int:
    """Write GR00T as NVIDIA does, with one robot's statistics, and return the weights' bytes."""
    config, policy_class = {
        "gr00t_n1_5": (GR00TN1_5Config(), GR00TN1_5Policy),
        "gr00t_n1": (GR00TN1Config(), GR00TN1Policy),
    }[model_type]
    with torch.device("meta"):
        policy = policy_class(config)
    shapes = {}
    for name, weight in policy.state_dict().items():
        published = name.replace("vision_model.", "vision_model.vision_model.")
        shapes[published.replace("language_model.", "language_model.model.")] = weight.shape
    if model_type == "gr00t_n1_5":  # also what its file holds and nothing reads
        model = policy.backbone.eagle_model
        with torch.device("meta"):
            vision = SiglipVisionModel(SiglipVisionConfig(**config.eagle_config["vision_config"]))
        prefix = "backbone.eagle_model."
        shapes |= {
            f"{prefix}vision_model.vision_model.head.{name}": weight.shape
            for name, weight in vision.head.state_dict().items()
        }
        shapes[f"{prefix}language_model.lm_head.weight"] = model.language_model.embed_tokens.weight.shape
    published = {"model_type": model_type, "torch_dtype": "bfloat16", "action_horizon": 16, "action_dim": 32}
    published |= {"backbone_cfg": config.backbone_cfg, "action_head_cfg": config.action_head_cfg}
    # The token that stands for pictures is another in a tokenizer of words.
    if model_type == "gr00t_n1":
        published["backbone_cfg"] = config.backbone_cfg | {"img_context_token_id": IMAGE_TOKEN}
    else:
        published["eagle_config"] = {"image_token_index": IMAGE_TOKEN}
    (folder / "config.json").write_text(json.dumps(published))
    flat = {"min": [-1.0] * WIDTH, "max": [1.0] * WIDTH, "mean": [0.0] * WIDTH, "std": [1.0] * WIDTH}
    flat |= {"q01": [-1.0] * WIDTH, "q99": [1.0] * WIDTH}
    shape = {"absolute": True, "rotation_type": None, "shape": [WIDTH], "continuous": True}
    robot = {
        "statistics": {"state": {"arms": flat}, "action": {"arms": flat}},
        "modalities": {
            "video": {camera: {"resolution": [224, 224], "channels": 3, "fps": 30.0} for camera in CAMERAS},
            "state": {"arms": shape},
            "action": {"arms": shape},
        },
        "embodiment_tag": "new_embodiment",
    }
    (folder / "experiment_cfg").mkdir()
    (folder / "experiment_cfg" / "metadata.json").write_text(json.dumps({"new_embodiment": robot}))
    return write_shards(folder, shapes)


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


def measure(folder: Path, chunks: int) -> dict:
    """Load the checkpoint and predict some chunks; return what each took."""
    torch.set_num_threads(THREADS)
    results = {"before": memory()}
    # NVIDIA's folders hold no tokenizer.
    tokenizer = {} if (folder / "tokenizer.json").is_file() else {"tokenizer": word_tokenizer([TASK])}
    with measured(results, "load"):
        pipeline = PolicyPipeline.from_pretrained(folder, device="cpu", **tokenizer)
    policy = pipeline.policy
    results["weights"] = sum(parameter.nbytes for parameter in policy.parameters())
    results["parameters"] = policy.num_parameters()
    observation = {f"observation.images.{camera}": torch.rand(3, 224, 224) for camera in CAMERAS}
    observation["observation.state"] = torch.zeros(WIDTH)
    for name in CHUNKS[:chunks]:
        with measured(results, name):
            chunk = pipeline.predict_chunk(observation, task=TASK)
        results["finite"] = bool(torch.isfinite(chunk).all())
        results["chunk"] = list(chunk.shape)
    return results


def report(results: dict, file_bytes: int) -> str:
    """Return the figures as a Markdown table."""
    base, weights = results["before"]["highest"], results["weights"]
    rows = [
        f"{results['parameters'] / 1e9:.3f} billion parameters; {file_bytes / 1e9:.2f} GB on disk, "
        f"{weights / 1e9:.2f} GB in memory; finite: {results['finite']}",
        "",
        "| up to here | seconds | resident at most, GB | × the weights in memory | × the file | mapped files, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("load", *(name for name in CHUNKS if name in results)):
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
    parser.add_argument("policy", choices=["pi0", "pi05", "gr00t_n1_5", "gr00t_n1"])
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint; 7 GB, removed afterwards")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--chunks", type=int, choices=(1, 2), default=2, help="how many are predicted (default: 2)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder, arguments.chunks)))
        return
    arguments.folder.mkdir(parents=True)
    try:
        write = write_pi0 if arguments.policy in ("pi0", "pi05") else write_gr00t
        file_bytes = write(arguments.folder, arguments.policy)
        command = [sys.executable, __file__, arguments.policy, "--folder", str(arguments.folder), "--measure"]
        command += ["--chunks", str(arguments.chunks)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results = json.loads(output.splitlines()[-1])
    finally:
        shutil.rmtree(arguments.folder)
    table = report(results, file_bytes)
    arguments.output.mkdir(parents=True, exist_ok=True)
    described = machine(PACKAGES) | {"threads": str(THREADS)}
    (arguments.output / f"{arguments.policy}_memory.json").write_text(
        json.dumps(described | {"results": results}, indent=2)
    )
    print(table)


if __name__ == "__main__":
    main()
