"""Line: a cart that has to reach 5 m, with a camera on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..registry import register_environment
from ..specification import EnvironmentSpec

if TYPE_CHECKING:
    import gymnasium


def _make(task: str, horizon: int, cameras: tuple[str, ...] = (), size: int = 32) -> gymnasium.Env:
    import gymnasium
    from gymnasium.spaces import Box, Dict

    class Line(gymnasium.Env):
        """Move a cart by its velocity."""

        def __init__(self):
            features = {"observation.state": {"dtype": "float32", "shape": [1], "names": ["position"], "units": ["m"]}}
            for camera in cameras:
                features[f"observation.images.{camera}"] = {"dtype": "video", "shape": [size, size, 3]}
            features["action"] = {"dtype": "float32", "shape": [1], "names": ["velocity"], "units": ["m"]}
            name = f"line/{task}" + (f"?camera={','.join(cameras)}&size={size}" if cameras else "")
            self.environment_spec = EnvironmentSpec(name, "Go right.", features, fps=10, horizon=horizon)
            spaces = {"observation.state": Box(-np.inf, np.inf, (1,), np.float32)}
            spaces |= {f"observation.images.{camera}": Box(0, 255, (size, size, 3), np.uint8) for camera in cameras}
            self.observation_space, self.action_space = Dict(spaces), Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.position, self.steps = float(seed % 3), 0
            return self.observe(), {}

        def step(self, action):
            self.position, self.steps = self.position + float(action[0]), self.steps + 1
            success = self.position >= 5
            return self.observe(), 0.0, success, self.steps >= horizon, {"success": success}

        def observe(self):
            picture = np.full((size, size, 3), 20 * self.position, np.uint8)
            pictures = {f"observation.images.{camera}": picture for camera in cameras}
            return {"observation.state": np.array([self.position], np.float32)} | pictures

    return Line()


register_environment(
    "line", _make, tasks=["right"], cameras=["front"], horizon=12, expert=lambda _: lambda _: np.ones(1)
)
