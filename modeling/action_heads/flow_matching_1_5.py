"""FlowmatchingActionHead_1_5: the action head of GR00T N1.5, which adds to N1's three things.

The features are normalised and attend to each other first; learned tokens stand between state and actions; and a
training batch can be expanded, since features cost more than another flow time. Shapes as in `flow_matching.py`.
Source: NVIDIA's Isaac-GR00T N1.5, whose parameter names are kept.
"""

from __future__ import annotations

import torch
from torch import nn

from ...configuration.flow_matching import FlowmatchingActionHeadConfig_1_5
from ..layers.category_specific import Categories
from ..layers.dit import SelfAttentionTransformer
from .flow_matching import FlowmatchingActionHead, LearnedVectors


class FlowmatchingActionHead_1_5(FlowmatchingActionHead):
    """Learn and follow the velocity from noise to actions, as `FlowmatchingActionHead` does.

    What works on the features, and the learned tokens, are trained whatever the config freezes, as published.

    Args:
        config (`FlowmatchingActionHeadConfig_1_5`): its widths are the padded ones.

    Raises:
        InvalidConfigError: the config is inconsistent, or another head's.
    """

    config_class = FlowmatchingActionHeadConfig_1_5

    # The learned tokens are as small as a projector. What works on the features does so for the transformer, in layers
    # of the same kind.
    modules_to_save = (*FlowmatchingActionHead.modules_to_save, "future_tokens")
    parameter_parts = {
        "tune_projector": modules_to_save,
        "tune_diffusion_model": ("model", "vlln", "vl_self_attention"),
    }

    def __init__(self, config: FlowmatchingActionHeadConfig_1_5):
        super().__init__(config)
        if config.num_target_vision_tokens:
            self.future_tokens = LearnedVectors(config.num_target_vision_tokens, config.input_embedding_dim)
        if config.use_vlln:
            self.vlln = nn.LayerNorm(config.backbone_embedding_dim)
            self.vl_self_attention = SelfAttentionTransformer(config.vl_config())

    def refine(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the features (b, n, c), normalised and after they have attended to each other."""
        return self.vl_self_attention(self.vlln(features), mask) if self.config.use_vlln else features

    def prefix(self, state: torch.Tensor, embodiment: Categories) -> torch.Tensor:
        """Return the tokens (b, 1 + learned, d) that stand before the actions: the state's, and those learned."""
        tokens = super().prefix(state, embodiment)  # (b, 1, d)
        count = self.config.num_target_vision_tokens
        if not count:
            return tokens
        return torch.cat([tokens, self.future_tokens(count).expand(len(tokens), -1, -1)], dim=1)
