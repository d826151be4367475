"""Demonstrations: a scripted expert's successful episodes, recorded as a dataset."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ..configuration.features import ACTION
from ..errors import (
    DifferentRecordingError,
    InvalidActionError,
    InvalidEvaluationError,
    InvalidFrameError,
    ManipulatorsError,
    UnreliableExpertError,
)
from .environments import make_environment, make_expert
from .outcome import reported_success
from .specification import specification

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import gymnasium
    from tqdm import tqdm

    from ..data.recording.kept import KeptEpisode
    from ..data.recording.writer import LeRobotWriter
    from .specification import EnvironmentSpec

logger = logging.getLogger(__name__)


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
        failed_seeds (`list[int]`): the seeds left out because the expert failed.
        seconds (`float`): wall time of this run [s].
        broken_seeds (`list[int]`): the seeds left out because something raised an error, or gave no finite numbers.
        resumed (`int`): episodes that an earlier run had finished.
    """

    environment: str
    output: str
    episodes: int
    frames: int
    failures: int
    seeds: list[int]
    failed_seeds: list[int]
    seconds: float
    broken_seeds: list[int] = field(default_factory=list)
    resumed: int = 0


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

    Every episode is safe on the disk when it is finished. A recording that was stopped or killed goes on with the same
    call, to the same dataset. An episode in which environment or expert raise an error, or give numbers that are not
    finite or of another shape, is left out alone; its seed is logged and is one of `broken_seeds`.

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
        FolderInUseError: another run records there.
        DifferentRecordingError: episodes of another recording wait there to go on, or more than are asked for.
        MissingExpertError: the environment has no expert.
        UnreliableExpertError: more than half of the episodes fail or break.
        InvalidEnvironmentError: an environment reports no success, or one that is neither true nor false.
        InvalidEvaluationError: no episodes are asked for, the seed is negative, or the environments' features differ.
        DiskError: the disk does not take the recording; finished episodes are kept.
    """
    # Imported here: the writer imports pyarrow and PyAV, which an evaluation does not need.
    from tqdm.auto import tqdm

    from ..data.recording.writer import LeRobotWriter

    if episodes < 1:
        raise InvalidEvaluationError(f"episodes = {episodes} leaves nothing to record; expected at least 1.")
    if seed < 0:
        raise InvalidEvaluationError(f"seed {seed} is negative; simulators take 0 and above.")
    began = perf_counter()
    names = [environment] if isinstance(environment, str) else list(environment)
    experts = [expert or make_expert(name) for name in names]  # raises before anything is written
    sources: list[_Source] = []
    try:
        for number, (name, acting) in enumerate(zip(names, experts, strict=True)):
            sources.append(_Source(number, name, horizon, acting, make_environment(name, horizon)))
        spec = _common_specification([source.simulation for source in sources])
        description = {"fps": spec.fps, "features": spec.features, "robot_type": spec.robot_type}
        origin = {"environments": names, "seed": seed, "horizon": horizon}
        with LeRobotWriter(output, **description, origin=origin) as writer:
            resumed = writer.num_episodes
            for source in sources:
                source.take_over(writer.episodes)
            _require_fitting_counts(writer, [len(source.seeds) for source in sources], episodes)
            for source in sources:
                bar = {"total": episodes, "initial": len(source.seeds), "unit": "episode", "disable": not progress}
                with tqdm(desc=f"Recording {source.name}", **bar) as shown:
                    _record_episodes(writer, source, episodes, seed, shown)
    finally:
        for source in sources:
            source.simulation.close()
    return DemonstrationResult(
        environment=", ".join(names),
        output=str(Path(output)),
        episodes=sum(len(source.seeds) for source in sources),
        frames=sum(source.frames for source in sources),
        failures=sum(len(source.failed_seeds) for source in sources),
        seeds=[seed for source in sources for seed in source.seeds],
        failed_seeds=[seed for source in sources for seed in source.failed_seeds],
        seconds=perf_counter() - began,
        broken_seeds=[seed for source in sources for seed in source.broken_seeds],
        resumed=resumed,
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
class _Source:
    """One environment of a recording: what acts in it, and what has been recorded of it so far."""

    number: int
    name: str
    horizon: int | None
    expert: Callable[[dict[str, np.ndarray]], np.ndarray]
    simulation: gymnasium.Env
    seeds: list[int] = field(default_factory=list)
    failed_seeds: list[int] = field(default_factory=list)
    broken_seeds: list[int] = field(default_factory=list)
    frames: int = 0

    def note(self, seed: int) -> dict:
        """Return what an episode remembers, for the recording to go on after it."""
        return {"source": self.number, "seed": seed, "failed": self.failed_seeds, "broken": self.broken_seeds}

    def take_over(self, episodes: Sequence[KeptEpisode]) -> None:
        """Count what an earlier run recorded of this environment."""
        for episode in episodes:
            if episode.note["source"] == self.number:
                self.seeds.append(episode.note["seed"])
                self.failed_seeds, self.broken_seeds = list(episode.note["failed"]), list(episode.note["broken"])
                self.frames += episode.length

    def renew(self) -> None:
        """Build the environment anew: after an error it may be in any state."""
        with suppress(Exception):
            self.simulation.close()
        self.simulation = make_environment(self.name, self.horizon)


def _require_fitting_counts(writer: LeRobotWriter, counts: list[int], episodes: int) -> None:
    """Check that what was recorded before begins a recording of so many episodes of each environment."""
    begun = max((number for number, found in enumerate(counts) if found), default=0)
    if any(found > episodes for found in counts) or any(found < episodes for found in counts[:begun]):
        found = ", ".join(map(str, counts))
        raise DifferentRecordingError(writer.folder, writer.num_episodes, {"episodes": (found, episodes)})


def _record_episodes(writer: LeRobotWriter, source: _Source, episodes: int, seed: int, bar: tqdm) -> None:
    """Write successful episodes of one environment, after those recorded before."""
    spec, error = specification(source.simulation), None
    for episode_seed in count(source.seeds[-1] + 1 if source.seeds else seed):
        if len(source.seeds) == episodes:
            break
        try:
            length, success = _record_episode(writer, source.simulation, source.expert, spec.task, episode_seed)
        except Exception as raised:
            of_this_episode = isinstance(raised, InvalidActionError | InvalidFrameError)
            if isinstance(raised, ManipulatorsError) and not of_this_episode:
                raise  # such as a full disk, or an environment without success
            error, problem = raised, f"{type(raised).__name__}: {raised}"
            logger.warning("The episode of seed %d in %s is left out: %s", episode_seed, spec.name, problem)
            writer.discard_episode()
            source.broken_seeds.append(episode_seed)
            source.renew()
        else:
            if success:
                writer.end_episode(source.note(episode_seed))
                source.seeds.append(episode_seed)
                source.frames += length
                bar.update()
            else:
                writer.discard_episode()
                source.failed_seeds.append(episode_seed)
        left_out = len(source.failed_seeds) + len(source.broken_seeds)
        if left_out:
            bar.set_postfix(failures=left_out)
        # With more failures than requested successes, more than half of all episodes will have failed.
        if left_out > episodes:
            raise _unreliable(spec, source, error) from error


def _unreliable(spec: EnvironmentSpec, source: _Source, error: Exception | None) -> UnreliableExpertError:
    failures, broken = len(source.failed_seeds), len(source.broken_seeds)
    tried = failures + broken + len(source.seeds)
    message = f"The expert of {spec.name!r} failed {failures} of {tried} episodes within {spec.horizon} steps"
    if not broken:
        return UnreliableExpertError(
            f"{message}.\nGive it more steps (horizon={2 * spec.horizon}), or pass a better expert=…."
        )
    return UnreliableExpertError(
        f"{message}; {broken} more ended in an error, the last one in {type(error).__name__}: {error}\n"
        f"Repair the environment or the expert, and record again."
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
        success |= reported_success(info, spec.name)
        if terminated or truncated:
            break
    return length, success
