"""Meta-World's manipulation tasks: seeded resets, a visible goal, observations under dataset names."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from ..configuration.features import ENVIRONMENT_STATE, STATE
from ..errors import (
    InvalidActionError,
    InvalidEvaluationError,
    MissingSimulatorError,
    UnknownEnvironmentError,
)
from .environments import EnvironmentSpec
from .metaworld_tasks import INSTRUCTIONS, features

try:
    import gymnasium
    from gymnasium.spaces import Box, Dict
    from metaworld.env_dict import ENV_CLS_MAP
    from metaworld.policies import ENV_POLICY_MAP
except ImportError as error:
    raise MissingSimulatorError("Meta-World", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable

HORIZON = 200
STATE_WIDTH = 4


class MetaWorldEnvironment(gymnasium.Env):
    """One Meta-World task on a Sawyer arm that is steered by hand displacements.

    Observations are float32: `observation.state` (4,), the hand's position [m] and the gripper's opening, 0
    to 1; `observation.environment_state` (35,), objects, the previous frame and the goal. Actions are (4,) in
    [-1, 1]: the displacement of the hand's target [cm] and the gripper's effort. `environment_spec` names
    every number with its unit. An episode terminates at success and is truncated at the horizon; the
    simulator runs at 80 control steps per second.

    Args:
        task (`str`): Meta-World's name, for example `pick-place-v3`.
        horizon (`int`, *optional*, defaults to 200): steps after which an episode is truncated.

    Raises:
        UnknownEnvironmentError: Meta-World has no such task.
        InvalidEvaluationError: the horizon is below 1.

    Source: Yu et al., "Meta-World", CoRL 2019, arXiv:1910.10897; the simulator is the package `metaworld`.
    """

    metadata = {"render_modes": []}

    def __init__(self, task: str, horizon: int = HORIZON):
        if horizon < 1:
            raise InvalidEvaluationError(f"horizon = {horizon} leaves no step to take; expected at least 1.")
        self.simulator = _build(task, horizon)
        self.environment_spec = EnvironmentSpec(
            name=f"metaworld/{task}",
            task=INSTRUCTIONS.get(task, f"{task.rsplit('-v', 1)[0].replace('-', ' ').capitalize()}."),
            features=features(),
            fps=round(1 / self.simulator.dt),
            horizon=horizon,
            robot_type="sawyer",
            simulator=f"metaworld {version('metaworld')}, mujoco {version('mujoco')}",
        )
        self.observation_space = Dict(
            {
                name: Box(-np.inf, np.inf, tuple(feature["shape"]), np.float32)
                for name, feature in self.environment_spec.observation_features.items()
            }
        )
        self.action_space = Box(-1.0, 1.0, tuple(self.environment_spec.action_feature["shape"]), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
        """Start an episode; the same seed gives the same bits, whatever this object has simulated before.

        Without a seed one is drawn; `info["seed"]` tells which.
        """
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.simulator.seed(seed)
        values, _ = self.simulator.reset()
        return _observe(values), {"seed": seed, "success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """Apply one action (4,); `info["success"]` is a bool and ends the episode.

        Raises:
            InvalidActionError: the action has another shape, or holds NaN or infinity.
        """
        action = np.asarray(action, dtype=np.float32)
        # The simulator would not complain: MuJoCo resets itself on NaN, and the episode goes on as if nothing
        # had happened.
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise InvalidActionError(
                f"{self.environment_spec.name} got the action {action.tolist()}; expected 4 finite numbers "
                "in [-1, 1]: hand_delta_x, hand_delta_y, hand_delta_z, gripper_effort."
            )
        values, reward, _, truncated, info = self.simulator.step(action)
        success = bool(info["success"])
        info = {**info, "success": success}
        return _observe(values), float(reward), success, truncated and not success, info

    def close(self) -> None:
        """Release the simulator."""
        self.simulator.close()


def expert(task: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return Meta-World's scripted policy of a task: one observation → action (4,), float32, in [-1, 1].

    Raises:
        UnknownEnvironmentError: Meta-World has no such task.
    """
    policy = _lookup(ENV_POLICY_MAP, task)()

    def act(observation: dict[str, np.ndarray]) -> np.ndarray:
        parts = [observation[STATE], observation[ENVIRONMENT_STATE]]
        values = np.concatenate(parts).astype(np.float64)  # (39,)
        with warnings.catch_warnings():
            # It warns whenever it asks for more than the action space holds, which is most of the time.
            warnings.simplefilter("ignore")
            action = policy.get_action(values)
        return np.clip(action, -1.0, 1.0).astype(np.float32)  # (4,)

    return act


def _observe(values: np.ndarray) -> dict[str, np.ndarray]:
    # Cameras join here and in `metaworld_tasks.features`: one `observation.images.<camera>` per view.
    values = values.astype(np.float32)  # (39,)
    return {STATE: values[:STATE_WIDTH], ENVIRONMENT_STATE: values[STATE_WIDTH:]}


def _build(task: str, horizon: int):
    simulator = _lookup(ENV_CLS_MAP, task)()
    # Random positions are drawn at every reset, from the generator that `seed` fills. (The defaults freeze
    # them, or draw from numpy's global state.)
    simulator._freeze_rand_vec = False
    simulator.seeded_rand_vec = True
    simulator._set_task_called = True
    # Show the goal. Observations are clipped to a space that was cached while the goal was hidden, with room
    # for zeros only: it must be made anew.
    simulator._partially_observable = False
    vars(simulator).pop("sawyer_observation_space", None)
    simulator.max_path_length = horizon
    return simulator


def _lookup(table: dict, task: str):
    if task not in table:
        known = [f"metaworld/{name}" for name in table]
        raise UnknownEnvironmentError(f"metaworld/{task}", f"Meta-World has no task {task!r}.", known)
    return table[task]
