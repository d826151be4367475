"""π0 beside LeRobot's and transformers' own, π0.5 beside LeRobot's: the same weights, inputs and noise, in turn.

    python benchmarks/pi0.py --lerobot-python PATH --output outputs/benchmarks
    python benchmarks/pi0.py --lerobot-python PATH --policy pi05

A medium size that fits two CPU cores: PaliGemma of 6 layers and width 512, an expert of width 256, two cameras of
224×224, 48 words (π0.5: 200), 50 actions, 10 denoising steps. LeRobot's runs in an interpreter of its own
(`pi0_lerobot.py`), because no version of transformers serves both; the processes wait for each other. `--only` chooses
figures, `--rounds` how often each is repeated. benchmarks/README.md says what has to be installed and what they mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from networks import EXPERT, OBSERVED, TEXT, VISION, VOCABULARY, native_pi0, native_pi0_inputs, pi0_config, pi0_inputs
from roofline import roofline
from safetensors.torch import load_file, save_file
from timing import Comparison, compare, machine, report, require_equal, seconds_of, trainer_optimizer, write

from manipulators import PI0Policy, PI0PolicyConfig, PI05Policy, PI05PolicyConfig
from manipulators.conversion.published import load_published

THREADS = 2
CAMERAS, BATCH = 2, 2
LEARNING_RATE, CLIP = 2.5e-5, 1.0
PACKAGES = ["torch", "transformers"]
POLICIES = {"pi0": (PI0PolicyConfig, PI0Policy), "pi05": (PI05PolicyConfig, PI05Policy)}


class Ours:
    """This library's policy."""

    def __init__(
        self, policy: PI0Policy, folder: Path, inputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
    ):
        self.network = load_published(policy, weights)
        self.sampler = self.network
        self.inputs, self.observation = inputs, {n: inputs[n][:1] for n in OBSERVED}
        self.optimizer = trainer_optimizer(self.network, folder, LEARNING_RATE)

    def sample(self) -> torch.Tensor:
        """Return a chunk (1, h, a) for one observation: pictures, prefix and ten denoising steps."""
        return self.sampler.eval().predict_action_chunk(**self.observation, noise=self.inputs["noise"][:1])

    def loss(self) -> torch.Tensor:
        """Return the loss of a batch."""
        return self.network.train()(**self.inputs).loss

    def train(self) -> None:
        """Take a step on a batch: forward, backward, clipping, optimizer."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def compile(self) -> None:
        """Compile the stages of sampling, of a copy: the network is still to be trained."""
        self.sampler = copy.deepcopy(self.network).eval().compile(inputs=self.observation)


class Native(Ours):
    """transformers' own π0, with the weights of ours; trained by the Trainer that ours extends."""

    def __init__(self, folder: Path, inputs: dict[str, torch.Tensor], ours: Ours):
        self.network = native_pi0(ours.network)
        self.inputs = native_pi0_inputs(inputs, VOCABULARY - 1)
        self.observation = native_pi0_inputs({n: inputs[n][:1] for n in OBSERVED}, VOCABULARY - 1)
        self.optimizer = trainer_optimizer(self.network, folder, LEARNING_RATE)

    def sample(self) -> torch.Tensor:
        """Return a chunk (1, h, a) for one observation; it changes the noise that it is given."""
        return self.network.eval().sample_actions(**self.observation, noise=self.inputs["noise"][:1].clone())

    def compile(self) -> None:
        """Compile the whole of sampling."""
        self.network.sample_actions = torch.compile(self.network.sample_actions, fullgraph=True)


