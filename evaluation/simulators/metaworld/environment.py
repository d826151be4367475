"""Meta-World's manipulation tasks: seeded resets, a visible goal, observations under dataset names."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from ....configuration.features import ENVIRONMENT_STATE, IMAGE_PREFIX, STATE
from ....errors import (
    InvalidActionError,
    InvalidEvaluationError,
    MissingSimulatorError,
    UnknownEnvironmentError,
    nearest,
)
from ...specification import EnvironmentSpec
from .tasks import CAMERAS, INSTRUCTIONS, features

try:
    import gymnasium
    from gymnasium.spaces import Box, Dict
    from metaworld.env_dict import ENV_CLS_MAP
    from metaworld.policies import ENV_POLICY_MAP
except ImportError as error:
    raise MissingSimulatorError("Meta-World", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...rendering import SceneRenderer

HORIZON = 200
STATE_WIDTH = 4
CLOSING = 1.0  # the gripper's effort of a robot without one
IMAGE_SIZE = 96
VIEW_CAMERA, VIEW_SIZE = "corner2", 240  # of `render`, which is for people


class MetaWorldEnvironment(gymnasium.Env):
    """One Meta-World task on a Sawyer arm that is steered by hand displacements.

    Observations are float32: `observation.state` (4,), the hand's position [m] and the gripper's opening, 0
    to 1; `observation.environment_state` (35,), objects, the previous frame and the goal; and of every camera
    `observation.images.<camera>` uint8 (size, size, 3), upright, without shadows. Actions are (4,) in [-1, 1]:
    the displacement of the hand's target [cm] and the gripper's effort. `environment_spec` names every number
    with its unit. An episode terminates at success and is truncated at the horizon; the simulator runs at 80
    control steps per second.

    Args:
        task (`str`): Meta-World's name, for example `pick-place-v3`.
        horizon (`int`, *optional*, defaults to 200): steps after which an episode is truncated.
        cameras (`Sequence[str]`, *optional*): the cameras to render; without any, no renderer is needed.
        size (`int`, *optional*, defaults to 96): side of a picture [pixels].
        goal_visible (`bool`, *optional*, defaults to True): put the goal into the environment's state; otherwise
            it has zeros there.
        has_gripper (`bool`, *optional*, defaults to True): without, the fingers stay closed, and the robot is steered
            by (3,): state and action end before the gripper.

    Raises:
        UnknownEnvironmentError: Meta-World has no such task.
        InvalidEvaluationError: the horizon is below 1, a camera does not exist, or the size cannot be rendered.
        MissingRendererError: cameras are asked for and no renderer works on this machine.

    Source: Yu et al., "Meta-World", CoRL 2019, arXiv:1910.10897; the simulator is the package `metaworld`.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(
        self,
        task: str,
        horizon: int = HORIZON,
        cameras: Sequence[str] = (),
        size: int = IMAGE_SIZE,
        goal_visible: bool = True,
        has_gripper: bool = True,
    ):
        if horizon < 1:
            raise InvalidEvaluationError(f"horizon = {horizon} leaves no step to take; expected at least 1.")
        self.cameras, self.size, self.has_gripper = tuple(cameras), size, has_gripper
        _check_cameras(self.cameras)
        self._renderer: SceneRenderer | None = None
        self.simulator = _build(task, horizon, goal_visible)
        if self.cameras:
            largest = self._drawing().max_size
            if not 2 <= size <= largest or size % 2:
                self.close()
                raise InvalidEvaluationError(
                    f"size = {size} pixels cannot be drawn and kept as video; expected an even number up to {largest}."
                )
        options = [f"camera={','.join(self.cameras)}&size={size}"] if self.cameras else []
        options += [] if goal_visible else ["goal=hidden"]
        options += [] if has_gripper else ["gripper=none"]
        self.environment_spec = EnvironmentSpec(
            name=f"metaworld/{task}" + ("?" + "&".join(options) if options else ""),
            task=INSTRUCTIONS.get(task, f"{task.rsplit('-v', 1)[0].replace('-', ' ').capitalize()}."),
            features=features(self.cameras, size, has_gripper),
            fps=round(1 / self.simulator.dt),
            horizon=horizon,
            robot_type="sawyer" if has_gripper else "sawyer_without_gripper",
            simulator=f"metaworld {version('metaworld')}, mujoco {version('mujoco')}",
        )
        self.observation_space = Dict(
            {
                name: Box(0, 255, tuple(feature["shape"]), np.uint8)
                if name.startswith(IMAGE_PREFIX)
                else Box(-np.inf, np.inf, tuple(feature["shape"]), np.float32)
                for name, feature in self.environment_spec.observation_features.items()
            }
        )
        self.action_space = Box(-1.0, 1.0, tuple(self.environment_spec.action_feature["shape"]), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
        """Start an episode; the same seed gives the same bits, whatever this object has simulated before.

        Without a seed one is drawn, and `info["seed"]` has it.
        """
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.simulator.seed(seed)
        values, _ = self.simulator.reset()
        return self._observe(values), {"seed": seed, "success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """Apply one action (4,); `info["success"]` is a bool and ends the episode.

        Raises:
            InvalidActionError: the action has another shape, or holds NaN or infinity.
        """
        action = np.asarray(action, dtype=np.float32)
        # MuJoCo would reset itself on NaN without an error, and the episode would go on.
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            names = self.environment_spec.action_feature["names"]
            raise InvalidActionError(
                f"{self.environment_spec.name} got the action {action.tolist()}; expected {len(names)} finite numbers "
                f"in [-1, 1]: {', '.join(names)}."
            )
        if not self.has_gripper:
            action = np.append(action, np.float32(CLOSING))
        values, reward, _, truncated, info = self.simulator.step(action)
        success = bool(info["success"])
        info = {**info, "success": success}
        return self._observe(values), float(reward), success, truncated and not success, info

    def render(self) -> np.ndarray:
        """Return a picture for people, uint8 (240, 240, 3), from the first camera (corner2 without cameras).

        Raises:
            MissingRendererError: no renderer works on this machine.
        """
        return self._draw(self.cameras[0] if self.cameras else VIEW_CAMERA, VIEW_SIZE)

    def close(self) -> None:
        """Release the simulator and its renderer."""
        if self._renderer is not None:
            from ...rendering import release

            release(self._renderer)
            self._renderer = None
        self.simulator.close()

    def _observe(self, values: np.ndarray) -> dict[str, np.ndarray]:
        values = values.astype(np.float32)  # (39,)
        width = STATE_WIDTH if self.has_gripper else STATE_WIDTH - 1
        observation = {STATE: values[:width], ENVIRONMENT_STATE: values[STATE_WIDTH:]}
        return observation | {IMAGE_PREFIX + camera: self._draw(camera, self.size) for camera in self.cameras}

    def _draw(self, camera: str, size: int) -> np.ndarray:
        pixels = self._drawing().render(self.simulator.model, self.simulator.data, camera, size)  # (size, size, 3)
        return np.ascontiguousarray(pixels[::-1, ::-1] if CAMERAS[camera] else pixels)

    def _drawing(self) -> SceneRenderer:
        if self._renderer is None:
            # Imported on first use: an environment without cameras needs no renderer.
            from ...rendering import shared_renderer

            self._renderer = shared_renderer(self.simulator.model_name, self.simulator.model)
        return self._renderer


def expert(task: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Return Meta-World's scripted policy of a task: one observation → action (4,), float32, in [-1, 1].

    For a robot without a gripper, whose state is (3,), the action is (3,).

    Raises:
        UnknownEnvironmentError: Meta-World has no such task.
    """
    policy = _lookup(ENV_POLICY_MAP, task)()

    def act(observation: dict[str, np.ndarray]) -> np.ndarray:
        state = observation[STATE]
        missing = np.zeros(STATE_WIDTH - len(state), dtype=state.dtype)  # the opening of fingers that are closed
        parts = [state, missing, observation[ENVIRONMENT_STATE]]
        values = np.concatenate(parts).astype(np.float64)  # (39,)
        with warnings.catch_warnings():
            # It warns about every action outside the action space, which most of its actions are.
            warnings.simplefilter("ignore")
            action = policy.get_action(values)
        return np.clip(action[: len(state)], -1.0, 1.0).astype(np.float32)  # (4,), or (3,)

    return act


def _check_cameras(cameras: Sequence[str]) -> None:
    for camera in cameras:
        if camera not in CAMERAS:
            raise InvalidEvaluationError(f"Meta-World has no camera {camera!r}. {nearest(camera, CAMERAS)}")
    if len(set(cameras)) < len(cameras):
        raise InvalidEvaluationError(f"A camera is named twice: {', '.join(cameras)}.")


def _build(task: str, horizon: int, goal_visible: bool):
    simulator = _lookup(ENV_CLS_MAP, task)()
    # Random positions are drawn at every reset, from the generator that `seed` fills. (The defaults freeze
    # them, or draw from numpy's global state.)
    simulator._freeze_rand_vec = False
    simulator.seeded_rand_vec = True
    simulator._set_task_called = True
    # Observations are clipped to a space that was cached while the goal was hidden, with room for zeros only: it
    # must be made anew.
    simulator._partially_observable = not goal_visible
    vars(simulator).pop("sawyer_observation_space", None)
    simulator.max_path_length = horizon
    return simulator


def _lookup(table: dict, task: str):
    if task not in table:
        known = [f"metaworld/{name}" for name in table]
        raise UnknownEnvironmentError(f"metaworld/{task}", f"Meta-World has no task {task!r}.", known)
    return table[task]
