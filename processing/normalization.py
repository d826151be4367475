"""Normalization: one invertible map per feature, between robot units and what the network sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..configuration.features import NormalizationMode, PolicyFeature
from ..errors import MissingStatisticsError


class Normalizer:
    """Map one feature between raw and normalised values.

    `MEAN_STD`: (x − mean) / (std + ε), back y·std + mean. The range modes: 2(x − low) / (high − low) − 1, back
    (y + 1) / 2 · (high − low) + low. Source: LeRobot's normalizer, so that its checkpoints give equal numbers.

    A dimension that did not move in training (spread ≤ ε) is only shifted, never divided by its spread; on the
    way back it takes its recorded value whatever the network says.

    Args:
        name: the feature's dataset name, for messages.
        feature: its type and shape.
        mode: how to normalise.
        statistics: `{"mean": …, "std": …}` etc., each of the feature's width; images one value per channel.
        eps: ε.

    Raises:
        MissingStatisticsError: the statistics that `mode` needs are absent, not finite or of another width.
    """

    def __init__(
        self,
        name: str,
        feature: PolicyFeature,
        mode: NormalizationMode,
        statistics: Mapping | None,
        eps: float = 1e-8,
    ):
        self.mode = mode
        if mode is NormalizationMode.IDENTITY:
            return
        first, second = (_statistic(name, feature, mode, statistics, which) for which in mode.statistics)
        self.offset = first
        self.spread = second if mode is NormalizationMode.MEAN_STD else second - first
        if (self.spread < 0).any():
            low, high = mode.statistics
            raise MissingStatisticsError(
                f"The statistics of {name} are impossible: "
                + ("std is negative." if low == "mean" else f"{high} lies below {low}.")
            )
        padded = self.spread + eps if mode is NormalizationMode.MEAN_STD else self.spread
        self.divisor = torch.where(self.spread <= eps, 1.0, padded)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Return network values for raw ones; the last dimension (images: the last three) is the feature."""
        if self.mode is NormalizationMode.IDENTITY:
            return x
        y = (x - self.offset.to(x.device)) / self.divisor.to(x.device)
        return y if self.mode is NormalizationMode.MEAN_STD else 2 * y - 1

    def unnormalize(self, y: torch.Tensor) -> torch.Tensor:
        """Return raw values for network ones: the inverse of `normalize`."""
        if self.mode is NormalizationMode.IDENTITY:
            return y
        fraction = y if self.mode is NormalizationMode.MEAN_STD else (y + 1) / 2
        return fraction * self.spread.to(y.device) + self.offset.to(y.device)


def _statistic(
    name: str, feature: PolicyFeature, mode: NormalizationMode, statistics: Mapping | None, which: str
) -> torch.Tensor:
    if not statistics or which not in statistics:
        has = f"has only {', '.join(sorted(statistics))}" if statistics else "is absent from the statistics"
        raise MissingStatisticsError(
            f"{name} is normalised with {mode.value}, which needs {' and '.join(mode.statistics)}; it {has}. "
            f"Pass statistics={{{name!r}: {{{which!r}: [...], …}}}} (a dataset's: LeRobotDataset(...).statistics), "
            f"or choose normalization_mapping={{{feature.type.value!r}: 'IDENTITY'}}."
        )
    value = torch.as_tensor(statistics[which], dtype=torch.float32)
    channels = feature.shape[0]
    if value.numel() != channels:
        raise MissingStatisticsError(
            f"The {which} of {name} has {value.numel()} values (shape {tuple(value.shape)}); "
            f"the feature has {channels}: shape {feature.shape}."
        )
    if not torch.isfinite(value).all():
        raise MissingStatisticsError(f"The {which} of {name} is not finite: {value.flatten().tolist()}.")
    return value.reshape(channels, *[1] * (len(feature.shape) - 1))
