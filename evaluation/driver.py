"""Drive a group of environments, side by side, with one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import InvalidActionError
from .rollout_video import Film
from .specification import EnvironmentSpec

if TYPE_CHECKING:
    import gymnasium

    from .episode import RolloutEpisode


@dataclass
class Driver:
    """Call the pipeline for a batch of environments; check and time its actions."""

    pipeline: Callable
    space: object
    spec: EnvironmentSpec
    task: str
    seconds: float = 0.0
    calls: int = 0

    def run(
        self,
        environments: Sequence[gymnasium.Env],
        group: Sequence[RolloutEpisode],
        film: Film,
        when_some_ended: Callable[[], None],
    ) -> None:
        """Run a group of episodes to their ends, side by side; those that are over only keep their places."""
        self.pipeline.reset()
        torch.manual_seed(group[0].seed)
        # One by one, because the vector's own `step` cannot skip a finished environment.
        rows = list(zip(environments, group, strict=False))
        observations = [None if episode.over else episode.begin(environment) for environment, episode in rows]
        film.begin(environments, group)
        running = [episode for episode in group if not episode.over]
        when_some_ended()
        while running:
            _fill(observations)
            actions = self.act(observations)  # (b, a)
            try:
                for row, (environment, episode) in enumerate(rows):
                    if not episode.over:
                        action = self.bounded(actions[row], episode)  # (a,)
                        observations[row] = episode.step(environment, action) or observations[row]
            finally:
                if any(episode.over for episode in running):
                    when_some_ended()
            running = [episode for episode in running if not episode.over]
            film.add(environments, group)

    def act(self, observations: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """Return the actions (b, a), float32, as the pipeline gave them."""
        # The policy refuses features it was not trained on, and an environment may have more of them.
        names = getattr(self.pipeline, "observation_names", observations[0].keys())
        batch = {name: np.stack([row[name] for row in observations]) for name in observations[0] if name in names}
        began = perf_counter()
        actions = self.pipeline(batch, task=[self.task] * len(observations))
        # The copy to the host waits for the accelerator, so it belongs to the time of the call.
        actions = torch.as_tensor(actions).detach().to("cpu", torch.float32).numpy()  # (b, a)
        self.seconds += perf_counter() - began
        self.calls += 1
        expected = (len(observations), *self.space.shape)
        if actions.shape != expected:
            raise InvalidActionError(
                f"The pipeline returned actions of shape {actions.shape} for {self.spec.name}; "
                f"expected {expected}: environments × ({', '.join(self.spec.action_feature['names'])})."
            )
        return actions

    def bounded(self, action: np.ndarray, episode: RolloutEpisode) -> np.ndarray:
        """Return one action (a,) inside the action space; count it when it had to be clipped."""
        if not np.isfinite(action).all():
            raise InvalidActionError(
                f"The pipeline returned {action.tolist()} at step {episode.length} of seed {episode.seed} in "
                f"{self.spec.name}; expected finite numbers.\n"
                "Check the weights and the processor's statistics: torch.isfinite(weight).all() for each "
                "weight, no std of 0 or NaN."
            )
        clipped = np.clip(action, self.space.low, self.space.high)
        episode.clipped += int(not np.array_equal(clipped, action))
        return clipped


def _fill(observations: list[dict[str, np.ndarray] | None]) -> None:
    """Give rows without an observation that of another row: they keep their place in the batch and do nothing."""
    given = next(observation for observation in observations if observation is not None)
    observations[:] = [given if observation is None else observation for observation in observations]
