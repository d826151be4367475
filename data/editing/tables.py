"""Show statistics as a table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_COLUMNS = ("min", "max", "mean", "std", "q01", "q50", "q99")
_SHOWN = 32  # dimensions of a feature


def statistics_table(statistics: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Return statistics as Markdown, a row per dimension of every feature."""
    rows = [f"| feature | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for name, values in statistics.items():
        flat = {key: values[key].reshape(-1) for key in _COLUMNS}
        size = flat["min"].size
        for i in range(min(size, _SHOWN)):
            dimension = f"{name}[{i}]" if size > 1 else name
            rows.append(f"| {dimension} | {' | '.join(f'{flat[key][i]:.5g}' for key in _COLUMNS)} |")
        if size > _SHOWN:
            rows.append(f"| {name}[…] | {size} dimensions |{' |' * (len(_COLUMNS) - 1)}")
    return "\n".join(rows)
