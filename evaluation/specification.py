"""EnvironmentSpec: the description that an environment carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..configuration.features import ACTION

if TYPE_CHECKING:
    import gymnasium
    import numpy as np

    Expert = Callable[[dict[str, np.ndarray]], np.ndarray]  # one observation → one action (a,)


@dataclass(frozen=True)
class EnvironmentSpec:
    """Describe an environment in the words of a dataset, so that recordings of it need no further description.

    Args:
        name (`str`): the name, options included, by which the environment can be made again.
        task (`str`): the instruction, as a sentence for a policy that reads language.
        features (`dict[str, dict]`): one entry per observation feature and one for `action`, each
            `{"dtype": "float32", "shape": [width], "names": [...], "units": [...]}`; a camera is named
            `observation.images.<camera>` and is `{"dtype": "video", "shape": [height, width, 3], ...}`.
        fps (`int`): control steps per second of simulated time [1/s].
        horizon (`int`): steps after which an episode is truncated.
        robot_type (`str`, *optional*): the robot, as a dataset's metadata names it.
        simulator (`str`, *optional*): the simulator with its version, kept with every result.
    """

    name: str
    task: str
    features: dict[str, dict]
    fps: int
    horizon: int
    robot_type: str | None = None
    simulator: str | None = None

    @property
    def observation_features(self) -> dict[str, dict]:
        """The features an observation consists of, by name."""
        return {name: feature for name, feature in self.features.items() if name != ACTION}

    @property
    def action_feature(self) -> dict:
        """Width, names and units of an action."""
        return self.features[ACTION]


def specification(environment: gymnasium.Env) -> EnvironmentSpec:
    """Return the `environment_spec` of an environment, also through wrappers."""
    return environment.get_wrapper_attr("environment_spec")
