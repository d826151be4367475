"""π0.5 as LeRobot and openpi publish it: under π0's names and some of its own, which are in π0's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configuration.pi05 import PI05PolicyConfig
from ..modeling.action_heads.pi05 import PI05FlowMatching
from ..modeling.backbones.paligemma_with_expert import PaliGemmaWithExpertModel
from ..modeling.policies.pi05 import PI05Policy
from .lerobot_steps import STATE_TEXT, TOKENIZER
from .pi0 import BACKBONE, pi0_fields, rename_pi0_weights
from .published_policy import PublishedPolicy, Weights, register_published


def pi05_fields(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return the fields of `PI05PolicyConfig` for LeRobot's config; errors as of `pi0_fields`."""
    return pi0_fields(config, weights, PI05PolicyConfig)


PI05 = register_published(
    PublishedPolicy(
        policy_class=PI05Policy,
        components={BACKBONE: PaliGemmaWithExpertModel, "model.": PI05FlowMatching},
        rename=rename_pi0_weights,
        fields=pi05_fields,
        lerobot_type="pi05",
        text_steps=(STATE_TEXT, TOKENIZER),
    )
)
