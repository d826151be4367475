"""Training on a GPU: the memory and the rate of the recipes at real size, and steps of the smaller policies."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_equality import TASK, moved, processor_of
from gpu_rows import Row, Suite
from gpu_speed import build, in_parts_float32
from networks import act_config, diffusion_config, gr00t_config, gr00t_n1_config, pi0_config
from timing import seconds_of, trainer_optimizer
from torch.utils.data import Dataset
from transformers import TrainerCallback

from manipulators import LeRobotDataset, LeRobotWriter, PI05PolicyConfig, PolicyTrainer, PolicyTrainingArguments
from manipulators.modeling.policy import PolicyModel
from manipulators.training.runs.recipe import available_recipes, load_recipe
from manipulators.training.tuning import parameter_table

CAMERAS = 3
EPISODES, FRAMES = 8, 40  # of recorded demonstrations, at published size
DISTINCT = 8  # samples; more would only fill the host's memory
UNTIMED = 2  # steps in which kernels are chosen and the optimizer's moments come into being
CONFIGS = {
    "pi0_policy": pi0_config,
    "pi05_policy": partial(pi0_config, config_class=PI05PolicyConfig),
    "gr00t_n1_5": gr00t_config,
    "gr00t_n1": gr00t_n1_config,
}


class Samples(Dataset):
    """Random samples in memory, under the names and of the types that `LeRobotDataset` gives them.

    Args:
        config: of the policy.
        length: after which they come to an end; few of them are distinct.
    """

    def __init__(self, config: Any, length: int):
        self.length = length
        generator = torch.Generator().manual_seed(0)
        inputs = config.input_features
        self.samples = [
            {
                name: torch.randint(0, 256, feature.shape, dtype=torch.uint8, generator=generator)
                if name in config.image_features
                else torch.randn(feature.shape, generator=generator)
                for name, feature in inputs.items()
            }
            | {
                "action": torch.randn(config.action_horizon, config.robot_action_dim, generator=generator),
                "action_is_pad": torch.zeros(config.action_horizon, dtype=torch.bool),
                "task": TASK,
            }
            for _ in range(DISTINCT)
        ]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index % DISTINCT]


def demonstrations(suite: Suite, config: Any) -> LeRobotDataset:
    """Return recorded episodes of noise, on video as demonstrations are, read as a training reads them."""
    cameras = list(config.image_features)
    features = {
        name: {"dtype": "video", "shape": [*feature.shape[1:], 3]}
        if name in cameras
        else {"dtype": "float32", "shape": list(feature.shape)}
        for name, feature in config.input_features.items()
    } | {"action": {"dtype": "float32", "shape": [config.robot_action_dim]}}
    folder = suite.folder / hashlib.sha256(json.dumps(features).encode()).hexdigest()[:8]
    if not folder.exists():
        generator, frames = np.random.default_rng(0), FRAMES if suite.is_real else 4
        with LeRobotWriter(folder, 10, features) as writer:
            for _ in range(EPISODES):
                for _ in range(frames):
                    frame = {
                        name: coarse_noise(generator, *feature["shape"][:2])
                        if name in cameras
                        else generator.normal(size=feature["shape"]).astype(np.float32)
                        for name, feature in features.items()
                    }
                    writer.add_frame(frame, task=TASK)
                writer.end_episode()
    return LeRobotDataset(folder, action_horizon=config.action_horizon)


def coarse_noise(generator: np.random.Generator, height: int, width: int, block: int = 14) -> np.ndarray:
    """Return a picture (h, w, 3) of coloured blocks: a video of independent pixels would be larger than real ones."""
    colours = generator.integers(0, 256, (-(-height // block), -(-width // block), 3), dtype=np.uint8)
    return colours.repeat(block, axis=0).repeat(block, axis=1)[:height, :width]


class Clock(TrainerCallback):
    """Note when each optimizer step ended, the device waited for, and end training when the time is used up.

    Args:
        wait: for the device.
        ends: in the seconds of `time.monotonic`.
    """

    def __init__(self, wait: Callable[[], object], ends: float):
        self.wait, self.ends, self.times = wait, ends, [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        self.wait()
        self.times.append(time.perf_counter())
        longest = max(after - before for before, after in zip(self.times, self.times[1:], strict=False))
        control.should_training_stop |= time.monotonic() + 1.5 * longest > self.ends


def recipe(suite: Suite, name: str, recorded: bool = False) -> dict[str, Any]:
    """Train by a recipe for some steps, from random weights, and say what it took.

    Args:
        suite: where and how.
        name: of the recipe.
        recorded: whether samples are read from recorded episodes, by the recipe's workers, and not random in memory.
    """
    chosen, before = load_recipe(name), memory_of(suite)
    own: dict[str, Any] = {"max_steps": suite.steps, "save_strategy": "no"}
    if not (recorded and suite.is_real):
        own["dataloader_num_workers"] = 0
    if not suite.is_real:
        own |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "use_cpu": not suite.on_gpu}
    arguments = PolicyTrainingArguments(
        str(suite.folder / name), disable_tqdm=True, logging_steps=5, **(chosen.training | own)
    )
    config = CONFIGS[chosen.policy](suite.size, CAMERAS)
    dtype = getattr(torch, chosen.dtype)
    policy = build(config, suite, dtype)
    if dtype == torch.bfloat16:
        policy = in_parts_float32(policy)
    policy.freeze_parts()
    policy.config._name_or_path = chosen.base  # of an adapter's base; nothing is read from there
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    clock = Clock(torch.cuda.synchronize if suite.on_gpu else lambda: None, suite.row_ends)
    samples = demonstrations(suite, config) if recorded else Samples(config, batch * suite.steps)
    trainer = PolicyTrainer(policy, arguments, processor_of(config), train_dataset=samples, callbacks=[clock])
    table = parameter_table(policy)
    result = trainer.train()
    times = clock.times[UNTIMED if len(clock.times) > UNTIMED + 1 else 0 :]
    waits = [entry["data_wait"] for entry in trainer.state.log_history if "data_wait" in entry]
    numbers = {"samples/s": batch * (len(times) - 1) / (times[-1] - times[0]), "samples a step": batch}
    return (
        numbers
        | {
            "steps": trainer.state.global_step,
            "loss": float(result.training_loss),
            "ok": bool(torch.isfinite(torch.tensor(result.training_loss))),
            "step ends [s]": clock.times,
            "trained": {"table": table},
        }
        | ({"data wait": waits[-1]} if recorded and waits else {})
        | peak_beyond(suite, before)
    )


def memory_of(suite: Suite) -> tuple[int, int]:
    """Return the bytes that are allocated on the device, and those that the allocator holds."""
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if suite.on_gpu else (0, 0)


def peak_beyond(suite: Suite, before: tuple[int, int]) -> dict[str, float]:
    """Return the most memory beyond what was there before: of tensors, and with what the allocator keeps for later."""
    if not suite.on_gpu:
        return {}
    return {
        "peak [GB]": (torch.cuda.max_memory_allocated() - before[0]) / 1e9,
        "reserved [GB]": (torch.cuda.max_memory_reserved() - before[1]) / 1e9,
    }


def train_step(suite: Suite, config: Callable[[str], Any], batch: int) -> dict[str, Any]:
    """Time a step in float32: forward, backward, clipping, our trainer's optimizer; no data loading."""
    before = memory_of(suite)
    policy: PolicyModel = build(config(suite.size), suite, torch.float32).train()
    inputs = moved(policy.config.example_inputs(batch), suite.device)
    optimizer = trainer_optimizer(policy, suite.folder, 1e-4)

    def step() -> None:
        policy(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3 if suite.on_gpu else 1):
        step()
    seconds = [seconds_of(step) for _ in range(min(suite.rounds, 15))]
    median = sorted(seconds)[len(seconds) // 2]
    return {"step [ms]": 1000 * median, "samples/s": batch / median, "steps [s]": seconds} | peak_beyond(suite, before)


# --- rows -------------------------------------------------------------------------------------------------


def recipe_row(name: str, seconds: float) -> Row:
    """Return the row of a recipe."""
    return Row(f"train {name}", seconds, partial(recipe, name=name))


def training_rows() -> list[Row]:
    """Return the recipes for 24 GB."""
    return [recipe_row("pi0_lora_24gb", 50), recipe_row("gr00t_n1_5_lora_24gb", 40)]


def recorded_recipe_rows() -> list[Row]:
    """Return all recipes for 24 GB on recorded demonstrations."""
    names = [name for name in available_recipes() if name.endswith("_24gb")]
    return [Row(f"recipe {name}", 70, partial(recipe, name=name, recorded=True)) for name in names]


def further_training_rows() -> list[Row]:
    """Return the other recipe of N1.5, that of N1, and steps of the smaller policies."""
    diffusion = partial(diffusion_config, scheduler="DDPM", steps=100)
    return [
        recipe_row("gr00t_n1_5_head_only", 40),
        Row("ACT, train step, batch 8", 6, partial(train_step, config=act_config, batch=8)),
        Row("Diffusion, train step, batch 64", 8, partial(train_step, config=diffusion, batch=64)),
        recipe_row("gr00t_n1_lora_24gb", 40),
    ]
