"""How much of a picture a policy sees that crops its cameras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .diffusion import DiffusionConfig

SMALL_SHARE = 0.5  # a crop that leaves less is said in the log and on the card


def small_crops(config: Mapping[str, Any]) -> list[str]:
    """Return a sentence per camera of whose pictures the network sees less than half.

    Args:
        config (`Mapping[str, Any]`): `policy.config.to_dict()`.
    """
    backbone = config.get("backbone")
    fields = backbone if isinstance(backbone, Mapping) else config
    if "crop_shape" not in fields and fields.get("type") == "diffusion":
        fields = {**fields, "crop_shape": DiffusionConfig.crop_shape}
    crop = fields.get("crop_shape")
    if not crop:
        return []
    sentences = []
    for name, feature in (config.get("input_features") or {}).items():
        if feature["type"] != "VISUAL":
            continue
        height, width = feature["shape"][1:]
        rows, columns = fields.get("resize_shape") or (height, width)
        share = crop[0] * crop[1] / (rows * columns)
        if share < SMALL_SHARE:
            sentences.append(
                f"Of the pictures of {name}, {height} × {width} pixels (height × width), the network sees a crop of "
                f"{crop[0]} × {crop[1]}"
                + (f" after they are resized to {rows} × {columns}" if (rows, columns) != (height, width) else "")
                + f": {share * 100:.0f} % of the picture (`crop_shape`, `resize_shape`)."
            )
    return sentences
