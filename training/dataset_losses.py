"""The loss of every dataset of a mixture, for the log: no pass of its own, and no wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

PREFIX = "loss/"


def sums_by_dataset(sample_errors: torch.Tensor, index: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return `loss/<name>` → the sum of the errors of a dataset's samples, and how many values count, (2,).

    All datasets are in it, so that processes whose batches hold others can add up theirs.

    Args:
        sample_errors: (b, 2), of `PolicyOutput`.
        index: (b,) the dataset of every sample.
        names: of the datasets.
    """
    sums = sample_errors.new_zeros(len(names), 2).index_add_(0, index.to(sample_errors.device), sample_errors)
    return {f"{PREFIX}{name}": row for name, row in zip(names, sums, strict=True)}


def as_means(parts: Mapping[str, torch.Tensor], steps: int) -> dict[str, float]:
    """Return the means over the steps since the last log; of a dataset over what counts in it, where it was seen."""
    means = {}
    for name, value in parts.items():
        if not name.startswith(PREFIX):
            means[name] = (value / steps).item()
            continue
        total, count = value.tolist()
        if count:
            means[name] = total / count
    return means
