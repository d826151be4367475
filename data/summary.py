"""Show a dataset in a terminal and in a notebook."""

from __future__ import annotations

import html
from typing import Any

_MOST = 12  # rows and instructions that are shown


def text_summary(dataset: Any) -> str:
    """Return what `repr(dataset)` shows: counts, features and instructions."""
    rows = _features(dataset)
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines = [f"{type(dataset).__name__}({str(dataset.root)!r})", f"  {_counts(dataset)}"]
    for row in rows:
        aligned = "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True))
        lines.append(f"    {aligned.rstrip()}")
    return "\n".join([*lines, f"  tasks: {_tasks(dataset)}"])


def html_summary(dataset: Any) -> str:
    """Return the same for a notebook."""
    cells = "".join(
        "<tr>" + "".join(f"<td style='text-align: left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in (("feature", "type", "shape", "dimensions"), *_features(dataset))
    )
    return (
        f"<div><b>{type(dataset).__name__}</b> <code>{html.escape(str(dataset.root))}</code><br>"
        f"{html.escape(_counts(dataset))}<table>{cells}</table>tasks: {html.escape(_tasks(dataset))}</div>"
    )


def _counts(dataset: Any) -> str:
    robot = f", robot {dataset.robot_type}" if dataset.robot_type else ""
    samples = "" if dataset.num_samples == dataset.num_frames else f", {dataset.num_samples} samples"
    return f"{dataset.num_episodes} episodes, {dataset.num_frames} frames{samples} at {dataset.fps:g} Hz{robot}"


def _features(dataset: Any) -> list[tuple[str, str, str, str]]:
    """Return name, dtype, shape and dimension names of every feature that is not an index column."""
    names = dataset.dimension_names
    return [
        (name, feature["dtype"], str(tuple(feature["shape"])), _shortened(names[name] or ()))
        for name, feature in dataset.recorded_features.items()
    ]


def _tasks(dataset: Any) -> str:
    return _shortened([repr(task) for task in dataset.tasks])


def _shortened(items: Any) -> str:
    more = f", … ({len(items)} in all)" if len(items) > _MOST else ""
    return ", ".join(map(str, items[:_MOST])) + more
