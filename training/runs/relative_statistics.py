"""Statistics of relative actions: computed from the differences themselves, never from absolute actions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ...configuration.features import ACTION, STATE
from ...data.dataset import LeRobotDataset
from ...data.statistics.computing import statistics_of_blocks
from ...processing.relative_actions import RelativeTo, to_relative


def relative_action_statistics(
    datasets: Sequence[LeRobotDataset], relative_to: RelativeTo, limit: int = 100_000
) -> dict[str, np.ndarray]:
    """Return the statistics of all chunks' actions relative to the state they are predicted in.

    Args:
        datasets: one or more, of samples with `observation.state` (s,) and `action` (h, a); steps beyond the episode
            are ignored.
        relative_to: see `PolicyProcessor`.
        limit: largest number of samples; of more they are taken at even intervals.
    """
    total = sum(len(dataset) for dataset in datasets)
    differences = []
    for dataset in datasets:
        share = math.ceil(min(total, limit) * len(dataset) / total)
        differences += _differences(dataset, relative_to, share)
    return statistics_of_blocks(lambda: differences)


def _differences(dataset: LeRobotDataset, relative_to: RelativeTo, limit: int) -> list[np.ndarray]:
    """Return the relative actions (steps, a) of up to `limit` samples at even intervals."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), limit)).astype(int)).tolist()
    differences = []
    for start in range(0, len(indices), 1024):
        samples = dataset.__getitems__(indices[start : start + 1024])
        actions = torch.stack([sample[ACTION] for sample in samples])  # (b, h, a)
        state = torch.stack([sample[STATE].reshape(-1, sample[STATE].shape[-1])[-1] for sample in samples])  # (b, s)
        real = ~torch.stack([sample["action_is_pad"] for sample in samples])  # (b, h)
        differences.append(to_relative(actions, state, relative_to)[real].numpy())  # (steps, a)
    return differences
