"""Dimensions that their normalization does not keep: gripper-like ones that seldom move, and those that only shake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..configuration.features import PolicyFeature
from ..configuration.normalization import MODES, Part

# From where on a value of the training data is far away for a network, and a range is noise beside the largest value.
_FAR = 100.0
_NOISE = 1e-5
_SELDOM = {"q01": "under 1 % of the frames", "q10": "under 10 % of the frames"}


def fragile_dimensions(
    name: str,
    feature: PolicyFeature,
    parts: Sequence[Part],
    statistics: Mapping[str, Any] | None,
    eps: float,
    dimension_names: Sequence[str] | None = None,
) -> list[str]:
    """Return a sentence for every dimension of a vector that its mode loses or blows up, with the mode that keeps it.

    Args:
        name: of the feature.
        feature: its type and width.
        parts: of it, in their order.
        statistics: of the whole feature; without its range nothing is known.
        eps: ε of `Normalizer`.
        dimension_names: what each dimension is.
    """
    if not statistics or not {"min", "max"} <= statistics.keys():
        return []
    exact = {which: torch.as_tensor(value, dtype=torch.float64).flatten() for which, value in statistics.items()}
    low, high = exact["min"], exact["max"]
    largest = float(torch.maximum(low.abs(), high.abs()).max())
    sentences, start = [], 0
    for part in parts:
        mode = MODES[part.mode]
        for i in range(start, start + part.width) if mode.form in ("spread", "ends") else ():
            first, second = (float(exact[which][i]) for which in mode.statistics)
            problem = _problem(mode, first, second, float(low[i]), float(high[i]), largest, eps)
            if problem:
                label = dimension_names[i] if dimension_names else f"dimension {i}"
                what, better = problem
                better = better.lower() if part.mode.islower() else better
                sentences.append(f"{label} of {name} {what} by {part.mode}. {_remedy(feature, part, parts, better)}")
        start += part.width
    return sentences


def _problem(
    mode: Any, first: float, second: float, low: float, high: float, largest: float, eps: float
) -> tuple[str, str] | None:
    """Return what is wrong with one dimension and the mode that keeps it, None where nothing is."""
    moved = high - low
    spread = second if mode.form == "spread" else second - first
    constant = spread <= (eps if mode.constant == "shift" else 0.0)
    if not constant and moved <= _NOISE * largest:
        return (
            f"moves by no more than {moved:.1g}, noise that becomes as large as what moves by {largest:.2g}",
            "IDENTITY",
        )
    if constant and moved > max(eps, _NOISE * largest):
        seldom = _SELDOM.get(mode.statistics[0], "hardly any frame")
        return (
            f"moves from {low:.4g} to {high:.4g} in {seldom}: it counts as constant, and always decodes to "
            f"{first:.4g}",
            "MIN_MAX",
        )
    if not constant and not mode.clip:
        ends = [(value - first) / spread for value in (low, high)]
        reach = max(abs(end if mode.form == "spread" else 2 * end - 1) for end in ends)
        if reach > _FAR:
            return f"lies between {low:.4g} and {high:.4g}, which becomes up to {reach:.2g}", "MIN_MAX"
    return None


def _remedy(feature: PolicyFeature, part: Part, parts: Sequence[Part], better: str) -> str:
    if len(parts) > 1:
        return f"The mode {better!r} of the part {part.name!r} keeps it."
    kind, mode = feature.type.value, better.upper()
    return (
        f"{mode} keeps it: normalization_mapping={{{kind!r}: {mode!r}}} in the config (train: "
        f"--config.normalization_mapping '{{{kind}: {mode}}}')."
    )
