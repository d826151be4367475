"""Where a dataset's episodes come from: recorded beside them, with licence and card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..._files import read_json
from ...errors import CorruptFileError
from ..selection import runs
from .source import Source
from .videos import Piece

ORIGIN_PATH = "meta/origin.json"
CARD = "README.md"
_DOCUMENTS = ("LICENSE*", "NOTICE*")
_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


def record_origin(folder: Path, action: str, pieces: Sequence[Piece]) -> None:
    """Record what a dataset was made of.

    Of a folder only its name is recorded: the file is published with the dataset.
    """
    record = {"made_by": action, "sources": [_described(*piece) for piece in pieces]}
    (folder / ORIGIN_PATH).write_text(json.dumps(record, indent=4, ensure_ascii=False), encoding="utf-8")


def copy_documents(folder: Path, pieces: Sequence[Piece]) -> None:
    """Copy the licences of the sources and, of a single one, its card."""
    sources = list({piece.source.root: piece.source for piece in pieces}.values())
    for source in sources:
        suffix = f"-{_short(source)}" if len(sources) > 1 else ""
        for path in sorted(path for pattern in _DOCUMENTS for path in source.root.glob(pattern) if path.is_file()):
            shutil.copyfile(path, folder / f"{path.stem}{suffix}{path.suffix}")
        if len(sources) == 1 and (source.root / CARD).is_file():
            shutil.copyfile(source.root / CARD, folder / CARD)


def _described(source: Source, positions: np.ndarray) -> dict[str, Any]:
    described = {
        "source": source.name if source.revision else source.root.name,
        "revision": source.revision,
        "license": license_of(source.root),
        "episodes": runs(source.metadata.episode_numbers[positions].tolist()),
        "origin": _origin(source.root),
    }
    return {name: value for name, value in described.items() if value is not None}


def license_of(root: Path) -> str | None:
    """Return the licence that a dataset's card names, as the Hub spells it."""
    path = root / CARD
    found = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    try:
        fields = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    name = fields.get("license") if isinstance(fields, Mapping) else None
    return str(name) if name else None


def _origin(root: Path) -> dict | None:
    path = root / ORIGIN_PATH
    try:
        return read_json(path) if path.is_file() else None
    except CorruptFileError:
        return None


def _short(source: Source) -> str:
    return re.sub(r"[^\w.-]+", "_", source.name.rstrip("/").rpartition("/")[2]) or "dataset"
