"""ACT beside LeRobot's ACT: the same weights, inputs, interpreter and torch, measured in turn.

    python benchmarks/act.py --output outputs/benchmarks

Prints a Markdown table and writes it with every single measurement; `--only` chooses figures, `--rounds` how
often each is repeated. benchmarks/README.md says what has to be installed and what the figures mean.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset as TheirDataset
from lerobot.policies.act.configuration_act import ACTConfig as TheirConfig
from lerobot.policies.act.modeling_act import ACTPolicy as TheirPolicy
from lerobot.policies.act.processor_act import make_act_pre_post_processors
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.utils.import_utils import get_safe_default_video_backend
from timing import (
    Comparison,
    alternate,
    alternate_processes,
    machine,
    report,
    require_equal,
    trainer_optimizer,
    write,
)
from torch.utils.data import DataLoader

from manipulators import AutoPolicy, LeRobotDataset, LeRobotWriter, PolicyPipeline

THREADS = 2
CAMERA, STATE, ACTION = "observation.images.top", "observation.state", "action"
HEIGHT, WIDTH, JOINTS, CHUNK = 480, 640, 14, 100  # the published ALOHA policies'
BATCH = 8
FPS = 50
PACKAGES = ["torch", "transformers", "lerobot", "av", "numpy"]


class Workbench:
    """Everything the figures share: one policy in both libraries, an observation, a dataset."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.random = np.random.default_rng(0)

    @cached_property
    def checkpoints(self) -> tuple[Path, Path]:
        """One set of random weights as our checkpoint folder and as LeRobot's."""
        torch.manual_seed(0)
        config = TheirConfig(
            input_features={
                CAMERA: PolicyFeature(FeatureType.VISUAL, (3, HEIGHT, WIDTH)),
                STATE: PolicyFeature(FeatureType.STATE, (JOINTS,)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (JOINTS,))},
            pretrained_backbone_weights=None,
            device="cpu",
            push_to_hub=False,
        )
        shapes = {CAMERA: (3, 1, 1), STATE: (JOINTS,), ACTION: (JOINTS,)}
        statistics = {n: {"mean": torch.rand(s), "std": torch.rand(s) + 0.5} for n, s in shapes.items()}
        ours, theirs = self.folder / "ours", self.folder / "lerobot"
        for part in (TheirPolicy(config), *make_act_pre_post_processors(config, statistics)):
            part.save_pretrained(theirs)
        PolicyPipeline.from_pretrained(theirs, device="cpu").save_pretrained(ours)
        return ours, theirs

    @cached_property
    def pipeline(self) -> PolicyPipeline:
        """Ours."""
        return PolicyPipeline.from_pretrained(self.checkpoints[0], device="cpu")

    @cached_property
    def their_policy(self) -> TheirPolicy:
        """LeRobot's."""
        return TheirPolicy.from_pretrained(self.checkpoints[1]).eval()

    @cached_property
    def their_pipeline(self) -> Callable[[dict], torch.Tensor]:
        """LeRobot's policy between its two processors, as its robot loop calls them."""
        before, after = make_act_pre_post_processors(self.their_policy.config, self._their_statistics())

        @torch.inference_mode()
        def predict(observation: dict) -> torch.Tensor:
            prepared = prepare_observation_for_inference(dict(observation), torch.device("cpu"))
            return after(self.their_policy.predict_action_chunk(before(prepared)))

        return predict

    def _their_statistics(self) -> dict:
        return {n: {k: torch.tensor(v) for k, v in s.items()} for n, s in self.pipeline.processor.statistics.items()}

    @cached_property
    def observation(self) -> dict[str, np.ndarray]:
        """A raw observation: an image as cameras give it, and joint positions."""
        return {
            CAMERA: self.random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
            STATE: self.random.standard_normal(JOINTS).astype(np.float32),
        }

    @cached_property
    def dataset(self) -> Path:
        """Two episodes of 150 frames with one AV1 camera: a textured scene that drifts."""
        root = self.folder / "dataset"
        features = {
            CAMERA: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3]},
            STATE: {"dtype": "float32", "shape": [JOINTS]},
            ACTION: {"dtype": "float32", "shape": [JOINTS]},
        }
        coarse = torch.from_numpy(self.random.random((1, 3, 60, 120), dtype=np.float32))
        scene = torch.nn.functional.interpolate(coarse, size=(HEIGHT, 2 * WIDTH), mode="bicubic")[0]
        scene = (scene.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()  # (h, 2w, 3)
        with LeRobotWriter(root, FPS, features, codec="av1") as writer:
            for _ in range(2):
                for step in range(150):
                    joints = self.random.standard_normal(JOINTS).astype(np.float32)
                    image = scene[:, 2 * step : 2 * step + WIDTH]
                    writer.add_frame({CAMERA: image, STATE: joints, ACTION: joints}, task="drift")
                writer.end_episode()
        return root


# --- figures ----------------------------------------------------------------------------------------------


def predict(bench: Workbench, rounds: int) -> Iterator[Comparison]:
    """A chunk from one observation: the network alone, then everything between camera and robot."""
    inputs = bench.pipeline.processor(bench.observation)
    batch = {CAMERA: inputs["pixel_values"][:, 0].clone(), STATE: inputs["state"]}
    policy, theirs = bench.pipeline.policy, bench.their_policy

    def our_network() -> torch.Tensor:
        return policy.predict_action_chunk(**inputs)

    def their_network() -> torch.Tensor:
        return theirs.predict_action_chunk(batch)

    require_equal("predict", our_network(), their_network(), 2e-5)
    yield alternate("predict a chunk, network only, batch 1", our_network, their_network, rounds)

    def our_robot() -> torch.Tensor:
        return bench.pipeline.predict_chunk(bench.observation)

    def their_robot() -> torch.Tensor:
        return bench.their_pipeline(bench.observation)[0]

    require_equal("predict from raw", our_robot(), their_robot(), 5e-5)
    yield alternate("predict a chunk from a raw observation", our_robot, their_robot, rounds)


def train(bench: Workbench, rounds: int) -> Iterator[Comparison]:
    """One step on a batch: forward, backward, clipping, each library's own AdamW; data loading left out."""
    policy = AutoPolicy.from_pretrained(bench.checkpoints[0]).train()
    theirs = TheirPolicy.from_pretrained(bench.checkpoints[1]).train()
    inputs = policy.config.example_inputs(BATCH)
    batch = {
        CAMERA: inputs["pixel_values"][:, 0].clone(),
        STATE: inputs["state"],
        ACTION: inputs["actions"],
        "action_is_pad": inputs["action_is_pad"],
    }
    preset = theirs.config.get_optimizer_preset()
    their_optimizer = preset.build(theirs.get_optim_params())
    our_optimizer = trainer_optimizer(policy, bench.folder, preset.lr)

    def our_step() -> None:
        policy(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
        our_optimizer.step()
        our_optimizer.zero_grad()

    def their_step() -> None:
        theirs(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), preset.grad_clip_norm)
        their_optimizer.step()
        their_optimizer.zero_grad()

    yield alternate(f"train step, batch {BATCH}", our_step, their_step, rounds, warmup=1)


OBSERVATION = f"""
import time, numpy as np, torch
torch.set_num_threads({THREADS})
observation = {{
    {CAMERA!r}: np.random.default_rng(0).integers(0, 256, ({HEIGHT}, {WIDTH}, 3), dtype=np.uint8),
    {STATE!r}: np.zeros({JOINTS}, np.float32),
}}
"""

OUR_START = """
from manipulators import PolicyPipeline
start = time.perf_counter()
pipeline = PolicyPipeline.from_pretrained({folder!r}, device="cpu")
pipeline(observation)
print(time.perf_counter() - start)
"""

THEIR_START = """
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.utils.import_utils import get_safe_default_video_backend
start = time.perf_counter()
policy = ACTPolicy.from_pretrained({folder!r})
before, after = make_pre_post_processors(policy.config, {folder!r})
with torch.inference_mode():
    after(policy.select_action(before(prepare_observation_for_inference(observation, torch.device("cpu")))))
print(time.perf_counter() - start)
"""

IMPORT = "import time; start = time.perf_counter(); {line}; print(time.perf_counter() - start)"


def start(bench: Workbench, rounds: int) -> Iterator[Comparison]:
    """Fresh processes: import the library and take its policy; load a checkpoint folder and act once."""
    ours, theirs = map(str, bench.checkpoints)
    yield alternate_processes(
        "import and take ACTPolicy",
        IMPORT.format(line="import manipulators; manipulators.ACTPolicy"),
        IMPORT.format(line="from lerobot.policies.act.modeling_act import ACTPolicy"),
        rounds,
    )
    yield alternate_processes(
        "checkpoint folder to first action",
        OBSERVATION + OUR_START.format(folder=ours),
        OBSERVATION + THEIR_START.format(folder=theirs),
        rounds,
    )


def dataset(bench: Workbench, rounds: int) -> Iterator[Comparison]:
    """Random samples from AV1 video, in the main process; uint8 frames on both sides, as both train."""
    count = 32
    for history in (1, 4):
        ours = LeRobotDataset(bench.dataset, action_horizon=CHUNK, n_obs_steps=history)
        past = [step / FPS for step in range(1 - history, 1)]
        windows = {ACTION: [step / FPS for step in range(1 - history, 1 - history + CHUNK)]}
        windows |= {CAMERA: past, STATE: past} if history > 1 else {}
        theirs = TheirDataset("local/benchmark", root=bench.dataset, delta_timestamps=windows, return_uint8=True)
        for name in (CAMERA, STATE, ACTION):
            require_equal(f"dataset {name}", ours[7][name].float(), theirs[7][name].float(), 0)
        shuffled = bench.random.permutation(len(ours))[:count].tolist()
        label = "" if history == 1 else f", {history} observations each"
        yield alternate(
            f"random samples{label}",
            lambda ours=ours, indices=shuffled: [ours[i] for i in indices],
            lambda theirs=theirs, indices=shuffled: [theirs[i] for i in indices],
            rounds,
            warmup=1,
            items=count,
        )
        loaders = [DataLoader(side, batch_size=BATCH, sampler=shuffled) for side in (ours, theirs)]
        yield alternate(
            f"random batches of {BATCH} through a DataLoader{label}",
            lambda loader=loaders[0]: list(loader),
            lambda loader=loaders[1]: list(loader),
            rounds,
            warmup=1,
            items=count,
        )


FIGURES = {
    "predict": (predict, 30),
    "train": (train, 7),
    "start": (start, 7),
    "dataset": (dataset, 15),
}


def main() -> None:
    """Measure the chosen figures, print the table, write it with the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--rounds", type=int, help="of every figure; by default enough for a steady median")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    described = machine(PACKAGES) | {
        "threads": str(THREADS),
        "LeRobot's video decoder": get_safe_default_video_backend(),
    }
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(Path(folder))
        for name in arguments.only:
            measure, rounds = FIGURES[name]
            for comparison in measure(bench, arguments.rounds or rounds):
                print(comparison.row(), flush=True)
                comparisons.append(comparison)
    peer = f"LeRobot {described['lerobot']}"
    write(arguments.output, "act", comparisons, described, peer)
    print("\n" + report(comparisons, described, peer))


if __name__ == "__main__":
    main()
