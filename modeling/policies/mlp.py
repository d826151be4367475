"""MLPPolicy: two layers and a U-Net, the smallest policy that the seam allows."""

from __future__ import annotations

import torch
from torch import nn

from ...configuration.mlp import MLPConfig
from ..action_heads.diffusion import UnetActionHead
from ..output import PolicyOutput
from ..policy import PolicyModel
from ..registry import register_policy
from ..seam import Draws, Features, Labels, PolicyInputs


class MLPBackbone(nn.Module):
    """Encode the state as one token."""

    parameter_parts = {"tune_projector": ("layers",)}
    lora_targets = {"tune_projector": ("layers.0", "layers.2")}

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.width = config.hidden_size
        self.layers = nn.Sequential(
            nn.Linear(config.state_dim, self.width), nn.GELU(), nn.Linear(self.width, self.width)
        )

    def encode(self, inputs: PolicyInputs) -> Features:
        """Return the features of an observation."""
        return Features(self.layers(inputs.state)[:, None])  # (b, 1, d)


@register_policy("mlp_policy")
class MLPPolicy(PolicyModel):
    """Map a state to a chunk of actions.

    Args:
        config (`MLPConfig`): with input and output features set.
    """

    config_class = MLPConfig

    def __init__(self, config: MLPConfig):
        config.require_features()
        super().__init__(config)
        self.backbone = MLPBackbone(config)
        self.action_head = UnetActionHead(config.head_config, self.backbone.width)
        self.post_init()

    def forward(
        self,
        state: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        action_is_pad: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> PolicyOutput:
        """Return the training loss for `actions`; without them a chunk; see `PolicyModel.forward`."""
        inputs, labels = PolicyInputs(state=state), Labels(actions, action_is_pad)
        return super().forward(inputs, labels, Draws(noise, time), return_loss)
