"""Meta-World: 50 manipulation tasks on a Sawyer arm (Yu et al., CoRL 2019, arXiv:1910.10897).

`?camera=corner2&size=96` adds cameras; `?goal=hidden` leaves the goal out of the observation, so that only an
instruction says what to do. `?gripper=none` is a robot with closed fingers, whose states and actions are 3 wide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ....errors import InvalidEvaluationError
from ...registry import register_environment
from .tasks import CAMERAS, INSTRUCTIONS

if TYPE_CHECKING:
    import gymnasium

    from ...specification import Expert


def _make(task: str, horizon: int, goal: str = "visible", gripper: str = "free", **cameras: Any) -> gymnasium.Env:
    from .environment import MetaWorldEnvironment

    if goal not in ("visible", "hidden"):
        raise InvalidEvaluationError(f"goal={goal} is neither goal=visible nor goal=hidden.")
    if gripper not in ("free", "none"):
        raise InvalidEvaluationError(f"gripper={gripper} is neither gripper=free nor gripper=none.")
    return MetaWorldEnvironment(
        task, horizon, goal_visible=goal == "visible", has_gripper=gripper == "free", **cameras
    )


def _expert(task: str) -> Expert:
    from .environment import expert

    return expert(task)


register_environment(
    "metaworld", _make, tasks=INSTRUCTIONS, expert=_expert, options=["goal", "gripper"], cameras=CAMERAS, horizon=200
)
