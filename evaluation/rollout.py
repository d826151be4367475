"""Closed-loop rollouts: a policy drives environments from fixed seeds, and its successes are counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from tqdm.auto import tqdm

from .._display import Displayed
from .._files import write_text
from .._version import __version__
from ..configuration.contract import OBSERVATION_LIMIT
from ..errors import InvalidActionError, InvalidEnvironmentError, InvalidEvaluationError
from ..plugins import requested_plugins
from .environments import make_environments
from .intervals import wilson_interval
from .rollout_video import Film, filming
from .specification import EnvironmentSpec, specification


@dataclass(frozen=True, repr=False)
class EvaluationResult(Displayed):
    """Hold the result of an evaluation, with everything needed to repeat it.

    Args:
        environment (`str`): the environment's name.
        task (`str`): the instruction that the policy was given.
        episodes, successes (`int`): episodes run; episodes that reported success at any of their steps.
        success_rate (`float`): successes per episode, 0 … 1.
        interval (`list[float]`): 95 % Wilson interval of the success rate, [low, high].
        mean_return (`float`): mean sum of an episode's rewards.
        mean_length (`float`): mean number of control steps until success, failure or the horizon.
        milliseconds_per_action (`float`): mean wall time of one pipeline call [ms]. A call serves one control
            step of up to `num_envs` environments; calls answered from an action queue are in the mean.
        num_envs (`int`): batch size of these calls (the last group of seeds may be smaller).
        seeds (`list[int]`): one per episode.
        per_episode (`list[dict]`): `seed`, `success`, `return`, `length` of each episode, in the order of
            `seeds`.
        clipped_fraction (`float`): share of the control steps whose action left the action space and was
            clipped.
        horizon (`int`): steps after which an episode was truncated.
        versions (`dict[str, str]`): of `manipulators`, `torch` and the `simulator`.
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
) -> EvaluationResult:
    """Run one closed-loop episode per seed and count successes.

    Seeds are taken in groups of `num_envs`; pipeline and environments are reset before each. An episode that
    is over stays in the pipeline's batch with its last observation, but is neither stepped nor counted: the
    outcome of a seed depends on neither its group nor its neighbours, as far as the policy computes the rows
    of a batch independently (matrix products of different batch sizes may differ in the last bits). A policy
    that draws noise is seeded at each group, so that the same call gives the same result; torch's random
    state is put back afterwards, so that an evaluation in the middle of a training run changes nothing in it.

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

    Raises:
        InvalidEvaluationError: no seeds, a seed twice, a negative one, `num_envs` or `horizon` below 1.
        InvalidActionError: the pipeline returned another shape, NaN or infinity for an episode still running.
        UnknownEnvironmentError, MissingSimulatorError, InvalidEnvironmentError: as `make_environment`.
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
    environments = make_environments(environment, min(num_envs, len(seeds)), horizon)
    spec = specification(environments.envs[0])
    driver = _Driver(pipeline, environments.single_action_space, spec, spec.task if task is None else task)
    episodes: list[_Episode] = []
    try:
        with (
            filming(video, environments.envs[0], seeds[0]) as film,
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            tqdm(total=len(seeds), desc=f"Evaluating {environment}", unit="episode", disable=not progress) as bar,
        ):
            for start in range(0, len(seeds), num_envs):
                group = [_Episode(seed) for seed in seeds[start : start + num_envs]]
                _run(driver, environments.envs, group, bar, film)
                episodes += group
                bar.set_postfix(success=f"{sum(episode.success for episode in episodes)}/{len(episodes)}")
    finally:
        environments.close()
    return replace(_summarise(episodes, driver, environments.num_envs), video=film.name, video_note=film.note)


@dataclass
class _Episode:
    """One episode while it runs."""

    seed: int
    success: bool = False
    total_reward: float = 0.0
    length: int = 0
    clipped: int = 0
    over: bool = False


@dataclass
class _Driver:
    """Call the pipeline for a batch of environments; check and time its actions."""

    pipeline: Callable
    space: object
    spec: EnvironmentSpec
    task: str
    seconds: float = 0.0
    calls: int = 0

    def act(self, observations: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """Return the actions (b, a), float32, as the pipeline gave them."""
        # The policy refuses features it was not trained on, and an environment may have more of them.
        names = getattr(self.pipeline, "observation_names", observations[0].keys())
        batch = {name: np.stack([row[name] for row in observations]) for name in observations[0] if name in names}
        began = perf_counter()
        actions = self.pipeline(batch, task=[self.task] * len(observations))
        # The copy to the host waits for the accelerator, so it belongs to the time of the call.
        actions = torch.as_tensor(actions).detach().to("cpu", torch.float32).numpy()  # (b, a)
        self.seconds += perf_counter() - began
        self.calls += 1
        expected = (len(observations), *self.space.shape)
        if actions.shape != expected:
            raise InvalidActionError(
                f"The pipeline returned actions of shape {actions.shape} for {self.spec.name}; "
                f"expected {expected}: environments × ({', '.join(self.spec.action_feature['names'])})."
            )
        return actions

    def bounded(self, action: np.ndarray, episode: _Episode) -> np.ndarray:
        """Return one action (a,) inside the action space; count it when it had to be clipped."""
        if not np.isfinite(action).all():
            raise InvalidActionError(
                f"The pipeline returned {action.tolist()} at step {episode.length} of seed {episode.seed} in "
                f"{self.spec.name}; expected finite numbers.\n"
                "Check the weights and the processor's statistics: torch.isfinite(weight).all() for each "
                "weight, no std of 0 or NaN."
            )
        clipped = np.clip(action, self.space.low, self.space.high)
        episode.clipped += int(not np.array_equal(clipped, action))
        return clipped


def _run(driver: _Driver, environments: Sequence, group: list[_Episode], bar: tqdm, film: Film) -> None:
    """Run a group of episodes to their ends, side by side."""
    driver.pipeline.reset()
    torch.manual_seed(group[0].seed)
    # One by one, because the vector's own `step` cannot skip a finished environment.
    observations = [environments[row].reset(seed=episode.seed)[0] for row, episode in enumerate(group)]
    film.begin(environments, group)
    for step in range(driver.spec.horizon):
        actions = driver.act(observations)  # (b, a)
        for row, episode in enumerate(group):
            if episode.over:
                continue
            action = driver.bounded(actions[row], episode)  # (a,)
            observations[row], reward, terminated, truncated, info = environments[row].step(action)
            if "success" not in info:
                raise InvalidEnvironmentError(
                    f"{driver.spec.name} does not report success; its info holds {sorted(info)}.\n"
                    'Return info["success"] = True or False from every step.'
                )
            episode.success |= bool(info["success"])
            episode.total_reward += float(reward)
            episode.length += 1
            episode.over = bool(terminated or truncated or step + 1 == driver.spec.horizon)
            bar.update(int(episode.over))
        film.add(environments, group)
        if all(episode.over for episode in group):
            break


def _summarise(episodes: list[_Episode], driver: _Driver, num_envs: int) -> EvaluationResult:
    count, steps = len(episodes), sum(episode.length for episode in episodes)
    successes = sum(episode.success for episode in episodes)
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
        milliseconds_per_action=1000 * driver.seconds / driver.calls,
        num_envs=num_envs,
        seeds=[episode.seed for episode in episodes],
        per_episode=[
            {
                "seed": episode.seed,
                "success": episode.success,
                "return": episode.total_reward,
                "length": episode.length,
            }
            for episode in episodes
        ],
        clipped_fraction=sum(episode.clipped for episode in episodes) / steps,
        horizon=driver.spec.horizon,
        versions={
            "manipulators": __version__,
            "torch": torch.__version__,
            "simulator": driver.spec.simulator or "unknown",
        },
    )
