"""PI0Policy: a vision-language-action policy that turns noise into actions (Black et al. 2024, arXiv 2410.24164)."""

from __future__ import annotations

from typing import Any

import torch

from ...configuration.pi0 import PI0PolicyConfig
from ..action_heads.pi0 import HEADS, PI0FlowMatching
from ..registry import register_policy
from ..seam import Draws, PolicyInputs
from .vision_language_action import VisionLanguageActionPolicy

# Modules of the backbone that LeRobot leaves in float32 where it trains in bfloat16.
EXACT = ("vision_tower", "multi_modal_projector", "input_layernorm", "post_attention_layernorm", "language_norm")


@register_policy("pi0_policy")
class PI0Policy(VisionLanguageActionPolicy):
    """Map pictures, an instruction and the robot's state to a chunk of actions; see `VisionLanguageActionPolicy`.

    Its backbone and its action expert attend to each other in every layer, so they are one component, which goes with
    no other backbone or head.

    Args:
        config (`PI0PolicyConfig`): with input and output features set.
    """

    config_class = PI0PolicyConfig
    network_class = PI0FlowMatching
    components = ("model",)
    _supports_flex_attn = True
    # As LeRobot trains it in bfloat16. The heads too: noise, time and velocity are float32.
    _keep_in_fp32_modules_strict = [*EXACT, "expert_norm", *HEADS]

    def __init__(self, config: PI0PolicyConfig):
        config.require_features()
        super().__init__(config)
        self.model = self.network_class(config)
        self.post_init()

    def errors(self, inputs: PolicyInputs, actions: torch.Tensor, draws: Draws) -> dict[str, torch.Tensor]:
        """Return `flow`, the squared error (b, h, a) of the velocity."""
        return {"flow": self.model(*_observation(inputs), actions, draws.noise, draws.time)}

    def sample(self, inputs: PolicyInputs, draws: Draws) -> torch.Tensor:
        """Return a chunk (b, h, a): the velocity followed from noise."""
        return self.model.sample_actions(*_observation(inputs), draws.noise, draws.num_steps, draws.generator)

    def _fuse(self) -> None:
        self.model.paligemma_with_expert.fuse()

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Choose the attention kernel of the vision tower and of the joint layers: eager, sdpa or flex_attention."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config.attention_implementation = None
        self.model.paligemma_with_expert.config = self.config.backbone_config()


def _observation(inputs: PolicyInputs) -> tuple:
    """Return the arguments of `PI0FlowMatching` that describe an observation."""
    return inputs.pixel_values, inputs.pixel_mask, inputs.input_ids, inputs.attention_mask, inputs.state
