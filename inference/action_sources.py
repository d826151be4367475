"""Where the next action comes from: the queue of a predicted chunk, or the average of overlapping chunks."""

from __future__ import annotations

from collections import deque

import torch

from ..configuration.policy import PolicyConfig


def action_source(config: PolicyConfig) -> ActionQueue | TemporalEnsembler:
    """Return where a policy's next action comes from, as its config says."""
    coefficient = getattr(config, "temporal_ensemble_coeff", None)
    if coefficient is None:
        return ActionQueue(config.n_action_steps)
    return TemporalEnsembler(coefficient, config.action_horizon)


class ActionQueue:
    """Hand out the first `n_action_steps` actions of a chunk, one per step, then ask for the next chunk."""

    def __init__(self, n_action_steps: int):
        self.n_action_steps = n_action_steps
        self._queue: deque[torch.Tensor] = deque()

    @property
    def queued(self) -> int:
        """How many actions can be popped before a chunk must be pushed."""
        return len(self._queue)

    def push(self, chunk: torch.Tensor) -> None:
        """Queue the actions of a chunk (b, h, a) that are to be executed."""
        self._queue.extend(chunk[:, : self.n_action_steps].unbind(1))  # (b, a) each

    def pop(self) -> torch.Tensor:
        """Return the next action (b, a)."""
        return self._queue.popleft()

    def reset(self) -> None:
        """Forget what is queued."""
        self._queue.clear()


class TemporalEnsembler:
    """Average, for every step, all chunks that predicted it, with weights exp(−m·i), i = 0 the oldest.

    A chunk is wanted at every step. m > 0 trusts older predictions more; the paper's value is 0.01. Source: Zhao
    et al. 2023 (arXiv 2304.13705), in LeRobot's online form, which needs no history of chunks.

    Args:
        coefficient: m.
        horizon: h, actions per chunk.
    """

    queued = 0

    def __init__(self, coefficient: float, horizon: int):
        self.weights = torch.exp(-coefficient * torch.arange(horizon, dtype=torch.float32))  # (h,)
        self.sums = self.weights.cumsum(0)  # (h,)
        self.horizon = horizon
        self.reset()

    def push(self, chunk: torch.Tensor) -> None:
        """Take in a chunk (b, h, a) that starts at the current step."""
        if self._average is None:
            self._average = chunk.clone()
            self._counts = torch.ones(self.horizon, 1, dtype=torch.long)  # predictions of each step so far
            return
        n = self._counts  # (h − 1, 1): the steps that earlier chunks predicted too
        average = (self._average * self.sums[n - 1] + chunk[:, :-1] * self.weights[n]) / self.sums[n]
        self._average = torch.cat([average, chunk[:, -1:]], dim=1)  # (b, h, a)
        counts = (n + 1).clamp(max=self.horizon)
        self._counts = torch.cat([counts, torch.ones_like(counts[:1])])

    def pop(self) -> torch.Tensor:
        """Return the current step's action (b, a) and move on by one step."""
        action = self._average[:, 0]
        self._average, self._counts = self._average[:, 1:], self._counts[1:]
        return action

    def reset(self) -> None:
        """Forget all predictions."""
        self._average: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
