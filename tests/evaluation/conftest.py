"""A world small enough to be computed by hand: a cart on a line that has to reach 5; and the need for a renderer."""

import os

import numpy as np
import pytest
from gymnasium import Env
from gymnasium.spaces import Box, Dict

from manipulators.errors import MissingRendererError
from manipulators.evaluation import registry
from manipulators.evaluation.environments import available_environments
from manipulators.evaluation.registry import register_environment
from manipulators.evaluation.specification import EnvironmentSpec

FEATURES = {
    "observation.state": {"dtype": "float32", "shape": [1], "names": ["position"], "units": ["m"]},
    "action": {"dtype": "float32", "shape": [1], "names": ["velocity"], "units": ["m"]},
}


class LineEnvironment(Env):
    """Start at seed % 5; each step adds the action (at most 1) and pays it as reward; 5 is success."""

    def __init__(self, task, horizon):
        self.environment_spec = EnvironmentSpec(
            name=f"line/{task}",
            task="Go right.",
            features=FEATURES,
            fps=10,
            horizon=horizon or 8,
            simulator="line 1.0",
        )
        self.observation_space = Dict({"observation.state": Box(-np.inf, np.inf, (1,), np.float32)})
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.over = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps, self.over = seed % 5, 0, False
        return self._observation(), {}

    def step(self, action):
        assert not self.over, "a finished episode was stepped"
        self.position += float(action[0])
        self.steps += 1
        success = self.position >= 5
        truncated = self.steps >= self.environment_spec.horizon and not success
        self.over = success or truncated
        return self._observation(), float(action[0]), success, truncated, {"success": success}

    def render(self):
        """Grey level 20 · position, 16 × 17 pixels; until 0 black."""
        return np.full((16, 17, 3), 20 * max(self.position, 0), np.uint8)

    def _observation(self):
        return {"observation.state": np.array([self.position], np.float32)}


@pytest.fixture
def line(monkeypatch):
    """Register the family `line` for one test, with an expert that never leaves 0 and asks for too much."""
    available_environments()  # what registers itself does so before the table is copied
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    register_environment(
        "line",
        LineEnvironment,
        tasks=["right"],
        expert=lambda task: lambda observation: np.array([0.0 if observation["observation.state"][0] == 0 else 4.0]),
    )
    return "line/right"


@pytest.fixture(scope="session")
def renderer():
    """The need for a renderer: without one, tests fail in CI, which has one, and are skipped elsewhere."""
    from manipulators.evaluation.simulators.metaworld.environment import MetaWorldEnvironment

    environment = MetaWorldEnvironment("reach-v3")
    try:
        environment.reset(seed=0)
        environment.render()
    except MissingRendererError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    finally:
        environment.close()
