"""ResNets under torchvision's names, which LeRobot and InternManip publish, as transformers' `ResNetModel`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from transformers import ResNetConfig, ResNetModel

from ..configuration.resnet import RESNETS
from ..errors import WeightsMismatchError
from .rename import Renames


def resnet_renames(
    published: str, ours: str, stem: tuple[str, str] = ("conv1", "bn1"), stages: str = "layer"
) -> Renames:
    """Return the renames (pattern, replacement) of a ResNet trunk.

    Args:
        published: regular expression of its prefix in the published names, without groups.
        ours: its prefix in ours.
        stem: names of the first convolution and its norm.
        stages: what precedes the number 1 to 4 of a stage; `""` for a trunk that became a sequence, whose stages
            are its children 4 to 7.
    """
    first = 1 if stages else 4

    def part(kind: str) -> str:
        return "convolution" if kind == "conv" else "normalization"

    def in_block(match: re.Match) -> str:
        stage, block, kind, number = match.groups()
        return f"{ours}encoder.stages.{int(stage) - first}.layers.{block}.layer.{int(number) - 1}.{part(kind)}."

    def shortcut(match: re.Match) -> str:
        stage, block, number = match.groups()
        kind = part("conv" if number == "0" else "bn")
        return f"{ours}encoder.stages.{int(stage) - first}.layers.{block}.shortcut.{kind}."

    convolution, norm = map(re.escape, stem)
    return [
        (rf"^{published}{convolution}\.", f"{ours}embedder.embedder.convolution."),
        (rf"^{published}{norm}\.", f"{ours}embedder.embedder.normalization."),
        (rf"^{published}{stages}(\d)\.(\d+)\.(conv|bn)(\d)\.", in_block),
        (rf"^{published}{stages}(\d)\.(\d+)\.downsample\.(\d)\.", shortcut),
    ]


def resnet_fields(name: str, weights: Mapping[str, torch.Tensor], trunk: str) -> dict[str, Any] | None:
    """Read the fields of `ResNetConfig` in which a trunk differs from the ResNet of that name off its weights.

    Published configs only name the ResNet.

    Args:
        name: one of `RESNETS`, or another.
        weights: under our names.
        trunk: the trunk's prefix in them.

    Raises:
        WeightsMismatchError: a tensor's shape would make the trunk far larger than its weights.
    """
    stem = weights.get(trunk + "embedder.embedder.convolution.weight")
    if stem is None:
        return None
    layers = re.compile(
        re.escape(trunk) + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d)\.(convolution|normalization)\.weight"
    )
    found = {m.groups(): tuple(w.shape) for n, w in weights.items() if (m := layers.fullmatch(n))}
    last = "2" if any(layer == "2" for _, _, layer, _ in found) else "1"
    widths: dict[int, Counter] = {}
    depths: dict[int, int] = {}
    for (stage, block, layer, kind), shape in found.items():
        depths[int(stage)] = max(depths.get(int(stage), 0), int(block) + 1)
        votes = widths.setdefault(int(stage), Counter())
        if layer != last:
            continue
        if kind == "normalization" and len(shape) == 1:
            votes[shape[0]] += 1
        elif len(shape) == 4 and shape[0] == shape[1] * (4 if last == "2" else 1):  # else it is mis-shaped
            votes[shape[0]] += 2
    stem_norm = weights.get(trunk + "embedder.embedder.normalization.weight")
    stem_votes = ((stem, 4, 2), (stem_norm, 1, 1))
    stems = Counter({x.shape[0]: n for x, dims, n in reversed(stem_votes) if x is not None and x.ndim == dims})
    usual = {"embedding_size": 64, "num_channels": 3} | RESNETS.get(name, {})
    sizes = {
        "layer_type": "bottleneck" if last == "2" else "basic",
        # The last layer of a block is as wide as its stage, whatever the kind of layer.
        "hidden_sizes": [_most_said(widths[stage], 1) for stage in sorted(widths)],
        "depths": [depths[stage] for stage in sorted(widths)],
        "embedding_size": _most_said(stems, usual["embedding_size"]),
        "num_channels": stem.shape[1] if stem.ndim == 4 else usual["num_channels"],
    }
    _require_possible(sizes, weights, trunk)
    differing = {field: value for field, value in sizes.items() if usual.get(field) != value}
    return differing or None


def _most_said(votes: Counter, default: int) -> int:
    """Return the width that most tensors have, of several the smallest."""
    return min(votes, key=lambda width: (-votes[width], width), default=default)


def _require_possible(sizes: Mapping[str, Any], weights: Mapping[str, torch.Tensor], trunk: str) -> None:
    """Check that a ResNet of these sizes is about as large as its weights, before memory is taken for it.

    Raises:
        WeightsMismatchError: it is far larger, so a tensor from which the sizes were read has another shape.
    """
    held = {name.removeprefix(trunk): tuple(w.shape) for name, w in weights.items() if name.startswith(trunk)}
    count = sum(math.prod(shape) for shape in held.values())
    if sum(sizes["depths"]) > 2 * len(held):  # numbered beyond what is there
        block = re.compile(r"\.layers\.(\d+)\.")
        beyond = [n for n in held if (m := block.search(n)) and int(m[1]) >= len(held)]
        raise WeightsMismatchError("the published checkpoint", unexpected=[trunk + name for name in beyond])
    with torch.device("meta"):
        expected = {
            name: tuple(value.shape) for name, value in ResNetModel(ResNetConfig(**sizes)).state_dict().items()
        }
    if sum(math.prod(shape) for shape in expected.values()) > 8 * count:
        wrong = [
            (trunk + n, shape, expected[n]) for n, shape in held.items() if n in expected and shape != expected[n]
        ]
        raise WeightsMismatchError("the published checkpoint", mismatched=wrong)
