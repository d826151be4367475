"""π0 beside LeRobot's and transformers' own: the same weights, inputs and noise, measured in turn.

    python benchmarks/pi0.py --lerobot-python PATH --output outputs/benchmarks

A medium size that fits two CPU cores: PaliGemma of 6 layers and width 512, an expert of width 256, two cameras of
224×224, 48 words, 50 actions, 10 denoising steps. LeRobot's π0 runs in an interpreter of its own (`pi0_lerobot.py`),
because no version of transformers serves both; the processes wait for each other. `--only` chooses figures, `--rounds`
how often each is repeated. benchmarks/README.md says what has to be installed and what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timing import Comparison, compare, machine, report, require_equal, seconds_of, trainer_optimizer, write
from torch.utils.flop_counter import FlopCounterMode
from transformers import PI0Config, PI0ForConditionalGeneration

from manipulators import PI0Policy, PI0PolicyConfig
from manipulators.conversion.pi0 import rename_pi0_weights
from manipulators.conversion.published import load_published
from manipulators.modeling.stages import observed_stages

THREADS = 2
CAMERAS, WIDTH, BATCH = 2, 32, 2
VOCABULARY = 2048
LAYERS = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64}
TEXT = LAYERS | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": VOCABULARY}
EXPERT = LAYERS | {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": VOCABULARY}
# LeRobot writes the feed-forward width of the published vision tower, 4304, into whatever config it is given.
VISION = {
    "hidden_size": 384,
    "intermediate_size": 4304,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}
LEARNING_RATE, CLIP = 2.5e-5, 1.0
PACKAGES = ["torch", "transformers"]


class Ours:
    """This library's π0."""

    def __init__(self, folder: Path, inputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]):
        self.network = load_published(PI0Policy(config()), weights)
        self.inputs, self.observation = inputs, {n: inputs[n][:1] for n in OBSERVED}
        self.optimizer = trainer_optimizer(self.network, folder, LEARNING_RATE)

    def sample(self) -> torch.Tensor:
        """Return a chunk (1, h, a) for one observation: pictures, prefix and ten denoising steps."""
        return self.network.eval().predict_action_chunk(**self.observation, noise=self.inputs["noise"][:1])

    def loss(self) -> torch.Tensor:
        """Return the loss of a batch."""
        return self.network.train()(**self.inputs).loss

    def train(self) -> None:
        """Take a step on a batch: forward, backward, clipping, optimizer."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Native(Ours):
    """transformers' own π0, with the weights of ours; trained by the Trainer that ours extends."""

    def __init__(self, folder: Path, inputs: dict[str, torch.Tensor], ours: Ours):
        vlm = {
            "text_config": {"model_type": "gemma"} | TEXT,
            "vision_config": {"model_type": "siglip_vision_model"} | VISION,
            "projection_dim": TEXT["hidden_size"],
            "image_token_id": VOCABULARY - 1,
        }
        self.network = PI0ForConditionalGeneration(
            PI0Config(vlm_config=vlm, dit_config={"model_type": "gemma"} | EXPERT)
        )
        weights = ours.network.state_dict()
        renamed = {name: next(iter(rename_pi0_weights({name: None})), None) for name in self.network.state_dict()}
        self.network.load_state_dict({theirs: weights[name] for theirs, name in renamed.items() if name}, strict=False)
        self.inputs, self.observation = (
            with_image_tokens(inputs),
            with_image_tokens({n: inputs[n][:1] for n in OBSERVED}),
        )
        self.optimizer = trainer_optimizer(self.network, folder, LEARNING_RATE)

    def sample(self) -> torch.Tensor:
        """Return a chunk (1, h, a) for one observation; it changes the noise that it is given."""
        return self.network.eval().sample_actions(**self.observation, noise=self.inputs["noise"][:1].clone())

    def loss(self) -> torch.Tensor:
        """Return the loss of a batch."""
        return self.network.train()(**self.inputs).loss


