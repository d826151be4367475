"""Saved tensors: their names and shapes against those that are to receive them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CorruptFileError, WeightsMismatchError


def read_shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in some safetensors files, from their headers.

    Raises:
        CorruptFileError: one cannot be read.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(path, "safetensors file", error) from error
    return found


def require_same_tensors(source: object, found: Mapping[str, tuple], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes of saved tensors with those that are to receive them.

    Raises:
        WeightsMismatchError: some are missing, unexpected or of another shape.
    """
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    missing, unexpected = shapes.keys() - found.keys(), found.keys() - shapes.keys()
    mismatched = [(n, s, shapes[n]) for n, s in found.items() if n in shapes and s != shapes[n]]
    if missing or unexpected or mismatched:
        raise WeightsMismatchError(str(source), missing, unexpected, mismatched)
