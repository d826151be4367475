"""Closed-loop rollouts: a policy drives environments from fixed seeds, and its successes are counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .._display import Displayed
from .._files import write_text
from .._lock import locked
from .._version import __version__
from ..configuration.contract import OBSERVATION_LIMIT
from ..errors import InvalidEnvironmentError, InvalidEvaluationError, add_note
from ..plugins import requested_plugins
from .driver import Driver
from .environments import make_environment, make_environments
from .episode import RolloutEpisode
from .intervals import wilson_interval
from .kept import KeptRollouts, policy_digest
from .rollout_video import EPISODES, Film, filming
from .specification import EnvironmentSpec, specification

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import SyncVectorEnv


@dataclass(frozen=True, repr=False)
class EvaluationResult(Displayed):
    """Hold the result of an evaluation, with everything needed to repeat it.

    Args:
        environment (`str`): the environment's name.
        task (`str`): the instruction that the policy was given.
        episodes, successes (`int`): episodes run; episodes that reported success at any of their steps.
        success_rate (`float`): successes per episode, 0 … 1; an episode that ended in an error counts as failed.
        interval (`list[float]`): 95 % Wilson interval of the success rate, [low, high].
        mean_return (`float`): mean sum of an episode's rewards.
        mean_length (`float`): mean number of control steps until success, failure or the horizon.
        milliseconds_per_action (`float`): mean wall time of one pipeline call [ms]. A call serves one control
            step of up to `num_envs` environments; calls answered from an action queue are in the mean.
        num_envs (`int`): batch size of these calls (the last group of seeds may be smaller).
        seeds (`list[int]`): one per episode.
        per_episode (`list[dict]`): `seed`, `success`, `return`, `length` of each episode, in the order of
            `seeds`, and its `error` if it ended in one.
        clipped_fraction (`float`): share of the control steps whose action left the action space and was
            clipped.
        horizon (`int`): steps after which an episode was truncated.
        versions (`dict[str, str]`): of `manipulators`, `torch` and the `simulator`.
        errors (`int`): episodes that ended in an error of the environment, an impossible observation or reward.
        error_note (`str`, *optional*): how they are counted, where there were some.
        requested_episodes (`int`, *optional*): those that were asked for; more than `episodes` in the partial record
            of an evaluation that was stopped.
        video (`str`, *optional*): name of the file that shows the first episodes.
        video_note (`str`, *optional*): what it shows, or why there is none although one was asked for.
        date (`str`): when it ended, in ISO 8601.
        checkpoint, commit (`str`, *optional*): folder or Hub id of the policy, and the commit of the latter.
        n_action_steps, temporal_ensemble_coeff, sampling_steps, clamp_actions, max_action_step, observation_limit: how
            the policy predicted and acted; see `PolicyPipeline`.
        dtype, device (`str`, *optional*): of its weights, and where it ran.
        tokenizer, embodiment, camera_map, overrides: arguments that it was loaded with, where there were some.
        plugins (`list[str]`): modules that were named as plugins.
    """

    environment: str
    task: str
    episodes: int
    successes: int
    success_rate: float
    interval: list[float]
    mean_return: float
    mean_length: float
    milliseconds_per_action: float
    num_envs: int
    seeds: list[int]
    per_episode: list[dict]
    clipped_fraction: float
    horizon: int
    versions: dict[str, str]
    errors: int = 0
    error_note: str | None = None
    requested_episodes: int | None = None
    video: str | None = None
    video_note: str | None = None
    date: str | None = None
    checkpoint: str | None = None
    commit: str | None = None
    n_action_steps: int | None = None
    temporal_ensemble_coeff: float | None = None
    sampling_steps: int | None = None
    clamp_actions: bool = False
    max_action_step: float | list[float] | dict[str, float] | None = None
    observation_limit: float | None = OBSERVATION_LIMIT
    dtype: str | None = None
    device: str | None = None
    tokenizer: str | None = None
    embodiment: str | None = None
    camera_map: dict[str, str] = field(default_factory=dict)
    overrides: dict = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Return plain JSON values."""
        return asdict(self)

    def _display_rows(self) -> tuple[str, dict[str, object]]:
        interval = " to ".join(f"{end:.1%}" for end in self.interval)
        seeds = f"{min(self.seeds)} to {max(self.seeds)}" if len(self.seeds) > 1 else str(self.seeds[0])
        rows = {
            "task": self.task,
            "solved": f"{self.successes} of {self.episodes}, {self.success_rate:.1%} (95 % interval {interval})",
            "length": f"{self.mean_length:.1f} of {self.horizon} steps on average",
            "return": f"{self.mean_return:.4g} on average",
            "clipped": f"{self.clipped_fraction:.1%} of the actions, to the action space",
            "time": f"{self.milliseconds_per_action:.3g} ms per action of {self.num_envs} environments",
            "seeds": seeds,
            "checkpoint": self.checkpoint,
            "executed": self.n_action_steps and f"{self.n_action_steps} actions of each chunk",
            "bounds": ", ".join(
                f"{name}={getattr(self, name)}"
                for name in ("clamp_actions", "max_action_step", "observation_limit")
                if getattr(self, name) not in (None, False)
            ),
            "numbers": self.dtype and f"{self.dtype} on {self.device}",
            "video": self.video,
            "date": self.date,
        }
        return f"Evaluation in {self.environment}", rows

    def save(self, path: str | os.PathLike) -> None:
        """Write the result as JSON; the file appears complete or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")


def evaluate(
    pipeline: Callable,
    environment: str,
    seeds: Iterable[int],
    num_envs: int = 10,
    horizon: int | None = None,
    progress: bool = True,
    video: str | os.PathLike | None = None,
    task: str | None = None,
    output: str | os.PathLike | None = None,
) -> EvaluationResult:
    """Run one closed-loop episode per seed and count successes.

    Seeds are taken in groups of `num_envs`; pipeline and environments are reset before each. An episode that
    is over stays in the pipeline's batch with its last observation, but is neither stepped nor counted: the
    outcome of a seed depends on neither its group nor its neighbours, as far as the policy computes the rows
    of a batch independently (matrix products of different batch sizes may differ in the last bits). A policy
    that draws noise is seeded at each group, so that the same call gives the same result; torch's random
    state is put back afterwards, so that an evaluation in the middle of a training run changes nothing in it.

    An environment that raises an error, or gives an impossible observation or reward, ends its own episode alone. The
    episode counts as failed, since the policy may have driven it there, and `errors` counts it apart.

    With `output`, every finished episode is kept in `<output>.partial.json`, a record of the same form, until all are
    finished. An evaluation that was stopped or killed goes on with the same call, to the same result.

    Args:
        pipeline (`Callable`): `pipeline(observation, task=[...])` → actions (b, a) in robot units, a tensor
            or an array; observations are arrays (b, …) under dataset names. `pipeline.reset()` starts new
            episodes.
        environment (`str`): `<family>/<task>`, for example `metaworld/pick-place-v3`.
        seeds (`Iterable[int]`): one per episode. Keep them away from the seeds of the demonstrations.
        num_envs (`int`, *optional*, defaults to 10): environments that are stepped together.
        horizon (`int`, *optional*): steps after which an episode is truncated; defaults to the environment's
            own.
        progress (`bool`, *optional*, defaults to `True`): show a bar of episodes.
        video (`str` or `os.PathLike`, *optional*): film the first episodes into this `.mp4`. Without a working
            renderer there is none, and the result's `video_note` says why.
        task (`str`, *optional*): the instruction; defaults to the environment's own. The environment still
            decides what success is, so another instruction shows whether the policy follows it.
        output (`str` or `os.PathLike`, *optional*): write the result to this JSON file. An evaluation goes on only
            with the same policy and settings; of a callable that is no `PolicyPipeline`, the caller sees to that.

    Raises:
        InvalidEvaluationError: no seeds, a seed twice, a negative one, `num_envs` or `horizon` below 1.
        InvalidActionError: the pipeline returned another shape, NaN or infinity for an episode still running.
        UnknownEnvironmentError, MissingSimulatorError, InvalidEnvironmentError: as `make_environment`.
        InvalidEnvironmentError: also where success is not reported or neither true nor false, and where every episode
            ended in an error.
        FolderInUseError: another run writes to `output` or `video`.
        DifferentEvaluationError: episodes of another evaluation wait beside `output`.
        DiskError: the disk does not take an episode; those before it are kept.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise InvalidEvaluationError(
            f"An evaluation needs at least one seed and each of them once; got {len(seeds)} seeds, "
            f"{len(set(seeds))} different. For example: seeds=range(10_000, 10_050)."
        )
    if min(seeds) < 0:
        raise InvalidEvaluationError(f"seed {min(seeds)} is negative; simulators take 0 and above.")
    if num_envs < 1:
        raise InvalidEvaluationError(f"num_envs = {num_envs}; expected at least 1.")
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(locked(output, "an evaluation"))
        environments = make_environments(environment, min(num_envs, len(seeds)), horizon)
        stack.callback(_close, environments)
        spec = specification(environments.envs[0])
        driver = Driver(pipeline, environments.single_action_space, spec, spec.task if task is None else task)

        def summarise(episodes: Sequence[RolloutEpisode]) -> EvaluationResult:
            return _summarise(episodes, driver, environments.num_envs, len(seeds))

        settings = {} if output is None else _settings(driver, seeds, num_envs)
        kept = KeptRollouts(output, settings, driver, lambda episodes: summarise(episodes).to_dict())
        try:
            with (
                filming(video, environments.envs[0], seeds[0]) as film,
                torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            ):
                if film.name is not None:  # the groups on film are run again
                    kept.forget(seeds[: -(-EPISODES // num_envs) * num_envs])
                groups = [seeds[start : start + num_envs] for start in range(0, len(seeds), num_envs)]
                build = partial(make_environment, environment, horizon)
                episodes = _run_groups(driver, environments, build, groups, film, kept, progress)
            result = replace(summarise(episodes), video=film.name, video_note=film.note)
            if result.errors == result.episodes:
                kept.remove()
                raise InvalidEnvironmentError(
                    f"Every episode of {spec.name} ended in an error, that of seed {seeds[0]} in "
                    f"{episodes[0].error}.\nRepair the environment: nothing is known of the policy."
                )
            if output is not None:
                result.save(output)
                kept.remove()
        except BaseException as error:
            add_note(error, kept.note(len(seeds)))
            raise
    return result


def _run_groups(
    driver: Driver,
    environments: SyncVectorEnv,
    build: Callable[[], gymnasium.Env],
    groups: Sequence[Sequence[int]],
    film: Film,
    kept: KeptRollouts,
    progress: bool,
) -> list[RolloutEpisode]:
    """Return the episodes of every group of seeds, those that are kept and those that had to be run."""
    episodes: list[RolloutEpisode] = []
    total, name = sum(map(len, groups)), driver.spec.name
    with tqdm(total=total, desc=f"Evaluating {name}", unit="episode", disable=not progress) as bar:
        for seeds in groups:
            group = [kept.episodes.get(seed) or RolloutEpisode(seed) for seed in seeds]
            when_some_ended = partial(_count, bar, kept, len(episodes), group)
            when_some_ended()
            if not all(episode.over for episode in group):
                driver.run(environments.envs, group, film, when_some_ended)
                for row, episode in enumerate(group):
                    if episode.error is not None and len(episodes) + len(group) < total:
                        environments.envs[row] = _renewed(environments.envs[row], build)
            episodes += group
            bar.set_postfix(success=f"{sum(episode.success for episode in episodes)}/{len(episodes)}")
    return episodes


def _count(bar: tqdm, kept: KeptRollouts, before: int, group: Sequence[RolloutEpisode]) -> None:
    """Show and keep what is finished of a group, which so many episodes were before."""
    bar.update(before + sum(episode.over for episode in group) - bar.n)
    kept.keep(group)


def _renewed(environment: gymnasium.Env, build: Callable[[], gymnasium.Env]) -> gymnasium.Env:
    """Return another environment in place of one that raised an error and may be in any state."""
    with suppress(Exception):
        environment.close()
    return build()


def _close(environments: SyncVectorEnv) -> None:
    with suppress(Exception):  # one that raised an error may do so again, which must not cost the result
        environments.close()


def _settings(driver: Driver, seeds: Sequence[int], num_envs: int) -> dict[str, Any]:
    """Return what the outcome of every episode depends on, for an evaluation that goes on."""
    given = getattr(driver.pipeline, "settings", {})
    where = ("checkpoint", "commit")  # the digest says what is there
    return {name: value for name, value in given.items() if name not in where} | {
        "environment": driver.spec.name,
        "task": driver.task,
        "seeds": list(seeds),
        "num_envs": num_envs,
        "horizon": driver.spec.horizon,
        "policy": policy_digest(driver.pipeline),
        "plugins": requested_plugins(),
        "versions": _versions(driver.spec),
    }


def _versions(spec: EnvironmentSpec) -> dict[str, str]:
    return {
        "manipulators": __version__,
        "torch": torch.__version__,
        "simulator": spec.simulator or "unknown",
    }


def _summarise(episodes: Sequence[RolloutEpisode], driver: Driver, num_envs: int, requested: int) -> EvaluationResult:
    count, steps = len(episodes), sum(episode.length for episode in episodes)
    successes = sum(episode.success for episode in episodes)
    errors = sum(episode.error is not None for episode in episodes)
    error_note = f"{errors} of {count} episodes ended in an error of the environment and count as failed."
    settings = getattr(driver.pipeline, "settings", {})  # any callable may act
    return EvaluationResult(
        **settings,
        plugins=requested_plugins(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=driver.spec.name,
        task=driver.task,
        episodes=count,
        successes=successes,
        success_rate=successes / count,
        interval=list(wilson_interval(successes, count)),
        mean_return=sum(episode.total_reward for episode in episodes) / count,
        mean_length=steps / count,
        milliseconds_per_action=1000 * driver.seconds / max(driver.calls, 1),
        num_envs=num_envs,
        seeds=[episode.seed for episode in episodes],
        per_episode=[episode.to_dict() for episode in episodes],
        clipped_fraction=sum(episode.clipped for episode in episodes) / max(steps, 1),
        horizon=driver.spec.horizon,
        versions=_versions(driver.spec),
        errors=errors,
        error_note=error_note if errors else None,
        requested_episodes=requested,
    )
