"""The registry of environments: a name → a gymnasium environment that speaks our dataset names.

A name is `<family>/<task>`, with options as in a web address where the family has some:
`metaworld/pick-place-v3?camera=corner2&size=96`. (In a shell, put it in quotes.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from ..configuration.features import ACTION
from ..errors import (
    InvalidEnvironmentError,
    InvalidEvaluationError,
    MissingExpertError,
    MissingSimulatorError,
    UnknownEnvironmentError,
)
from .metaworld_tasks import INSTRUCTIONS

if TYPE_CHECKING:
    import gymnasium
    import numpy as np

    Expert = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class EnvironmentSpec:
    """Describe an environment in the words of a dataset, so that its recordings need no second description.

    Args:
        name (`str`): under which the environment, options included, can be made again.
        task (`str`): the instruction, as a sentence for a policy that reads language.
        features (`dict[str, dict]`): one entry per observation feature and one for `action`, each
            `{"dtype": "float32", "shape": [width], "names": [...], "units": [...]}`; a camera is named
            `observation.images.<camera>` and is `{"dtype": "video", "shape": [height, width, 3], ...}`.
        fps (`int`): control steps per second of simulated time [1/s].
        horizon (`int`): steps after which an episode is truncated.
        robot_type (`str`, *optional*): the robot, as a dataset's metadata names it.
        simulator (`str`, *optional*): the simulator with its version, kept with every result.
    """

    name: str
    task: str
    features: dict[str, dict]
    fps: int
    horizon: int
    robot_type: str | None = None
    simulator: str | None = None

    @property
    def observation_features(self) -> dict[str, dict]:
        """The features an observation consists of, by name."""
        return {name: feature for name, feature in self.features.items() if name != ACTION}

    @property
    def action_feature(self) -> dict:
        """Width, names and units of an action."""
        return self.features[ACTION]


@dataclass(frozen=True)
class _Family:
    factory: Callable[..., gymnasium.Env]
    tasks: tuple[str, ...] = ()
    expert: Callable[[str], Expert] | None = None
    options: tuple[str, ...] = ()


def _make_metaworld(
    task: str, horizon: int | None, camera: str | None = None, size: str | None = None, goal: str = "visible"
) -> gymnasium.Env:
    from .metaworld import HORIZON, IMAGE_SIZE, MetaWorldEnvironment

    if size is not None and not size.isdecimal():
        raise InvalidEvaluationError(f"size={size} is no number of pixels; write ?camera=corner2&size={IMAGE_SIZE}.")
    if size is not None and camera is None:
        raise InvalidEvaluationError(f"size={size} is of no camera; write ?camera=corner2&size={size}.")
    if goal not in ("visible", "hidden"):
        raise InvalidEvaluationError(f"goal={goal} says neither goal=visible nor goal=hidden.")
    cameras = camera.split(",") if camera is not None else ()
    return MetaWorldEnvironment(task, horizon or HORIZON, cameras, int(size or IMAGE_SIZE), goal == "visible")


def _metaworld_expert(task: str) -> Expert:
    from .metaworld import expert

    return expert(task)


_FAMILIES = {
    "metaworld": _Family(_make_metaworld, tuple(INSTRUCTIONS), _metaworld_expert, options=("camera", "size", "goal"))
}


def register_environment(
    family: str,
    factory: Callable[..., gymnasium.Env],
    tasks: Iterable[str] = (),
    expert: Callable[[str], Expert] | None = None,
    options: Iterable[str] = (),
) -> None:
    """Add a family of environments, or replace one, for every place that takes an environment's name.

    Args:
        family (`str`): what stands before the slash.
        factory (`Callable`): `factory(task, horizon)` → `gymnasium.Env`; `horizon` is None for the family's
            own. Its observation is a `Dict` space under dataset names (`observation.state`, …), its action a
            `Box`, its attribute `environment_spec` an `EnvironmentSpec`, and every `step` reports
            `info["success"]`. Where it can be filmed, `render()` returns uint8 (h, w, 3).
        tasks (`Iterable[str]`, *optional*): the tasks that exist; without them every task reaches the
            factory.
        expert (`Callable`, *optional*): `expert(task)` → a callable from one observation to one action (a,).
        options (`Iterable[str]`, *optional*): what may follow the task in a name, `?option=value&…`; passed to
            the factory by keyword, as text.

    Raises:
        InvalidEnvironmentError: the family's name is empty or holds a slash, or the factory cannot be called.
    """
    if not isinstance(family, str) or not family or "/" in family:
        raise InvalidEnvironmentError(f"{family!r} cannot name a family: expected a non-empty str without '/'.")
    if not callable(factory):
        raise InvalidEnvironmentError(f"The factory of {family!r} is {factory!r}; expected factory(task, horizon).")
    _FAMILIES[family] = _Family(factory, tuple(tasks), expert, tuple(options))


def available_environments() -> list[str]:
    """Return the name of every task that is known by name, sorted; loads no simulator."""
    return sorted(f"{name}/{task}" for name, family in _FAMILIES.items() for task in family.tasks)


def make_environment(name: str, horizon: int | None = None) -> gymnasium.Env:
    """Build one environment.

    Args:
        name (`str`): `<family>/<task>[?option=value&…]`. Meta-World's options are `camera`, one or several of
            its cameras with commas between them, `size`, the side of their pictures [pixels], and `goal=hidden`,
            which leaves the goal out of the observation: what is to be done must then be known or be said.
        horizon (`int`, *optional*): steps after which an episode is truncated; defaults to the family's own.

    Raises:
        UnknownEnvironmentError: nobody registered the family, the task or the option.
        MissingSimulatorError: the simulator is not installed.
        MissingRendererError: a camera is asked for and nothing on this machine draws.
        InvalidEnvironmentError: the environment does not use dataset names.
    """
    family, task, options = _resolve(name)
    if horizon is not None and horizon < 1:
        raise InvalidEvaluationError(f"horizon = {horizon} leaves no step to take; expected at least 1.")
    environment = family.factory(task, horizon, **options)
    _check(name, environment)
    return environment


def make_environments(name: str, num_envs: int = 1, horizon: int | None = None) -> gymnasium.vector.SyncVectorEnv:
    """Build `num_envs` equal environments that step in lockstep; seeds are given at `reset(seed=[...])`.

    Finished environments are not reset behind the caller's back (`AutoresetMode.DISABLED`): a seed belongs to
    one episode. They share one process: a control step costs less than its transport to another.

    Raises:
        InvalidEvaluationError: `num_envs` or `horizon` below 1.
        UnknownEnvironmentError, MissingSimulatorError, InvalidEnvironmentError: as `make_environment`.
    """
    if num_envs < 1:
        raise InvalidEvaluationError(f"num_envs = {num_envs}; expected at least 1.")
    try:
        from gymnasium.vector import AutoresetMode, SyncVectorEnv
    except ImportError as error:
        raise MissingSimulatorError("gymnasium", error) from error
    factories = [partial(make_environment, name, horizon)] * num_envs
    return SyncVectorEnv(factories, autoreset_mode=AutoresetMode.DISABLED)


def describe_environment(name: str, horizon: int | None = None) -> EnvironmentSpec:
    """Return an environment's specification: features with names and units, rate, horizon, instruction."""
    environment = make_environment(name, horizon)
    try:
        return specification(environment)
    finally:
        environment.close()