class LeRobot:
    """LeRobot's policy in its own interpreter: asked in a line, it answers with its seconds."""

    def __init__(self, folder: Path, python: str):
        self.folder = folder
        command = [python, str(Path(__file__).with_name("pi0_lerobot.py")), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"LeRobot's policy did not start: {' '.join(command)}")

    def compile(self) -> None:
        """Compile the whole of sampling."""
        self.seconds("compile")

    def seconds(self, call: str) -> float:
        """Run a call there and return its seconds."""
        self.process.stdin.write(f"{call}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def result(self, call: str) -> torch.Tensor:
        """Run a call there and return what it gives."""
        self.seconds(call)
        return load_file(self.folder / f"{call}.safetensors")["result"]


def reads(network: PI0Policy) -> dict[str, list[torch.nn.Module]]:
    """Return what each stage reads of the weights."""
    backbone = network.model.paligemma_with_expert
    return {
        "vision": [backbone.vision_tower, backbone.multi_modal_projector],
        "prefix": list(backbone.layers),
        "denoise": [layer.gemma_expert for layer in backbone.layers],
    }


# What is called, and how often. Training comes last: from then on the three have different weights.
FIGURES = {
    "sample": ("sample a chunk of 50, batch 1", "sample", 20),
    "compiled": ("the same chunk, all compiled", "sample", 20),
    "train": (f"train step, batch {BATCH}", "train", 10),
}


def main() -> None:
    """Measure the chosen figures, print the table, write it with the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lerobot-python", required=True, help="interpreter that has lerobot with its transformers")
    parser.add_argument("--policy", choices=POLICIES, default="pi0")
    parser.add_argument("--only", nargs="+", choices=[*FIGURES, "roofline"], default=[*FIGURES, "roofline"])
    parser.add_argument("--rounds", type=int, help="of every figure; by default enough for a steady median")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    described = machine(PACKAGES) | {"threads": str(THREADS)}
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config_class, policy_class = POLICIES[arguments.policy]
        config = pi0_config("medium", CAMERAS, config_class)
        inputs = pi0_inputs(config, BATCH, training=True)
        sizes = {"policy": arguments.policy, "text": TEXT, "expert": EXPERT, "vision": VISION, "threads": THREADS}
        (folder / "sizes.json").write_text(json.dumps(sizes))
        save_file(inputs, folder / "inputs.safetensors")
        lerobot = LeRobot(folder, arguments.lerobot_python)
        published = load_file(folder / "weights.safetensors")
        ours = Ours(
            policy_class(config), folder, inputs, {f"model.{name}": weight for name, weight in published.items()}
        )
        natives = [Native(folder, inputs, ours)] if arguments.policy == "pi0" else []  # which has no π0.5
        for call in ("sample", "loss"):
            require_equal(f"{call} beside LeRobot", getattr(ours, call)(), lerobot.result(call), 1e-3)
            for native in natives:
                require_equal(f"{call} beside transformers", getattr(ours, call)(), getattr(native, call)(), 1e-3)
        if "roofline" in arguments.only:
            print(roofline(ours.network.eval(), ours.sample, reads(ours.network)))
        for name in (name for name in FIGURES if name in arguments.only):
            title, call, rounds = FIGURES[name]
            if name == "compiled":
                for side in (ours, *natives, lerobot):
                    side.compile()
                require_equal("compiled, beside LeRobot", ours.sample(), lerobot.result("sample"), 1e-3)
                for native in natives:
                    require_equal("compiled, beside transformers", ours.sample(), native.sample(), 1e-3)
            peers: dict[str, Callable[[], float]] = {
                "LeRobot": lambda call=call: lerobot.seconds(call),
            }
            for native in natives:
                peers["transformers"] = lambda call=call, native=native: seconds_of(getattr(native, call))
            for peer, theirs in peers.items():
                comparison = compare(
                    f"{title}, beside {peer}",
                    lambda call=call: seconds_of(getattr(ours, call)),
                    theirs,
                    arguments.rounds or rounds,
                )
                print(comparison.row(), flush=True)
                comparisons.append(comparison)
    write(arguments.output, arguments.policy, comparisons, described, "the peer")
    print("\n" + report(comparisons, described, "the peer"))


if __name__ == "__main__":
    main()
