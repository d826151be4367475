"""GR00T N1.5's action head beside LeRobot 0.5.1's: the same weights, inputs, interpreter and torch, measured in turn.

    pip install --no-deps --target FOLDER lerobot==0.5.1
    python benchmarks/gr00t.py --lerobot FOLDER --output outputs/benchmarks

LeRobot has removed N1.5 since, so its last version that has it is read from a folder of its own. Its package for GR00T
cannot be imported whole beside the transformers that this library uses; the head's modules can, and are run unchanged.
A medium size that fits two CPU cores: 8 blocks of width 512 under 4 that work on the features; and the published size.
Features of 64 tokens stand for a short prompt, 556 are two pictures with theirs. `--only` chooses figures, `--rounds`
how often each is repeated.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

import torch
from networks import HEADS, gr00t_config, gr00t_head
from roofline import roofline
from timing import Comparison, alternate, machine, report, require_equal, trainer_optimizer, write
from transformers import BatchFeature

from manipulators import FlowmatchingActionHead_1_5, FlowmatchingActionHeadConfig_1_5, GR00TN1_5Policy
from manipulators.conversion.published import load_published

THREADS = 2
HORIZON, ACTION, STATE, EMBODIMENT, STEPS = 16, 32, 64, 31, 4
CAMERAS = 2
BATCH = 8
LEARNING_RATE, CLIP = 1e-4, 10.0
BETAS, WEIGHT_DECAY = (0.95, 0.999), 1e-5  # of LeRobot's preset
PACKAGES = ["torch", "transformers", "diffusers"]


def lerobot_head(folder: Path) -> ModuleType:
    """Return LeRobot's module of the head; the packages above it are found, but not run."""
    sys.path.insert(0, str(folder))
    for name in ("lerobot.policies", "lerobot.policies.groot"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    return importlib.import_module("lerobot.policies.groot.action_head.flow_matching_action_head")


class Side:
    """One of the two heads, with what goes in."""

    def __init__(self, head: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: int):
        self.head, self.optimizer = head, optimizer
        generator = torch.Generator().manual_seed(0)
        width = head.config.backbone_embedding_dim
        self.features = torch.randn(BATCH, tokens, width, generator=generator)
        self.state = torch.randn(BATCH, 1, STATE, generator=generator)
        self.action = torch.randn(BATCH, HORIZON, ACTION, generator=generator)

    def _inputs(self, batch: int) -> tuple[BatchFeature, BatchFeature]:
        features = self.features[:batch]
        given = {
            "state": self.state[:batch],
            "action": self.action[:batch],
            "action_mask": torch.ones(batch, HORIZON, ACTION),
            "embodiment_id": torch.full((batch,), EMBODIMENT),
        }
        mask = torch.ones(features.shape[:2], dtype=torch.long)
        return (
            BatchFeature({"backbone_features": features, "backbone_attention_mask": mask}),
            BatchFeature(given),
        )

    def sample(self) -> torch.Tensor:
        """Return a chunk (1, h, a) for one observation; both draw the same noise."""
        torch.manual_seed(0)
        return self.head.get_action(*self._inputs(1))["action_pred"]

    def loss(self) -> torch.Tensor:
        """Return the loss of a batch; both draw the same noise and times, where nothing is dropped."""
        torch.manual_seed(0)
        return self.head(*self._inputs(BATCH))["loss"]

    def train(self) -> None:
        """Take a step on a batch: forward, backward, clipping, optimizer."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(size: str, tokens: int, theirs: ModuleType, folder: Path) -> tuple[Side, Side]:
    """Return both heads with the same random weights, in evaluation mode."""
    torch.manual_seed(0)
    fields = gr00t_head(**HEADS[size])
    with redirect_stdout(StringIO()):  # it prints its number of parameters
        their_head = theirs.FlowmatchingActionHead(theirs.FlowmatchingActionHeadConfig(**fields)).eval()
    our_head = FlowmatchingActionHead_1_5(FlowmatchingActionHeadConfig_1_5(**fields)).eval()
    load_published(our_head, their_head.state_dict())
    preset = {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
    their_optimizer = torch.optim.AdamW(their_head.parameters(), **preset)
    our_optimizer = trainer_optimizer(our_head, folder, LEARNING_RATE)
    return Side(our_head, our_optimizer, tokens), Side(their_head, their_optimizer, tokens)


def roofline_of_all() -> str:
    """Say where a chunk of the whole policy spends its time, at the medium size and with two cameras."""
    torch.manual_seed(0)
    policy = GR00TN1_5Policy(gr00t_config("medium", CAMERAS)).eval().requires_grad_(False)
    inputs = policy.config.example_inputs(1)
    eagle, head = policy.backbone.eagle_model, policy.action_head
    reads = {
        "vision": [eagle.vision_model, eagle.mlp1],
        "language": list(eagle.language_model.layers),
        "prepare": [head.vl_self_attention, *(block.attn1.to_k for block in head.model.transformer_blocks)],
        "denoise": [head.model],
    }
    return roofline(policy, lambda: policy.predict_action_chunk(**inputs), reads)


FIGURES = {
    "sample-64": (f"sample a chunk of {HORIZON}, {STEPS} steps, 64 features, batch 1", "medium", 64, "sample", 30),
    "sample-556": (f"sample a chunk of {HORIZON}, {STEPS} steps, 556 features, batch 1", "medium", 556, "sample", 20),
    "train-64": (f"train step, 64 features, batch {BATCH}", "medium", 64, "train", 10),
    "train-556": (f"train step, 556 features, batch {BATCH}", "medium", 556, "train", 5),
    "published": (f"published size: sample, {STEPS} steps, 556 features, batch 1", "published", 556, "sample", 5),
}


def main() -> None:
    """Measure the chosen figures, print the table, write it with the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lerobot", type=Path, required=True, help="folder that LeRobot 0.5.1 was installed to")
    parser.add_argument("--only", nargs="+", choices=[*FIGURES, "roofline"], default=[*FIGURES, "roofline"])
    parser.add_argument("--rounds", type=int, help="of every figure; by default enough for a steady median")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    described = machine(PACKAGES) | {"threads": str(THREADS)}
    if "roofline" in arguments.only:
        print(roofline_of_all())
    theirs = lerobot_head(arguments.lerobot)
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in FIGURES if name in arguments.only):
            title, size, tokens, call, rounds = FIGURES[name]
            ours, peer = build(size, tokens, theirs, Path(folder))
            for checked in ("sample", "loss") if call == "train" else ("sample",):
                require_equal(f"{name}, {checked}", getattr(ours, checked)(), getattr(peer, checked)(), 1e-4)
            for side in (ours, peer):
                side.head.train(call == "train")
            comparison = alternate(
                title, getattr(ours, call), getattr(peer, call), arguments.rounds or rounds, warmup=1
            )
            print(comparison.row(), flush=True)
            comparisons.append(comparison)
    write(arguments.output, "gr00t", comparisons, described, "LeRobot 0.5.1")
    print("\n" + report(comparisons, described, "LeRobot 0.5.1"))


if __name__ == "__main__":
    main()
