"""Renames: one table of patterns per way in which weights are published."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Renames = list[tuple[str, str | Callable[[re.Match], str]]]
COMPILED = "_orig_mod."  # left in the names by torch.compile


def rename(state_dict: Mapping[str, Any], renames: Renames) -> dict[str, Any]:
    """Return the entries under the names that the first fitting rename gives; other names stay as they are."""
    renamed = {}
    for name, value in state_dict.items():
        name = name.replace(COMPILED, "")
        for pattern, replacement in renames:
            new, count = re.subn(pattern, replacement, name)
            if count:
                name = new
                break
        renamed[name] = value
    return renamed
