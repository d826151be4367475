"""Demonstrations: a scripted expert's successful episodes, written as a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ..configuration.features import ACTION
from ..errors import InvalidActionError, InvalidEvaluationError, UnreliableExpertError
from .environments import make_environment, make_expert, specification

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import gymnasium

    from ..data.writer import LeRobotWriter


@dataclass(frozen=True)
class DemonstrationResult:
    """What a recording consists of.

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
    environment: str,
    episodes: int,
    output: str | os.PathLike,
    seed: int = 0,
    horizon: int | None = None,
    expert: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None,
    progress: bool = True,
) -> DemonstrationResult:
    """Record `episodes` successful episodes of the expert into a LeRobot-format dataset.

    Episode k starts from `seed` + k; failures are left out and further seeds tried. Frame t holds the
    observation at t and the action that was applied to it, clipped to the action space, float32.

    Args:
        environment (`str`): `<family>/<task>`, for example `metaworld/pick-place-v3`.
        episodes (`int`): successful episodes to write.
        output (`str` or `os.PathLike`): folder of the dataset; it must not exist.
        seed (`int`, *optional*, defaults to 0): the first seed. Keep it away from the seeds of the
            evaluation.
        horizon (`int`, *optional*): steps an episode may take; defaults to the environment's own.
        expert (`Callable`, *optional*): one observation → action (a,); defaults to the scripted one.
        progress (`bool`, *optional*, defaults to `True`): show a bar of episodes.

    Raises:
        OutputExistsError: `output` exists.
        MissingExpertError: the environment has no expert.
        UnreliableExpertError: more than half of the episodes fail.
        InvalidActionError: the expert's action has another shape, or is not finite.
    """
    # Both stand apart: the writer brings pyarrow and video, and whoever only evaluates needs neither.
    from tqdm.auto import tqdm

    from ..data.writer import LeRobotWriter

    if episodes < 1:
        raise InvalidEvaluationError(f"episodes = {episodes} leaves nothing to record; expected at least 1.")
    began = perf_counter()
    expert = expert or make_expert(environment)
    simulation = make_environment(environment, horizon)
    spec = specification(simulation)
    seeds, failed_seeds, frames = [], [], 0
    try:
        with (
            LeRobotWriter(output, fps=spec.fps, features=spec.features, robot_type=spec.robot_type) as writer,
            tqdm(total=episodes, desc=f"Recording {environment}", unit="episode", disable=not progress) as bar,
        ):
            for episode_seed in count(seed):
                length, success = _record_episode(writer, simulation, expert, spec.task, episode_seed)
                if success:
                    writer.end_episode()
                    seeds.append(episode_seed)
                    frames += length
                    bar.update()
                else:
                    writer.discard_episode()
                    failed_seeds.append(episode_seed)
                    bar.set_postfix(failures=len(failed_seeds))
                # More failures than the successes asked for: whatever comes, more than half will have failed.
                if len(failed_seeds) > episodes:
                    raise UnreliableExpertError(
                        f"The expert of {environment!r} failed {len(failed_seeds)} of "
                        f"{len(failed_seeds) + len(seeds)} episodes within {spec.horizon} steps.\n"
                        f"Give it more steps (horizon={2 * spec.horizon}), or pass a better expert=…."
                    )
                if len(seeds) == episodes:
                    break
    finally:
        simulation.close()
    return DemonstrationResult(
        environment=environment,
        output=str(Path(output)),
        episodes=len(seeds),
        frames=frames,
        failures=len(failed_seeds),
        seeds=seeds,
        failed_seeds=failed_seeds,
        seconds=perf_counter() - began,
    )


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
