"""An episode of an evaluation: its outcome, and the errors that end it alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ManipulatorsError
from .outcome import reported_success
from .specification import specification

if TYPE_CHECKING:
    import gymnasium

logger = logging.getLogger(__name__)


@dataclass
class RolloutEpisode:
    """One episode of an evaluation, while it runs and afterwards.

    Args:
        seed: of the environment.
        success: it reported success at one of its steps.
        total_reward: sum of its rewards.
        length: steps taken.
        clipped: steps whose action left the action space.
        over: it takes no more steps.
        error: what its environment raised, or why an observation or a reward of it was impossible.
    """

    seed: int
    success: bool = False
    total_reward: float = 0.0
    length: int = 0
    clipped: int = 0
    over: bool = False
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return its row in `EvaluationResult.per_episode`."""
        row = {"seed": self.seed, "success": self.success, "return": self.total_reward, "length": self.length}
        return row if self.error is None else row | {"error": self.error}

    def begin(self, environment: gymnasium.Env) -> dict[str, np.ndarray] | None:
        """Reset the environment; return the first observation, None after an error."""
        with self._ended_by_errors(environment):
            observation, _ = environment.reset(seed=self.seed)
            return _checked(observation, environment)
        return None

    def step(self, environment: gymnasium.Env, action: np.ndarray) -> dict[str, np.ndarray] | None:
        """Apply an action (a,); return the next observation, None after an error."""
        with self._ended_by_errors(environment):
            spec = specification(environment)
            observation, reward, terminated, truncated, info = environment.step(action)
            solved, reward = reported_success(info, spec.name), float(reward)
            if not isfinite(reward):
                raise ValueError(f"the reward is {reward}")
            observation = _checked(observation, environment)
            self.success |= solved
            self.total_reward += reward
            self.length += 1
            self.over = bool(terminated or truncated or self.length == spec.horizon)
            return observation
        return None

    @contextmanager
    def _ended_by_errors(self, environment: gymnasium.Env) -> Iterator[None]:
        """End this episode, and only this one, with an error; those of this library concern every episode."""
        try:
            yield
        except ManipulatorsError:
            raise
        except Exception as error:
            self.success, self.over, self.error = False, True, f"{type(error).__name__}: {error}"
            name = specification(environment).name
            logger.warning(
                "The episode of seed %d in %s ended in an error and counts as failed: %s", self.seed, name, self.error
            )


def _checked(observation: Mapping[str, Any], environment: gymnasium.Env) -> dict[str, np.ndarray]:
    """Return an observation as arrays; a policy would refuse it together with those of other episodes."""
    arrays = {name: np.asarray(observation[name]) for name in environment.observation_space}
    for name, array in arrays.items():
        if array.shape != environment.observation_space[name].shape:
            raise ValueError(f"{name} has shape {array.shape}, not {environment.observation_space[name].shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite: {np.array2string(array, threshold=12)}")
    return arrays
