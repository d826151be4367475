"""PolicyOutput: what every policy's forward pass returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class PolicyOutput(ModelOutput):
    """Hold what a policy's forward pass returns.

    Args:
        loss (scalar tensor): the training loss, when labels were given.
        losses (`dict[str, torch.Tensor]`): its named parts, unweighted.
        actions (tensor (b, h, a)): predicted, normalised; None where a policy that samples computes its loss, which
            needs no prediction.
        sample_errors (tensor (b, 2)): of every sample the sum of its errors of actions, weighted as in the loss, and
            how many of them count; without a graph.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    actions: torch.Tensor | None = None
    sample_errors: torch.Tensor | None = None
