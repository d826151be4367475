"""Batches whose samples differ: processed in groups that are alike, and joined in the order in which they came.

Shapes: b batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ..errors import FeatureShapeError

TOKENS = ("input_ids", "attention_mask")
PICTURES = "pixel_values"


def joined(
    batches: Sequence[Mapping[str, Any]],
    places: Sequence[Sequence[int]],
    pad_token: int = 0,
    side: str = "right",
    picture_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return model inputs (b, …) of several groups as one batch.

    Args:
        batches: the model inputs of each group.
        places: where the samples of each group stand in the whole batch.
        pad_token: id of the token that fills shorter prompts up.
        side: on which it stands.
        picture_size: height and width to which the network resizes pictures; where sizes differ they are resized here.

    Raises:
        FeatureShapeError: an input has different shapes in two groups, or is in one alone.
    """
    if len(batches) == 1:
        return dict(batches[0])
    order = torch.tensor([place for group in places for place in group]).argsort()
    names = dict.fromkeys(name for batch in batches for name in batch)
    whole = {}
    for name in names:
        pieces = [batch.get(name) for batch in batches]
        if any(piece is None for piece in pieces):
            raise FeatureShapeError(name, (), "something in all samples of a batch, or in none")
        if name in TOKENS:
            pieces = _padded(pieces, pad_token if name == "input_ids" else 0, side)
        if name == PICTURES and picture_size is not None and not _alike(pieces):
            pieces = [_resized(piece, picture_size) for piece in pieces]
        whole[name] = _concatenated(name, pieces, order)
    return whole


def _concatenated(name: str, pieces: Sequence[Any], order: torch.Tensor) -> Any:
    if all(isinstance(piece, (list, tuple)) for piece in pieces):  # an entry per camera
        return [_concatenated(name, views, order) for views in zip(*pieces, strict=True)]
    shapes = dict.fromkeys(tuple(piece.shape[1:]) for piece in pieces if isinstance(piece, torch.Tensor))
    if len(shapes) != 1 or not all(isinstance(piece, torch.Tensor) for piece in pieces):
        first, other = [*shapes, ()][:2]
        raise FeatureShapeError(name, other, f"{first}, as another sample of the batch has: a batch has one shape")
    return torch.cat(list(pieces))[order]


def _alike(pieces: Sequence[Any]) -> bool:
    """Return whether pictures of all groups have the same sizes."""
    sizes = [tuple(x.shape[1:] for x in (piece if isinstance(piece, list) else [piece])) for piece in pieces]
    return len(set(sizes)) == 1


def _resized(pictures: torch.Tensor | list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Return pictures (b, …, v, c, height, width) as the network would resize them, bilinear and with smoothing."""
    views = pictures if isinstance(pictures, list) else pictures.unbind(-4)
    resized = [
        F.interpolate(x.flatten(0, -4), size, mode="bilinear", antialias=True).unflatten(0, x.shape[:-3])
        for x in views
    ]
    return torch.stack(resized, dim=-4)


def _padded(pieces: Sequence[torch.Tensor], value: int, side: str) -> list[torch.Tensor]:
    """Return tokens (b, n) of one length, the longest's."""
    longest = max(piece.shape[1] for piece in pieces)
    padding = [(longest - piece.shape[1], 0) if side == "left" else (0, longest - piece.shape[1]) for piece in pieces]
    return [F.pad(piece, pad, value=value) for piece, pad in zip(pieces, padding, strict=True)]
