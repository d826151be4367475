"""ResNets under torchvision's names, which LeRobot and InternManip publish, as transformers' `ResNetModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..configuration.resnet import RESNETS
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
    """
    stem = weights.get(trunk + "embedder.embedder.convolution.weight")
    if stem is None:
        return None
    blocks = re.compile(re.escape(trunk) + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d)\.convolution\.weight")
    shapes = {tuple(map(int, m.groups())): w.shape[0] for n, w in weights.items() if (m := blocks.fullmatch(n))}
    stages = sorted({stage for stage, _, _ in shapes})
    sizes = {
        "layer_type": "bottleneck" if any(conv == 2 for _, _, conv in shapes) else "basic",
        # The widest convolution of a stage is its last, whatever the kind of layer.
        "hidden_sizes": [max(width for (s, _, _), width in shapes.items() if s == stage) for stage in stages],
        "depths": [max(block for s, block, _ in shapes if s == stage) + 1 for stage in stages],
        "embedding_size": stem.shape[0],
        "num_channels": stem.shape[1],
    }
    usual = {"embedding_size": 64, "num_channels": 3} | RESNETS.get(name, {})
    differing = {field: value for field, value in sizes.items() if usual.get(field) != value}
    return differing or None
