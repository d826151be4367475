"""ACT as LeRobot publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configuration.act import ACTConfig
from ..modeling.action_heads.act import ACTActionHead
from ..modeling.backbones.act import ACTBackbone
from ..modeling.policies.act import ACTPolicy
from .published_policy import PublishedPolicy, Weights, known_fields, register_published
from .rename import rename
from .resnet import resnet_fields, resnet_renames

TRUNK = "backbone.image_encoder."

# Published name → ours. First the ResNet, then which part owns the rest.
RENAMES = [
    *resnet_renames(r"model\.backbone\.", TRUNK),
    (r"^model\.(encoder[._])", r"backbone.\1"),
    (r"^model\.(vae_encoder|decoder|action_head)", r"action_head.\1"),
]


def rename_act_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return LeRobot's ACT weights under our names; other names stay as they are."""
    return rename(state_dict, RENAMES)


def act_fields(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return the fields of `ACTConfig` for LeRobot's config and the renamed weights."""
    fields = known_fields(config, ACTConfig)
    fields["pretrained_backbone_weights"] = None  # the trained ones are in the checkpoint
    if "vision_backbone" in fields:
        fields["vision_config"] = resnet_fields(fields["vision_backbone"], weights, TRUNK)
    return fields


ACT = register_published(
    PublishedPolicy(
        policy_class=ACTPolicy,
        components={"backbone.": ACTBackbone, "action_head.": ACTActionHead},
        rename=rename_act_weights,
        fields=act_fields,
        lerobot_type="act",
    )
)
