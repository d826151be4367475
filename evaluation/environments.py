"""Make environments by name, for recording, training and evaluation.

A name is `<family>/<task>`, with options as in a web address where the family has some:
`metaworld/pick-place-v3?camera=corner2&size=96`. (In a shell, put it in quotes.)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from ..configuration.features import ACTION
from ..errors import (
    InvalidEnvironmentError,
    InvalidEvaluationError,
    MissingExpertError,
    MissingSimulatorError,
    UnknownEnvironmentError,
    nearest,
)
from ..plugins import load_entry_points
from .registry import Family, registered_families
from .simulators import load_simulators
from .specification import EnvironmentSpec, specification

if TYPE_CHECKING:
    import gymnasium

    from .specification import Expert


def available_environments() -> list[str]:
    """Return the name of every task that is known by name, sorted; loads no simulator."""
    return sorted(f"{name}/{task}" for name, family in _families().items() for task in family.tasks)


def make_environment(name: str, horizon: int | None = None) -> gymnasium.Env:
    """Build one environment.

    Args:
        name (`str`): `<family>/<task>[?option=value&…]`. Families with cameras have the options `camera`, one or
            several of their cameras with commas between them, and `size`, the side of the pictures [pixels].
        horizon (`int`, *optional*): steps after which an episode is truncated; defaults to the family's own.

    Raises:
        UnknownEnvironmentError: the family, the task or the option is not registered.
        MissingSimulatorError: the simulator is not installed.
        MissingRendererError: a camera is asked for and no renderer works on this machine.
        InvalidEnvironmentError: the environment does not use dataset names.
    """
    family, task, options = _resolve(name)
    if horizon is not None and horizon < 1:
        raise InvalidEvaluationError(f"horizon = {horizon} leaves no step to take; expected at least 1.")
    environment = family.factory(task, family.horizon if horizon is None else horizon, **options)
    _check(name, environment)
    return environment


def make_environments(name: str, num_envs: int = 1, horizon: int | None = None) -> gymnasium.vector.SyncVectorEnv:
    """Build `num_envs` equal environments that step in lockstep; seeds are given at `reset(seed=[...])`.

    Finished environments are not reset automatically (`AutoresetMode.DISABLED`), because each episode has its own
    seed. All run in one process: a control step costs less than its transport to another.

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
        UnknownEnvironmentError: the family or the task is not registered.
        MissingExpertError: the family has no experts.
    """
    family, task, _ = _resolve(name)
    if family.expert is None:
        raise MissingExpertError(
            f"{name!r} has no scripted expert. Families with one: "
            f"{', '.join(sorted(key for key, value in _families().items() if value.expert))}.\n"
            "Pass expert=<callable from observation to action>, or register one: "
            "register_environment(family, factory, expert=…)."
        )
    return family.expert(task)


def _families() -> dict[str, Family]:
    """Return all families, once this library's simulators and the installed plugins have registered theirs."""
    load_simulators()
    load_entry_points()
    return registered_families()


def _resolve(name: str) -> tuple[Family, str, dict[str, Any]]:
    """Read a name: its family, its task, and the factory's options."""
    path, _, query = str(name).partition("?")
    prefix, slash, task = path.partition("/")
    families = _families()
    known = available_environments() or sorted(families)
    if not slash or not task:
        raise UnknownEnvironmentError(name, "it does not name a task.", known)
    if prefix not in families:
        problem = f"no family {prefix!r} (registered: {', '.join(sorted(families))})."
        raise UnknownEnvironmentError(name, problem, known)
    family = families[prefix]
    if family.tasks and task not in family.tasks:
        raise UnknownEnvironmentError(name, f"the family {prefix!r} has no task {task!r}.", known)
    options = parse_qsl(query, keep_blank_values=True)
    for option, value in options:
        if option not in family.all_options:
            problem = f"the family {prefix!r} has no option {option!r}."
            examples = [f"{path}?{other}=…" for other in family.all_options]
            raise UnknownEnvironmentError(name, problem, examples or known)
        if not value or len(dict(options)) < len(options):
            raise UnknownEnvironmentError(name, f"the option {option!r} needs one value.", known)
    return family, task, _camera_options(family, dict(options)) if family.cameras else dict(options)


def _camera_options(family: Family, options: dict[str, str]) -> dict[str, Any]:
    """Return the options with `camera` and `size` as the factory takes them."""
    example = f"?camera={family.cameras[0]}&size=96"
    read: dict[str, Any] = {option: value for option, value in options.items() if option not in ("camera", "size")}
    if "camera" in options:
        read["cameras"] = tuple(options["camera"].split(","))
        for camera in read["cameras"]:
            if camera not in family.cameras:
                raise InvalidEvaluationError(f"There is no camera {camera!r}. {nearest(camera, family.cameras)}")
        if len(set(read["cameras"])) < len(read["cameras"]):
            raise InvalidEvaluationError(f"camera={options['camera']}: a camera is named twice.")
    if "size" in options:
        if not options["size"].isdecimal():
            raise InvalidEvaluationError(f"size={options['size']} is no number of pixels; write {example}.")
        if "camera" not in options:
            example = f"?camera={family.cameras[0]}&size={options['size']}"
            raise InvalidEvaluationError(f"size={options['size']} is of no camera; write {example}.")
        read["size"] = int(options["size"])
    return read


def _check(name: str, environment: gymnasium.Env) -> None:
    try:
        spec = specification(environment)
    except AttributeError:
        spec = None
    if not isinstance(spec, EnvironmentSpec):
        raise InvalidEnvironmentError(
            f"The environment {name!r} has no environment_spec (found {spec!r}).\n"
            "Set self.environment_spec = EnvironmentSpec(name=…, task=…, features=…, fps=…, horizon=…)."
        )
    spaces = getattr(environment.observation_space, "spaces", None)
    if spaces is None or set(spaces) != set(spec.observation_features) or ACTION not in spec.features:
        given = sorted(spaces) if spaces is not None else environment.observation_space
        raise InvalidEnvironmentError(
            f"The observations of {name!r} are {given}; its specification has {sorted(spec.features)}.\n"
            "Use a gymnasium.spaces.Dict of exactly the specified observation features; specify 'action' too."
        )
