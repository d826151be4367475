"""ObservationReport: how the observations since `reset()` differ from those of the training data."""

from __future__ import annotations

from dataclasses import dataclass, field

# What can be unusual about a camera.
CAMERA_FINDINGS = {
    "flat": "shows one colour only, as a camera does that is covered, switched off, or scaled to [0, 1] twice",
    "brightness": "is much darker or brighter than its training pictures, as when light, exposure or scale differ",
    "channels": "looks as if red and blue were swapped; policies read RGB, and OpenCV gives BGR",
    "frozen": "repeats the same picture while the robot moves",
}


@dataclass(frozen=True)
class Outside:
    """Say how far a dimension was outside its training range.

    Args:
        share (`float`): of the observations, 0 … 1; up to 1 % of the range beyond it is not counted.
        farthest (`float`): the largest distance from the range, negative below it, in robot units.
        ranges (`float`): the same in training ranges; of a dimension that hardly moved, in tenths of the widest one.
        low, high (`float`): the training range.
        unit (`str`, *optional*): in which unit.
    """

    share: float
    farthest: float
    ranges: float
    low: float
    high: float
    unit: str | None = None


@dataclass(frozen=True)
class ObservationReport:
    """Hold what was unusual about the observations since `reset()`; `print` shows it.

    Args:
        observations (`int`): how many there were; those of a batch count each.
        dimensions (`dict[str, dict[str, Outside]]`): feature → name of the dimension → how far it was outside its
            training range; dimensions that stayed inside are left out.
        cameras (`dict[str, dict[str, float]]`): camera → what was found (see `CAMERA_FINDINGS`) → the share of the
            observations. Colours are compared where statistics of the camera itself are recorded.
    """

    observations: int
    dimensions: dict[str, dict[str, Outside]] = field(default_factory=dict)
    cameras: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def findings(self) -> list[str]:
        """One sentence per finding, the farthest dimension of each feature first."""
        sentences = []
        for name, dimensions in self.dimensions.items():
            for which, outside in sorted(dimensions.items(), key=lambda row: -row[1].ranges):
                unit = f" {outside.unit}" if outside.unit else ""
                side = "below" if outside.farthest < 0 else "above"
                sentences.append(
                    f"{name} {which!r} was up to {abs(outside.farthest):.4g}{unit} {side} its training range of "
                    f"{outside.low:.4g} to {outside.high:.4g}{unit}, in {outside.share:.0%} of the observations"
                )
        for name, found in self.cameras.items():
            sentences += [f"{name} {CAMERA_FINDINGS[which]}: {share:.0%}" for which, share in found.items()]
        return sentences

    def __str__(self) -> str:
        head = f"{self.observations} observation{'' if self.observations == 1 else 's'}"
        if not self.findings:
            return f"{head}, nothing unusual"
        return "\n".join([f"{head}:", *(f"- {sentence}." for sentence in self.findings)])
