"""GlobalMean: one mean over all batches of a step, in all processes, instead of a mean of their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from ..modeling.policy import PolicyModel
from ..modeling.seam import Labels


class GlobalMean:
    """Weigh the losses of several batches as if they were one.

    A batch's loss is a mean over its actions that count (see `modeling.losses`). Batches in which episodes end hold
    fewer of them, so the mean of several such means is not the mean over all their actions.

    Args:
        accelerator: of the processes that train together.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.totals: torch.Tensor | None = None  # (2,), over all batches and processes; None: there is one batch
        self.batches = 1  # of this process

    def begin(self, policy: PolicyModel, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count what the batches of an optimizer step hold; called in every process."""
        self.batches = len(batches)
        self.totals = None
        if self.batches > 1 or self.accelerator.num_processes > 1:
            counts = [self._counts(policy, batch) for batch in batches]
            own = torch.stack(counts).sum(0) if counts else torch.zeros(2, device=self.accelerator.device)
            self.totals = self.accelerator.reduce(own, reduction="sum").clamp(min=1)

    def weights(self, policy: PolicyModel, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the factors (2,) of a batch's means over actions and over samples; None: both are 1.

        The gradients, and the losses in the log, are averaged over this process's batches and over the processes
        afterwards, so the factors are on average 1.
        """
        if self.totals is None:
            return None
        return self._counts(policy, batch) / self.totals * (self.batches * self.accelerator.num_processes)

    def loss(self, policy: PolicyModel, batch: Mapping[str, Any], loss: torch.Tensor, parts: Mapping[str, Any]):
        """Return a batch's loss and its named parts, weighed.

        Args:
            policy: whose loss it is.
            batch: model inputs with labels.
            loss: scalar, the weighted sum of `parts`.
            parts: the named losses of the batch.
        """
        weights = self.weights(policy, batch)
        if weights is None:
            return loss, dict(parts)
        over_actions, over_samples = weights
        total = loss * over_actions
        weighed = {name: value * over_actions for name, value in parts.items()}
        for name in policy.per_sample_losses:
            if name in parts:
                weight = policy.config.loss_weights.get(name, 1.0)
                total = total + parts[name] * (weight * (over_samples - over_actions))
                weighed[name] = parts[name] * over_samples
        return total, weighed

    def _counts(self, policy: PolicyModel, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return how many action values of a batch count, and its samples, as (2,) float32."""
        return torch.stack([torch.as_tensor(n, device=self.accelerator.device) for n in counts_of(policy, batch)])


class MeanOfEvaluation:
    """Sum the losses of an evaluation's batches by the actions that count in them."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums = torch.zeros(2, device=accelerator.device)  # of losses times counts, and of counts

    def add(self, policy: PolicyModel, batch: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Add a batch's loss."""
        count = counts_of(policy, batch)[0]
        self.sums += torch.stack([loss.detach().float() * count, count])

    def value(self) -> float:
        """Return the mean over all batches and processes."""
        total, count = self.accelerator.reduce(self.sums, reduction="sum").tolist()
        return total / max(count, 1)


def counts_of(policy: PolicyModel, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many action values of a batch count, and how many samples, as float32 scalars.

    Batches that hold no `actions`, of a collator of one's own, count alike.
    """
    if batch.get("actions") is None:
        return torch.ones(()), torch.ones(())
    labels = Labels(*(batch.get(name) for name in Labels._fields))
    values, samples = policy.loss_counts(labels)
    return values.float(), torch.full_like(values, samples, dtype=torch.float32)
