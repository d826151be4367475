"""Demonstrations: a scripted expert's successful episodes, recorded as a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ..configuration.features import ACTION
from ..errors import InvalidActionError, InvalidEvaluationError, UnreliableExpertError
from .environments import make_environment, make_expert
from .specification import specification

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import gymnasium
    from tqdm import tqdm

    from ..data.writer import LeRobotWriter
    from .specification import EnvironmentSpec


@dataclass(frozen=True)
class DemonstrationResult:
    """Describe a recording.

    Args:
        environment (`str`): the environment's name.
        output (`str`): the dataset's folder.
        episodes (`int`): episodes written, all successful.
        frames (`int`): observation–action pairs in all of them.
        failures (`int`): episodes that failed and were left out.
        seeds (`list[int]`): the seed of each written episode, in order.
        failed_seeds (`list[int]`): the seeds left out.
        seconds (`float`): wall time [s].
    """

    environment: str
    output: str
    episodes: int
    frames: int
    failures: int
    seeds: list[int]
    failed_seeds: list[int]
    seconds: float


def record_demonstrations(
    environment: str | Sequence[str],
    episodes: int,
    output: str | os.PathLike,
    seed: int = 0,
    horizon: int | None = None,
    expert: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None,
    progress: bool = True,
) -> DemonstrationResult:
    """Record `episodes` successful episodes of the expert, in each environment, into a LeRobot-format dataset.

    Episode k starts from `seed` + k; failures are left out and further seeds tried. Frame t holds the
    observation at t and the action that was applied to it, clipped to the action space, float32.

    Args:
        environment (`str` or `Sequence[str]`): `<family>/<task>`, for example `metaworld/pick-place-v3`; several
            make a dataset of several instructions.
        episodes (`int`): successful episodes to write, of each environment.
        output (`str` or `os.PathLike`): folder of the dataset; it must not exist.
        seed (`int`, *optional*, defaults to 0): the first seed. Keep it away from the seeds of the
            evaluation.
        horizon (`int`, *optional*): steps an episode may take; defaults to the environment's own.
        expert (`Callable`, *optional*): one observation → action (a,); defaults to each environment's scripted one.
        progress (`bool`, *optional*, defaults to `True`): show a bar of episodes.

    Raises:
        OutputExistsError: `output` exists.
        MissingExpertError: the environment has no expert.
        UnreliableExpertError: more than half of the episodes fail.
        InvalidActionError: the expert's action has another shape, or is not finite.
        InvalidEvaluationError: no episodes are asked for, the seed is negative, or the environments' features differ.
    """
    # Imported here: the writer imports pyarrow and PyAV, which an evaluation does not need.
    from tqdm.auto import tqdm

    from ..data.writer import LeRobotWriter

    if episodes < 1:
        raise InvalidEvaluationError(f"episodes = {episodes} leaves nothing to record; expected at least 1.")
    if seed < 0:
        raise InvalidEvaluationError(f"seed {seed} is negative; simulators take 0 and above.")
    began = perf_counter()
    names = [environment] if isinstance(environment, str) else list(environment)
    experts = [expert or make_expert(name) for name in names]  # raises before anything is written
    simulations = []
    seeds, failed_seeds, frames = [], [], 0
    try:
        simulations += (make_environment(name, horizon) for name in names)
        spec = _common_specification(simulations)
        with LeRobotWriter(output, fps=spec.fps, features=spec.features, robot_type=spec.robot_type) as writer:
            for name, simulation, acting in zip(names, simulations, experts, strict=True):
                with tqdm(total=episodes, desc=f"Recording {name}", unit="episode", disable=not progress) as bar:
                    recorded = _record_episodes(writer, simulation, acting, episodes, seed, bar)
                seeds += recorded.seeds
                failed_seeds += recorded.failed_seeds
                frames += recorded.frames
    finally:
        for simulation in simulations:
            simulation.close()
    return DemonstrationResult(
        environment=", ".join(names),
        output=str(Path(output)),
        episodes=len(seeds),
        frames=frames,
        failures=len(failed_seeds),
        seeds=seeds,
        failed_seeds=failed_seeds,
        seconds=perf_counter() - began,
    )


def _common_specification(simulations: Sequence[gymnasium.Env]) -> EnvironmentSpec:
    """Return the first environment's specification, whose features and rate all of them must have."""
    first, *others = map(specification, simulations)
    for other in others:
        if (other.features, other.fps, other.robot_type) != (first.features, first.fps, first.robot_type):
            raise InvalidEvaluationError(
                f"{first.name} and {other.name} differ in features, rate or robot, so they cannot share a dataset. "
                f"Record each into its own."
            )
    return first


@dataclass
class _Recorded:
    """The episodes of one environment recorded so far."""

    seeds: list[int] = field(default_factory=list)
    failed_seeds: list[int] = field(default_factory=list)
    frames: int = 0


def _record_episodes(
    writer: LeRobotWriter,
    simulation: gymnasium.Env,
    expert: Callable[[dict[str, np.ndarray]], np.ndarray],
    episodes: int,
    seed: int,
    bar: tqdm,
) -> _Recorded:
    """Write successful episodes of one environment."""
    spec, recorded = specification(simulation), _Recorded()
    for episode_seed in count(seed):
        length, success = _record_episode(writer, simulation, expert, spec.task, episode_seed)
        if success:
            writer.end_episode()
            recorded.seeds.append(episode_seed)
            recorded.frames += length
            bar.update()
        else:
            writer.discard_episode()
            recorded.failed_seeds.append(episode_seed)
            bar.set_postfix(failures=len(recorded.failed_seeds))
        failures, successes = len(recorded.failed_seeds), len(recorded.seeds)
        # With more failures than requested successes, more than half of all episodes will have failed.
        if failures > episodes:
            raise UnreliableExpertError(
                f"The expert of {spec.name!r} failed {failures} of {failures + successes} episodes within "
                f"{spec.horizon} steps.\nGive it more steps (horizon={2 * spec.horizon}), or pass a better expert=…."
            )
        if successes == episodes:
            break
    return recorded


def _record_episode(
    writer: LeRobotWriter,
    simulation: gymnasium.Env,
    expert: Callable[[dict[str, np.ndarray]], np.ndarray],
    task: str,
    seed: int,
) -> tuple[int, bool]:
    """Write one episode's frames; return how many, and whether the episode succeeded."""
    spec, space = specification(simulation), simulation.action_space
    observation, _ = simulation.reset(seed=seed)
    success, length = False, 0
    while length < spec.horizon:
        action = np.asarray(expert(observation), dtype=np.float32)  # (a,)
        if action.shape != space.shape or not np.isfinite(action).all():
            raise InvalidActionError(
                f"The expert of {spec.name} gave {action.tolist()} at step {length} of seed {seed}; "
                f"expected {space.shape[0]} finite numbers."
            )
        action = np.clip(action, space.low, space.high)
        writer.add_frame({**observation, ACTION: action}, task=task)
        observation, _, terminated, truncated, info = simulation.step(action)
        length += 1
        success |= bool(info["success"])
        if terminated or truncated:
            break
    return length, success