class LeRobot:
    """LeRobot's π0 in its own interpreter: asked in a line, it answers with its seconds."""

    def __init__(self, folder: Path, python: str):
        self.folder = folder
        command = [python, str(Path(__file__).with_name("pi0_lerobot.py")), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"LeRobot's π0 did not start: {' '.join(command)}")

    def seconds(self, call: str) -> float:
        """Run a call there and return its seconds."""
        self.process.stdin.write(f"{call}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def result(self, call: str) -> torch.Tensor:
        """Run a call there and return what it gives."""
        self.seconds(call)
        return load_file(self.folder / f"{call}.safetensors")["result"]


OBSERVED = ("pixel_values", "input_ids", "attention_mask", "state")


def config() -> PI0PolicyConfig:
    """Return our config at the medium size."""
    return PI0PolicyConfig(
        input_features={
            **{f"observation.images.{i}": {"type": "VISUAL", "shape": (3, 224, 224)} for i in range(CAMERAS)},
            "observation.state": {"type": "STATE", "shape": (WIDTH,)},
        },
        output_features={"action": {"type": "ACTION", "shape": (WIDTH,)}},
        paligemma_config={"projection_dim": TEXT["hidden_size"], "text_config": TEXT, "vision_config": VISION},
        gemma_expert_config=EXPERT,
    )


def with_image_tokens(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs as transformers' network takes them: a token of the prompt per token of a picture."""
    b = len(inputs["state"])
    pictures = torch.full((b, CAMERAS * 256), VOCABULARY - 1)
    given = {name: inputs[name] for name in ("pixel_values", "state", "actions", "noise") if name in inputs}
    return given | {
        "input_ids": torch.cat([pictures, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(pictures), inputs["attention_mask"]], dim=1),
        "pixel_attention_mask": torch.ones(b, CAMERAS, dtype=torch.bool),
        **({"timestep": inputs["time"]} if "time" in inputs else {}),
    }


def roofline(ours: Ours) -> str:
    """Say where a chunk's time goes: per stage what it takes, and what its arithmetic and its weights alone would."""
    seconds: dict[str, list[float]] = defaultdict(list)
    operations: dict[str, int] = defaultdict(int)

    def around(stage: str, call: Callable) -> Callable:
        def timed(*arguments: object, **named: object) -> object:
            if counting:
                with FlopCounterMode(display=False) as counter:
                    result = call(*arguments, **named)
                operations[stage] += counter.get_total_flops()
                return result
            start = time.perf_counter()
            result = call(*arguments, **named)
            seconds[stage].append(time.perf_counter() - start)
            return result

        return timed

    with observed_stages(ours.network.eval(), around):
        for counting in (True, False, False, False, False, False):  # noqa: B007  (read by `timed`)
            ours.sample()
    backbone = ours.network.model.paligemma_with_expert
    layers = [(layer.language_model, layer.gemma_expert) for layer in backbone.layers]
    read = {
        "vision": [backbone.vision_tower, backbone.multi_modal_projector],
        "prefix": [module for pair in layers for module in pair],
        "denoise": [expert for _, expert in layers],
    }
    matrix = torch.ones(2048, 2048)
    arithmetic = 2 * 2048**3 / min(seconds_of(lambda: matrix @ matrix) for _ in range(5))
    memory = torch.ones(2**28)  # 1 GiB: larger than any cache
    bandwidth = memory.nbytes / min(seconds_of(memory.sum) for _ in range(5))
    lines = [
        f"This machine multiplies matrices at {arithmetic / 1e9:.0f} GFLOP/s and reads {bandwidth / 1e9:.1f} GB/s.",
        "",
        "| stage | calls | measured [ms] | its products alone [ms] | its weights read once per call [ms] |",
        "|---|---|---|---|---|",
    ]
    for stage, times in seconds.items():
        calls = len(times) // 5
        chunk = 1000 * calls * float(np.median(times))
        weights = calls * sum(weight.nbytes for module in read[stage] for weight in module.parameters())
        lines.append(
            f"| {stage} | {calls} | {chunk:.0f} | {1000 * operations[stage] / arithmetic:.0f} "
            f"| {1000 * weights / bandwidth:.0f} |"
        )
    return "\n".join(lines) + "\n"


FIGURES = {"sample": ("sample a chunk of 50, batch 1", 20), "train": (f"train step, batch {BATCH}", 10)}


def main() -> None:
    """Measure the chosen figures, print the table, write it with the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lerobot-python", required=True, help="interpreter that has lerobot with its transformers")
    parser.add_argument("--only", nargs="+", choices=[*FIGURES, "roofline"], default=[*FIGURES, "roofline"])
    parser.add_argument("--rounds", type=int, help="of every figure; by default enough for a steady median")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    described = machine(PACKAGES) | {"threads": str(THREADS)}
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = config().example_inputs(BATCH) | config().example_draws(BATCH, training=True)
        inputs["input_ids"] = inputs["input_ids"] % (VOCABULARY - 1)  # the last one stands for pictures
        sizes = {"text": TEXT, "expert": EXPERT, "vision": VISION, "threads": THREADS}
        (folder / "sizes.json").write_text(json.dumps(sizes))
        save_file(inputs, folder / "inputs.safetensors")
        lerobot = LeRobot(folder, arguments.lerobot_python)
        published = load_file(folder / "weights.safetensors")
        ours = Ours(folder, inputs, {f"model.{name}": weight for name, weight in published.items()})
        native = Native(folder, inputs, ours)
        for call in ("sample", "loss"):
            for peer, theirs in (("LeRobot", lerobot.result(call)), ("transformers", getattr(native, call)())):
                require_equal(f"{call} beside {peer}", getattr(ours, call)(), theirs, 1e-3)
        if "roofline" in arguments.only:
            print(roofline(ours))
        for call in (call for call in arguments.only if call != "roofline"):
            title, rounds = FIGURES[call]
            peers: dict[str, Callable[[], float]] = {
                "LeRobot": lambda call=call: lerobot.seconds(call),
                "transformers": lambda call=call: seconds_of(getattr(native, call)),
            }
            for peer, theirs in peers.items():
                comparison = compare(
                    f"{title}, beside {peer}",
                    lambda call=call: seconds_of(getattr(ours, call)),
                    theirs,
                    arguments.rounds or rounds,
                )
                print(comparison.row(), flush=True)
                comparisons.append(comparison)
    write(arguments.output, "pi0", comparisons, described, "the peer")
    print("\n" + report(comparisons, described, "the peer"))


if __name__ == "__main__":
    main()