def make_expert(name: str) -> Expert:
    """Return the scripted policy of an environment: one observation → one action (a,).

    Raises:
        UnknownEnvironmentError: nobody registered the family or the task.
        MissingExpertError: the family has no experts.
    """
    family, task, _ = _resolve(name)
    if family.expert is None:
        raise MissingExpertError(
            f"{name!r} has no scripted expert. Families with one: "
            f"{', '.join(sorted(key for key, value in _FAMILIES.items() if value.expert))}.\n"
            "Pass expert=<callable from observation to action>, or register one: "
            "register_environment(family, factory, expert=…)."
        )
    return family.expert(task)


def specification(environment: gymnasium.Env) -> EnvironmentSpec:
    """Return the `environment_spec` of an environment, however many wrappers it wears."""
    return environment.get_wrapper_attr("environment_spec")


def _resolve(name: str) -> tuple[_Family, str, dict[str, str]]:
    """Read a name: its family, its task, and its options as text."""
    path, _, query = str(name).partition("?")
    prefix, slash, task = path.partition("/")
    known = available_environments() or sorted(_FAMILIES)
    if not slash or not task:
        raise UnknownEnvironmentError(name, "it does not name a task.", known)
    if prefix not in _FAMILIES:
        families = ", ".join(sorted(_FAMILIES))
        raise UnknownEnvironmentError(name, f"no family {prefix!r} (registered: {families}).", known)
    family = _FAMILIES[prefix]
    if family.tasks and task not in family.tasks:
        raise UnknownEnvironmentError(name, f"the family {prefix!r} has no task {task!r}.", known)
    options = parse_qsl(query, keep_blank_values=True)
    for option, value in options:
        if option not in family.options:
            problem = f"the family {prefix!r} has no option {option!r}."
            raise UnknownEnvironmentError(name, problem, [f"{path}?{known}=…" for known in family.options] or known)
        if not value or len(dict(options)) < len(options):
            raise UnknownEnvironmentError(name, f"the option {option!r} needs one value.", known)
    return family, task, dict(options)


def _check(name: str, environment: gymnasium.Env) -> None:
    try:
        spec = specification(environment)
    except AttributeError:
        spec = None
    if not isinstance(spec, EnvironmentSpec):
        raise InvalidEnvironmentError(
            f"The environment {name!r} has no description of itself (found {spec!r}).\n"
            "Set self.environment_spec = EnvironmentSpec(name=…, task=…, features=…, fps=…, horizon=…)."
        )
    spaces = getattr(environment.observation_space, "spaces", None)
    if spaces is None or set(spaces) != set(spec.observation_features) or ACTION not in spec.features:
        given = sorted(spaces) if spaces is not None else environment.observation_space
        raise InvalidEnvironmentError(
            f"The observations of {name!r} are {given}; its specification has {sorted(spec.features)}.\n"
            "Use a gymnasium.spaces.Dict of exactly the specified observation features; specify 'action' too."
        )
