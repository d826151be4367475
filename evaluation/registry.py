"""The registry of environments: family → how its environments are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InvalidEnvironmentError

if TYPE_CHECKING:
    import gymnasium

    from .specification import Expert

CAMERA_OPTIONS = ("camera", "size")  # of every family that has cameras


@dataclass(frozen=True)
class Family:
    """Hold the arguments of `register_environment`."""

    factory: Callable[..., gymnasium.Env]
    tasks: tuple[str, ...] = ()
    expert: Callable[[str], Expert] | None = None
    options: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    horizon: int | None = None

    @property
    def all_options(self) -> tuple[str, ...]:
        """Every option that a name may have."""
        return (*(CAMERA_OPTIONS if self.cameras else ()), *self.options)


_FAMILIES: dict[str, Family] = {}


def register_environment(
    family: str,
    factory: Callable[..., gymnasium.Env],
    tasks: Iterable[str] = (),
    expert: Callable[[str], Expert] | None = None,
    options: Iterable[str] = (),
    cameras: Iterable[str] = (),
    horizon: int | None = None,
) -> None:
    """Add a family of environments, or replace one, for every place that takes an environment's name.

    Args:
        family (`str`): the part of the name before the slash.
        factory (`Callable`): `factory(task, horizon)` → `gymnasium.Env`. Its observation is a `Dict` space under
            dataset names (`observation.state`, …), its action a `Box`, its attribute `environment_spec` an
            `EnvironmentSpec`, and every `step` reports `info["success"]`. Where it can be filmed, `render()` returns
            uint8 (h, w, 3).
        tasks (`Iterable[str]`, *optional*): the tasks that exist; without them every task reaches the factory.
        expert (`Callable`, *optional*): `expert(task)` → a callable from one observation to one action (a,).
        options (`Iterable[str]`, *optional*): what may follow the task in a name, `?option=value&…`; passed to the
            factory by keyword, as text.
        cameras (`Iterable[str]`, *optional*): the cameras that can be asked for, `?camera=front,wrist&size=96`; the
            factory then gets `cameras=("front", "wrist")` and `size=96` [pixels], each only where the name has it.
        horizon (`int`, *optional*): steps after which an episode is truncated, where the caller asks for no other
            number. Without it the factory may get `horizon=None`.

    Raises:
        InvalidEnvironmentError: the family's name is empty or holds a slash, the factory cannot be called, or the
            horizon is below 1.
    """
    if not isinstance(family, str) or not family or "/" in family:
        raise InvalidEnvironmentError(f"{family!r} cannot name a family: expected a non-empty str without '/'.")
    if not callable(factory):
        raise InvalidEnvironmentError(f"The factory of {family!r} is {factory!r}; expected factory(task, horizon).")
    if horizon is not None and horizon < 1:
        raise InvalidEnvironmentError(f"The horizon of {family!r} is {horizon}; expected at least 1 step.")
    _FAMILIES[family] = Family(factory, tuple(tasks), expert, tuple(options), tuple(cameras), horizon)


def registered_families() -> dict[str, Family]:
    """Return the families registered so far, by name."""
    return dict(_FAMILIES)
