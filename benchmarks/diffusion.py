"""Diffusion Policy beside LeRobot's: the same weights, inputs and noise, interpreter and torch, measured in turn.

    python benchmarks/diffusion.py --output outputs/benchmarks

Prints a Markdown table and writes it with every single measurement; `--only` chooses figures, `--rounds` how
often each is repeated. benchmarks/README.md says what has to be installed and what the figures mean.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig as TheirConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as TheirPolicy
from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors
from roofline import machine_rates
from timing import Comparison, alternate, machine, report, require_equal, seconds_of, trainer_optimizer, write

from manipulators import AutoPolicy, DiffusionPolicy

THREADS = 2
CAMERA, STATE, ACTION = "observation.image", "observation.state", "action"
SIDE, WIDTH = 96, 2  # PushT: one picture, a pusher's position in the plane
BATCH = 8
PACKAGES = ["torch", "transformers", "diffusers", "lerobot", "numpy"]


class Workbench:
    """Everything the figures share: one policy in both libraries, inputs, noise."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def checkpoint(self) -> Path:
        """Random weights at the size of LeRobot's published PushT policy, as LeRobot saves them."""
        torch.manual_seed(0)
        config = TheirConfig(
            input_features={
                CAMERA: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)),
                STATE: PolicyFeature(FeatureType.STATE, (WIDTH,)),
            },
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (WIDTH,))},
            horizon=16,
            n_action_steps=8,
            crop_shape=(84, 84),
            use_group_norm=True,
            pretrained_backbone_weights=None,
            use_separate_rgb_encoder_per_camera=False,
            device="cpu",
            push_to_hub=False,
        )
        widths = {CAMERA: (3, 1, 1), STATE: (WIDTH,), ACTION: (WIDTH,)}
        names = ("mean", "std", "min", "max")
        statistics = {n: {k: torch.rand(s) + i for i, k in enumerate(names)} for n, s in widths.items()}
        folder = self.folder / "lerobot"
        for part in (TheirPolicy(config), *make_diffusion_pre_post_processors(config, statistics)):
            part.save_pretrained(folder)
        return folder

    def policies(self, sampler: str, steps: int) -> tuple[DiffusionPolicy, TheirPolicy]:
        """Return both, with the same weights and sampler."""
        theirs = TheirPolicy.from_pretrained(self.checkpoint).eval()
        config = theirs.config
        config.noise_scheduler_type, config.num_inference_steps = sampler, steps
        sampling = TheirPolicy(config).eval()
        sampling.load_state_dict(theirs.state_dict())
        ours = AutoPolicy.from_pretrained(self.checkpoint, noise_scheduler_type=sampler, num_inference_steps=steps)
        return ours, sampling


def observation(batch: int) -> tuple[dict, dict]:
    """Return the same processed observation for ours and for theirs."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 2, 1, 3, SIDE, SIDE, generator=generator)
    state = torch.randn(batch, 2, WIDTH, generator=generator)
    return {"pixel_values": pixels, "state": state}, {"observation.images": pixels, STATE: state}


# --- figures ----------------------------------------------------------------------------------------------


def sample(bench: Workbench, rounds: int, sampler: str, steps: int) -> Iterator[Comparison]:
    """A chunk for one observation: encoders and all denoising steps, processors left out."""
    ours, theirs = bench.policies(sampler, steps)
    inputs, batch = observation(1)

    def our_chunk() -> torch.Tensor:
        torch.manual_seed(0)  # both draw the start and, for DDPM, the noise of every step
        return ours.predict_action_chunk(**inputs)

    def their_chunk() -> torch.Tensor:
        torch.manual_seed(0)
        with torch.inference_mode():
            return theirs.diffusion.generate_actions(batch)

    require_equal(sampler, our_chunk(), their_chunk(), 1e-4)
    yield alternate(f"{sampler}, {steps} steps, batch 1", our_chunk, their_chunk, rounds, warmup=1)


def train(bench: Workbench, rounds: int) -> Iterator[Comparison]:
    """One step on a batch: forward, backward, clipping, each library's own optimizer; data loading left out."""
    ours, theirs = (policy.train() for policy in bench.policies("DDPM", 100))
    inputs, batch = observation(BATCH)
    actions, is_pad = torch.randn(BATCH, 16, WIDTH), torch.zeros(BATCH, 16, dtype=torch.bool)
    inputs |= {"actions": actions, "action_is_pad": is_pad}
    batch |= {ACTION: actions, "action_is_pad": is_pad}
    preset = theirs.config.get_optimizer_preset()
    their_optimizer = preset.build(theirs.get_optim_params())
    our_optimizer = trainer_optimizer(ours, bench.folder, preset.lr)

    def our_step() -> None:
        ours(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), preset.grad_clip_norm)
        our_optimizer.step()
        our_optimizer.zero_grad()

    def their_step() -> None:
        theirs.diffusion.compute_loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), preset.grad_clip_norm)
        their_optimizer.step()
        their_optimizer.zero_grad()

    yield alternate(f"train step, batch {BATCH}", our_step, their_step, rounds, warmup=1)


