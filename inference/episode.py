"""Episode: what a pipeline remembers between `reset()` and `reset()`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..errors import FeatureShapeError, SharedPipelineError
from ..processing.observation import Observation
from .action_sources import ActionQueue, TemporalEnsembler
from .plausibility import Judgement, Plausibility


@dataclass
class Episode:
    """Hold one robot's episode; a step changes it only once nothing of it can be refused any more.

    Args:
        actions: where the next action comes from.
        plausibility: what was unusual about the observations.
        outside: how many predicted actions lay beyond the training range, (a,).
        predicted: how many were predicted.
        batch: (b,) or (), as of its first observation.
        history: its last observations, of policies that look at several.
        action: the one that was executed last, (b, a).
        thread: id and name of the thread that began it.
    """

    actions: ActionQueue | TemporalEnsembler
    plausibility: Plausibility
    outside: torch.Tensor
    predicted: int = 0
    batch: tuple[int, ...] | None = None
    history: list[Observation] | None = None
    action: torch.Tensor | None = None
    thread: dict[str, tuple[int, str]] = field(default_factory=dict)

    @contextmanager
    def in_one_thread(self) -> Iterator[None]:
        """Let only the thread that began the episode go on with it, unless that thread has ended.

        Raises:
            SharedPipelineError: another thread asks.
        """
        caller = threading.current_thread()
        mine = (caller.ident, caller.name)
        owner = self.thread.setdefault("owner", mine)  # atomic: of two that begin at once, one finds the other
        if owner[0] != mine[0]:
            if any(thread.ident == owner[0] for thread in threading.enumerate()):
                raise SharedPipelineError(owner[1], mine[1])
            self.thread["owner"] = mine
        try:
            yield
        except BaseException:
            if owner is mine:  # a first observation that is refused begins nothing
                self.thread.pop("owner", None)
            raise

    def require_batch(self, observation: Observation) -> None:
        """Check that an observation has the batch size of the first one.

        Raises:
            FeatureShapeError: it has another.
        """
        if self.batch is not None and observation.batch != self.batch:
            expected = f"{self.batch}, as in this episode's first; call reset() first"
            raise FeatureShapeError("The observation's batch", observation.batch, expected)

    def history_with(self, current: Observation, steps: int) -> list[Observation] | None:
        """Return the last `steps` observations, the oldest first; the first one is repeated to fill them.

        None for a policy that looks at one. What no prediction will look at is not kept.

        Raises:
            FeatureShapeError: a picture of another size than before.
        """
        if steps == 1 or self.actions.queued >= steps:
            return self.history
        for name, x in current.items():
            before = None if self.history is None else self.history[-1].get(name)
            if before is not None and before.shape != x.shape:
                expected = f"{tuple(before.shape)}, as before in this episode; call reset() first"
                raise FeatureShapeError(name, tuple(x.shape), expected)
        current = current.copied()  # a simulator may write its next observation into the same array
        return [*self.history[1:], current] if self.history else [current] * steps

    def remember(self, judgement: Judgement, outside: torch.Tensor | None, predicted: int) -> None:
        """Add what an observation, and the actions that were predicted from it, say about the training range."""
        self.plausibility.remember(judgement)
        if outside is not None:
            self.outside += outside
        self.predicted += predicted
