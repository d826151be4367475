"""Diffusion Policy as LeRobot publishes it, and its variant with CLIP as InternManip does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..configuration.diffusion import DiffusionConfig
from ..errors import InvalidConfigError
from ..modeling.action_heads.diffusion import DiffusionActionHead
from ..modeling.backbones.diffusion_rgb import DiffusionRgbEncoder
from ..modeling.policies.diffusion import DiffusionPolicy
from .published_policy import PublishedPolicy, Weights, known_fields, register_published
from .rename import COMPILED, rename
from .resnet import resnet_fields, resnet_renames

# The ResNet is a sequence there: 0 and 1 are its stem, 4 to 7 its stages.
TRUNK = resnet_renames("", "", stem=("0", "1"), stages="")
IN_TRUNK = re.compile(r"(?P<encoder>(?:diffusion\.rgb_encoder\.)?(?:\d+\.)?backbone\.)(?P<name>.+)")
# InternManip's head is what LeRobot's policy calls `diffusion`.
IN_HEAD = re.compile(r"(?:rgb_encoder|unet|language_encoder|language_projection)\.")
# InternManip publishes the whole CLIP; its vision half is never used.
UNUSED = re.compile(r"diffusion\.language_encoder\.(?:vision_model\.|visual_projection\.|logit_scale$)")
# Fields whose defaults differ between LeRobot's releases: where one is absent, the others cannot be guessed.
AMBIGUOUS = ("horizon", "n_action_steps", "crop_shape", "use_group_norm", "use_separate_rgb_encoder_per_camera")


def rename_diffusion_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return published weights under our names, CLIP's vision half left out; other names stay as they are."""
    renamed = {}
    for name, value in state_dict.items():
        name = name.replace(COMPILED, "")
        name = f"diffusion.{name}" if IN_HEAD.match(name) else name
        if UNUSED.match(name):
            continue
        if match := IN_TRUNK.fullmatch(name):
            name = match["encoder"] + next(iter(rename({match["name"]: value}, TRUNK)))
        renamed[name] = value
    return renamed


def diffusion_fields(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return the fields of `DiffusionConfig` for LeRobot's config and the renamed weights.

    Raises:
        InvalidConfigError: the config lacks fields whose defaults differ between LeRobot's releases.
    """
    if absent := [name for name in AMBIGUOUS if name not in config]:
        raise InvalidConfigError(
            f"The published config.json lacks {', '.join(absent)}, whose defaults LeRobot changed with release 0.4. "
            f"Add them to it; those of 0.1 to 0.3 are horizon 16, n_action_steps 8, crop_shape [84, 84], "
            f"use_group_norm true, use_separate_rgb_encoder_per_camera false."
        )
    fields = known_fields(config, DiffusionConfig, ["crop_ratio"])
    fields["pretrained_backbone_weights"] = None  # the trained ones are in the checkpoint
    if fields.get("resize_shape"):  # then LeRobot derives the crop from it
        ratio = config.get("crop_ratio", 1.0)
        if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise InvalidConfigError(f"config.json has crop_ratio={ratio!r}; it is a share of the picture, up to 1.")
        fields["crop_shape"] = [int(side * ratio) for side in fields["resize_shape"]] if ratio < 1 else None
    if "vision_backbone" in fields:
        encoder = "0." if config["use_separate_rgb_encoder_per_camera"] else ""
        trunk = f"diffusion.rgb_encoder.{encoder}backbone."
        fields["vision_config"] = resnet_fields(fields["vision_backbone"], weights, trunk)
    return fields


DIFFUSION = register_published(
    PublishedPolicy(
        policy_class=DiffusionPolicy,
        components={"diffusion.rgb_encoder.": DiffusionRgbEncoder, "diffusion.": DiffusionActionHead},
        rename=rename_diffusion_weights,
        fields=diffusion_fields,
        lerobot_type="diffusion",
    )
)
