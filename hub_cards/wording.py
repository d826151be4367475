"""How numbers, names and code are written in a card."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..configuration.contract import ContractEntry
from ..configuration.features import FeatureType
from ..configuration.normalization import MODES
from .card_data import CardData

PLACEHOLDER = "path/to/this/folder"

KINDS = {
    FeatureType.STATE: "robot state",
    FeatureType.ENV: "state of the surroundings",
    FeatureType.VISUAL: "camera image",
    FeatureType.ACTION: "action",
}


def one_line(text: object) -> str:
    """Return text that cannot leave its line."""
    return " ".join(str(text).split())


def escaped(text: object) -> str:
    """Return text that cannot leave its line, become HTML or be read as Markdown."""
    text = re.sub(r"[\\`*|~]|\](?=[(\[])", r"\\\g<0>", one_line(text))  # brackets alone are plain
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is plain
    return re.sub(r"&(?=#|\w+;)", "&amp;", text).replace("<", "&lt;")


def cell(text: object) -> str:
    """Return text for a table cell."""
    return escaped(text)


def code(text: object) -> str:
    """Return text as inline code, also when it holds backticks."""
    text = one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def code_cell(text: object) -> str:
    """Return text as inline code for a table cell."""
    return code(text).replace("|", "\\|")


def in_html(text: object) -> str:
    """Return text for the inside of an HTML element or attribute."""
    return html.escape(one_line(text))


def fenced(text: str, language: str) -> str:
    """Return a block of code that its own content cannot end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def number(value: float) -> str:
    """Return a value with four significant digits: 0.0002 → 0.0002, 1e-05 → 1e-05, 12345.6 → 12346."""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def count(value: int) -> str:
    """Return a whole number with its thousands apart: 51597190 → 51,597,190."""
    return f"{value:,}"


def percent(share: float) -> str:
    """Return a share of 1 in percent, without the sign: 0.98 → 98, 0.6667 → 66.7."""
    return f"{100 * share:.1f}".removesuffix(".0")


def duration(seconds: float) -> str:
    """Return a time as people say it: 5025 → 1 h 24 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def seed_runs(seeds: Iterable[int] | str) -> str:
    """Return seeds with consecutive ones joined: [7, 10000, 10001, 10002] → 7, 10000–10002."""
    if isinstance(seeds, str):
        return seeds
    runs: list[list[int]] = []
    for seed in sorted({int(seed) for seed in seeds}):
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def is_number(value: object) -> bool:
    """Return True for a finite number; truth values are not numbers."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_hub_id(name: str | None) -> bool:
    """Return True for `org/name`, the form of a Hub id."""
    return bool(name) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def public_name(name: str) -> str:
    """Return a name that is fit to publish: of a local folder only the last part."""
    path = PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
    return path.name if path.is_absolute() or name.startswith(("~", ".")) or "\\" in name else name


# What leads to the last part of an absolute path, where one begins: not inside a word, a relative path or an address.
_LEADING = re.compile(r"(?<![\w.:/~\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\"=,;\[\](){}]+[/\\])+(?=[^\s/\\])")


def without_local_paths(value: Any) -> Any:
    """Return plain values in which absolute paths, also those inside a command line, have lost all but their end."""
    if isinstance(value, str):
        return public_name(value) if os.path.isabs(value) and " " not in value else _LEADING.sub("", value)
    if isinstance(value, Mapping):
        return {name: without_local_paths(item) for name, item in value.items()}
    return [without_local_paths(item) for item in value] if isinstance(value, (list, tuple)) else value


def rates(learning_rate: float | Mapping[str, float]) -> str:
    """Return one learning rate, or one per part of the policy."""
    if isinstance(learning_rate, Mapping):
        return ", ".join(f"{one_line(part)} {number(rate)}" for part, rate in learning_rate.items())
    return number(learning_rate)


def size(entry: ContractEntry) -> str:
    """Return a feature's size in words."""
    if entry.is_camera:
        channels, height, width = entry.shape
        return f"{height} × {width} pixels, {channels} channel{'s' if channels > 1 else ''}"
    values = f"{entry.width} value{'s' if entry.width > 1 else ''}"
    return values if len(entry.shape) == 1 else f"{values} ({' × '.join(map(str, entry.shape))})"


def units(entry: ContractEntry) -> str:
    """Return a feature's units in words."""
    if entry.is_camera:
        return "0–255 (uint8) or 0–1 (float)"
    return ", ".join(dict.fromkeys(dimension.unit or "not recorded" for dimension in entry.dimensions))


def dimension_table(entry: ContractEntry) -> list[list[str]]:
    """Return the table of a vector's dimensions, its header first; empty where nothing is known about them."""
    dimensions = entry.dimensions
    if not any(d.name or d.low is not None or d.high is not None or d.relative_to for d in dimensions) and (
        len(entry.parts) < 2
    ):
        return []
    table = [["Index", "Name", "Unit", "Lowest in training", "Highest in training"]]
    for index, d in enumerate(dimensions):
        ends = ["not recorded" if end is None else number(end) for end in (d.low, d.high)]
        table.append([str(index), d.name or "not recorded", d.unit or "not recorded", *ends])
    if len(entry.parts) > 1:
        table[0].append("Normalised")
        for row, d in zip(table[1:], dimensions, strict=True):
            row.append(MODES[d.normalization].words)
    if entry.is_relative:
        table[0].append("Predicted as")
        for row, d in zip(table[1:], dimensions, strict=True):
            row.append(f"difference to {d.relative_to}" if d.relative_to else "absolute value")
    return table


def python_example(card: CardData) -> str:
    """Return a program that loads the policy and asks it for one action, with arrays of the right shapes."""
    robot = f", embodiment={python_literal(card.embodiment)}" if card.robots else ""
    lines = [
        "import numpy as np",
        "from manipulators import PolicyPipeline",
        "",
        f"pipeline = PolicyPipeline.from_pretrained({python_literal(card.repo_id or PLACEHOLDER)}{robot})",
        "pipeline.reset()  # at the start of every episode",
        "",
        "observation = {  # zeros stand for what your robot measures",
    ]
    for entry in card.inputs:
        if entry.is_camera:
            channels, height, width = entry.shape
            array = f"np.zeros(({height}, {width}, {channels}), dtype=np.uint8)"
            comment = "height, width, " + ("RGB" if channels == 3 else "channels")
        else:
            array = f"np.zeros({entry.width if len(entry.shape) == 1 else entry.shape}, dtype=np.float32)"
            comment = _in_order(entry)
        lines.append(f"    {python_literal(entry.name)}: {array},  # {comment}")
    example = card.instruction if isinstance(card.instruction, str) else "say in words what the robot should do"
    task = f", task={python_literal(example)}" if card.instruction else ""
    result = card.outputs[0]
    shape = f"({', '.join(map(str, result.shape))}{',' if len(result.shape) == 1 else ''})"
    lines += ["}", f"action = pipeline(observation{task})  # tensor {shape}: {_in_order(result)}"]
    return "\n".join(lines)


def python_literal(text: str) -> str:
    """Return text as a string of a program."""
    return json.dumps(one_line(text), ensure_ascii=False)


def _in_order(entry: ContractEntry) -> str:
    names = [dimension.name for dimension in entry.dimensions]
    if not names or None in names:
        return f"{size(entry)}, in the order of the training data"
    listed = ", ".join(map(one_line, names))
    return listed if len(listed) <= 60 else f"{size(entry)}, in the order of the table above"
