"""What `kills.py` kills beside trainings: recordings, evaluations and conversions.

Each is a function of a folder that writes there, and is run again after a kill until it has finished. Episodes that it
called finished before the kill must be on the disk after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from manipulators import (
    ACTConfig,
    ACTPolicy,
    EnvironmentSpec,
    LeRobotWriter,
    PolicyProcessor,
    convert_dataset,
    evaluate,
    record_demonstrations,
    register_environment,
)
from manipulators._files import partial_path
from manipulators.cli import main as command_line
from manipulators.data.recording.place import count_kept_episodes
from manipulators.errors import OutputExistsError
from manipulators.evaluation.kept import KeptRollouts

CAMERA, STATE = "observation.images.top", "observation.state"
FEATURES = {
    CAMERA: {"dtype": "video", "shape": [32, 32, 3]},
    STATE: {"dtype": "float32", "shape": [1], "names": ["position"]},
    "action": {"dtype": "float32", "shape": [1], "names": ["velocity"]},
}
DATASET, RESULT, CHECKPOINT = "demonstrations", "evaluation.json", "checkpoint"
RECORDED, EVALUATED = 15, 60  # episodes


class Cart(gymnasium.Env):
    """A cart that must reach 5; one seed in seven breaks it, and one in five needs too long."""

    def __init__(self, task: str, horizon: int | None):
        self.environment_spec = EnvironmentSpec(f"cart/{task}", "Go right.", FEATURES, fps=10, horizon=horizon or 12)
        self.observation_space = gymnasium.spaces.Dict(
            {
                STATE: gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32),
                CAMERA: gymnasium.spaces.Box(0, 255, (32, 32, 3), np.uint8),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.seed, self.position, self.steps = seed, -9.0 if seed % 5 == 4 else self.np_random.random(), 0
        return self._observation(), {}

    def step(self, action: np.ndarray):
        self.position, self.steps = self.position + float(action[0]), self.steps + 1
        if self.seed % 7 == 6 and self.steps == 4:
            raise RuntimeError("the physics exploded")
        success = self.position >= 5
        return self._observation(), 1.0, success, False, {"success": success}

    def _observation(self) -> dict[str, np.ndarray]:
        picture = np.full((32, 32, 3), int(20 * max(self.position, 0)) % 256, np.uint8)
        return {STATE: np.array([self.position], np.float32), CAMERA: picture}


class Noisy:
    """A pipeline that goes right, faster or slower at random."""

    def reset(self) -> None:
        pass

    def __call__(self, observation: dict[str, np.ndarray], task: list[str]) -> torch.Tensor:
        return 0.4 + 0.6 * torch.rand(len(task), 1)


@dataclass(frozen=True)
class Run:
    """Say what is run in a folder, after `prepare`, and how many of its episodes are finished on the disk there."""

    run: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda folder: None
    finished: Callable[[Path], int] = lambda folder: 0


def watch(count: Callable[[int], None]) -> None:
    """Report how many episodes this process has finished, just after each."""

    def reporting(original: Callable, number: Callable[[Any], int]) -> Callable:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            count(number(self))

        return wrapped

    LeRobotWriter.end_episode = reporting(LeRobotWriter.end_episode, lambda writer: writer.num_episodes)
    KeptRollouts.keep = reporting(KeptRollouts.keep, lambda kept: len(kept.episodes))


def _record(folder: Path) -> None:
    with suppress(OutputExistsError):  # it was finished when it was killed
        record_demonstrations("cart/right", RECORDED, folder / DATASET, progress=False)


def _recorded(folder: Path) -> int:
    return RECORDED if (folder / DATASET).exists() else count_kept_episodes(folder / DATASET)


def _evaluate(folder: Path) -> None:
    evaluate(Noisy(), "cart/right", range(EVALUATED), num_envs=4, progress=False, output=folder / RESULT)


def _evaluated(folder: Path) -> int:
    path = partial_path(folder / RESULT)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["episodes"]
    return EVALUATED if (folder / RESULT).exists() else 0


def _prepare_checkpoint(folder: Path) -> None:
    config = ACTConfig(
        input_features={STATE: {"type": "STATE", "shape": [1]}},
        output_features={"action": {"type": "ACTION", "shape": [1]}},
        chunk_size=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=32,
        n_encoder_layers=1,
        use_vae=False,
    )
    torch.manual_seed(0)
    statistics = {name: {"mean": [0.0], "std": [1.0], "min": [-1.0], "max": [1.0]} for name in (STATE, "action")}
    ACTPolicy(config).save_pretrained(folder / "source")
    PolicyProcessor.from_config(config, statistics).save_pretrained(folder / "source")


def _convert(folder: Path) -> None:
    if not (folder / CHECKPOINT).exists() and command_line(
        ["convert", str(folder / "source"), str(folder / CHECKPOINT)]
    ):
        raise RuntimeError("the conversion failed")


def _convert_dataset(folder: Path) -> None:
    with suppress(OutputExistsError):
        convert_dataset(folder / "source", folder / DATASET, progress=False)


RUNS = {
    "record": Run(_record, finished=_recorded),
    "evaluate": Run(_evaluate, finished=_evaluated),
    "convert": Run(_convert, _prepare_checkpoint),
    "convert-dataset": Run(
        _convert_dataset,
        lambda folder: record_demonstrations("cart/right", 6, folder / "source", progress=False),
    ),
}
register_environment(
    "cart", Cart, tasks=["right"], expert=lambda task: lambda observation: np.array([0.9], np.float32)
)
