"""A user's own simulator and policy, written with public names only; test_plugins.py puts this file elsewhere."""

import numpy as np
import torch
from gymnasium import Env
from gymnasium.spaces import Box, Dict
from torch import nn

from manipulators import BasePolicyModel, EnvironmentSpec, PolicyConfig, register_environment

# --- the simulator: a cart on a line that has to reach 5 --------------------------------------------------


class Line(Env):
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

# --- the policy: one linear layer -------------------------------------------------------------------------


class ToyConfig(PolicyConfig):
    model_type = "toy_policy"
    chunk_size: int = 4

    @property
    def action_horizon(self):
        return self.chunk_size

    n_action_steps = action_horizon


@BasePolicyModel.register("toy_policy")
class ToyPolicy(BasePolicyModel):
    def __init__(self, config: ToyConfig):
        super().__init__()
        self.layer = nn.Linear(config.state_dim, config.chunk_size * config.action_dim)

    def forward(self, batch, train=True, **kwargs):
        return self.layer(batch["observation.state"]).unflatten(-1, (self.config.chunk_size, self.config.action_dim))

    def calc_loss(self, batch):
        return torch.nn.functional.mse_loss(self.forward(batch), batch["action"])

    def inference(self, batch):
        return {"action_pred": self.forward(batch)}