def floor(bench: Workbench) -> str:
    """Say where a denoising step's time goes: the weights it reads, and what this machine reads per second."""
    ours, _ = bench.policies("DDIM", 10)
    inputs, _ = observation(1)
    head = ours.diffusion
    size = sum(weight.nbytes for weight in head.unet.parameters())
    _, bandwidth = machine_rates()
    with torch.inference_mode():
        condition = head.encode_observation(**inputs)
        encoder = min(seconds_of(lambda: head.encode_observation(**inputs)) for _ in range(5))
        noise = torch.zeros(1, 16, WIDTH)
        step = min(seconds_of(lambda: head.sample(condition, noise)) for _ in range(5)) / 10
        exact = ours.predict_action_chunk(**inputs, noise=noise)
        half = ours.to(torch.bfloat16)
        halved = {name: value.bfloat16() for name, value in inputs.items()}
        condition = head.encode_observation(**halved)
        half_step = min(seconds_of(lambda: head.sample(condition, noise)) for _ in range(5)) / 10
        error = (half.predict_action_chunk(**halved, noise=noise).float() - exact).abs().max().item()
    return (
        f"One denoising step (DDIM, batch 1): {1000 * step:.0f} ms in float32. Its U-Net's weights are "
        f"{size / 1e9:.2f} GB, which this machine reads in {1000 * size / bandwidth:.0f} ms "
        f"({bandwidth / 1e9:.1f} GB/s); in bfloat16 a step takes {1000 * half_step:.0f} ms, and the chunk differs by "
        f"at most {error:.3f} of the range [-1, 1] of normalised actions. Encoding the observation: "
        f"{1000 * encoder:.0f} ms, once per chunk.\n"
    )


FIGURES = {
    "ddim": (lambda bench, rounds: sample(bench, rounds, "DDIM", 10), 15),
    "ddpm": (lambda bench, rounds: sample(bench, rounds, "DDPM", 100), 5),
    "train": (train, 7),
}


def main() -> None:
    """Measure the chosen figures, print the table, write it with the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*FIGURES, "floor"], default=[*FIGURES, "floor"])
    parser.add_argument("--rounds", type=int, help="of every figure; by default enough for a steady median")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    described = machine(PACKAGES) | {"threads": str(THREADS)}
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(Path(folder))
        for name in arguments.only:
            if name == "floor":
                continue
            measure, rounds = FIGURES[name]
            for comparison in measure(bench, arguments.rounds or rounds):
                print(comparison.row(), flush=True)
                comparisons.append(comparison)
        if "floor" in arguments.only:
            print("\n" + floor(bench))
    peer = f"LeRobot {described['lerobot']}"
    write(arguments.output, "diffusion", comparisons, described, peer)
    print("\n" + report(comparisons, described, peer))


if __name__ == "__main__":
    main()
