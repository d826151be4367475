"""Render the README.md of a LeRobot dataset."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import DatasetCardData

from .._files import read_json
from . import wording
from .edits import sign

INFO_FILE = "meta/info.json"
ORIGIN_FILE = "meta/origin.json"  # of a dataset that was made of others


def dataset_card(folder: str | os.PathLike, repo_id: str) -> str:
    """Return the card of a dataset from its meta/info.json.

    Raises:
        CorruptFileError: the file cannot be read.
    """
    info = read_json(Path(folder, INFO_FILE))
    features = info.get("features") if isinstance(info.get("features"), dict) else {}
    origin = read_json(Path(folder, ORIGIN_FILE)) if Path(folder, ORIGIN_FILE).is_file() else {}
    sources = [source for source in origin.get("sources") or () if isinstance(source, dict)]
    licenses = {source.get("license") for source in sources}
    metadata = DatasetCardData(
        license=licenses.pop() if len(licenses) == 1 else None,
        task_categories=["robotics"],
        tags=["LeRobot"],
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    rows = [
        ("Format", f"LeRobot {info.get('codebase_version', '')}"),
        ("Robot", info.get("robot_type")),
        ("Episodes", info.get("total_episodes")),
        ("Frames", info.get("total_frames")),
        ("Tasks", info.get("total_tasks")),
        ("Frames per second", info.get("fps")),
    ]
    lines = [f"---\n{metadata.to_yaml()}\n---\n", f"# {wording.cell(repo_id.rpartition('/')[2])}", ""]
    lines += ["Demonstrations of robot manipulation.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {wording.cell(value)} |" for name, value in rows if value is not None]
    lines += ["", "## Features", "", "| Feature | Type | Shape | Dimensions |", "|---|---|---|---|"]
    lines += [_row(name, feature) for name, feature in features.items() if isinstance(feature, dict)]
    lines += _origin_lines(sources)
    lines += ["", "## How to use", "", "```python", "from manipulators import LeRobotDataset", ""]
    lines += [f'dataset = LeRobotDataset("{repo_id}", action_horizon=16)', "```", ""]
    return sign("\n".join(lines))


def _origin_lines(sources: list[dict]) -> list[str]:
    """Return the section that names what a dataset was made of, each with its licence; nothing without sources."""
    if not sources:
        return []
    rows = [[source.get(key) or "" for key in ("source", "revision", "episodes", "license")] for source in sources]
    table = [f"| {wording.cell(name)} | {' | '.join(wording.cell(text) for text in rest)} |" for name, *rest in rows]
    return ["", "## Made from", "", "| Dataset | Revision | Episodes | Licence |", "|---|---|---|---|", *table]


def _row(name: str, feature: dict) -> str:
    names = feature.get("names")
    names = names.get("motors", names) if isinstance(names, dict) else names
    listed = ", ".join(map(str, names)) if isinstance(names, list) else ""
    shape = " × ".join(map(str, feature.get("shape") or ()))
    return (
        f"| {wording.code_cell(name)} | {wording.cell(feature.get('dtype', ''))} | {shape} | {wording.cell(listed)} |"
    )
