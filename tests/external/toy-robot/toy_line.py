"""A simulator in a package of its own: a cart on a line that has to reach 5 m, with a camera on request."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from manipulators import EnvironmentSpec, register_environment


class Line(gymnasium.Env):
    """Move a cart by its velocity."""

    def __init__(self, task, horizon, cameras=(), size=32):
        self.cameras, self.size = cameras, size
        features = {"observation.state": {"dtype": "float32", "shape": [1], "names": ["position"], "units": ["m"]}}
        for camera in cameras:
            features[f"observation.images.{camera}"] = {"dtype": "video", "shape": [size, size, 3]}
        features["action"] = {"dtype": "float32", "shape": [1], "names": ["velocity"], "units": ["m"]}
        name = f"toy_line/{task}" + (f"?camera={','.join(cameras)}&size={size}" if cameras else "")
        self.environment_spec = EnvironmentSpec(name, "Go right.", features, fps=10, horizon=horizon)
        spaces = {"observation.state": Box(-np.inf, np.inf, (1,), np.float32)}
        spaces |= {f"observation.images.{camera}": Box(0, 255, (size, size, 3), np.uint8) for camera in cameras}
        self.observation_space = Dict(spaces)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = float(seed % 3), 0
        return self.observe(), {}

    def step(self, action):
        self.position, self.steps = self.position + float(action[0]), self.steps + 1
        success = self.position >= 5
        return self.observe(), 0.0, success, self.steps >= self.environment_spec.horizon, {"success": success}

    def render(self):
        return np.full((self.size, self.size, 3), 20 * self.position, np.uint8)

    def observe(self):
        state = {"observation.state": np.array([self.position], np.float32)}
        return state | {f"observation.images.{camera}": self.render() for camera in self.cameras}


register_environment(
    "toy_line", Line, tasks=["right"], cameras=["front"], horizon=12, expert=lambda task: lambda seen: np.ones(1)
)
