"""PI05FlowMatching: π0.5's network, which is π0's with the state in the prompt and the flow time in the norms.

Shapes as in `pi0.py`. Source: Physical Intelligence et al. 2025 (arXiv 2504.16054) and openpi, whose parameter names
are kept.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ..precision import compute_dtype
from .pi0 import PI0FlowMatching, encode_time, require_width

HEADS = ("action_in_proj", "time_mlp_in", "time_mlp_out", "action_out_proj")


class PI05FlowMatching(PI0FlowMatching):
    """Learn and follow the velocity from actions to noise, given pictures and a prompt that tells the robot's state.

    Where `PI0FlowMatching` takes a state, this network reads none: it is in the prompt.

    Args:
        config (`PI05PolicyConfig`): its width of actions is the padded one.

    Raises:
        InvalidConfigError: the config is inconsistent.
    """

    heads = modules_to_save = HEADS
    # Through its norms the flow time steers the expert: they are adapted like its other layers.
    lora_targets = PI0FlowMatching.lora_targets | {
        "tune_diffusion_model": (
            *PI0FlowMatching.lora_targets["tune_diffusion_model"],
            *("input_layernorm", "post_attention_layernorm", "expert_modulation.norm"),
        )
    }
    expert_norms = "expert_modulation"
    state_tokens = 0

    def build_heads(self, w: int) -> None:
        """Build the layers around an expert of this width, w."""
        self.action_in_proj = nn.Linear(self.config.max_action_dim, w)
        self.time_mlp_in = nn.Linear(w, w)
        self.time_mlp_out = nn.Linear(w, w)
        self.action_out_proj = nn.Linear(w, self.config.max_action_dim)

    def join_suffix(self, state: torch.Tensor | None, noisy_actions: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the suffix (b, h, w), which is the actions alone."""
        return self.embed_actions(noisy_actions, time)

    def embed_state(self, state: torch.Tensor | None) -> None:
        """Return no token of the state."""

    def embed_actions(self, noisy_actions: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the tokens (b, h, w) of actions (b, h, a), whatever the flow time is."""
        require_width("actions", noisy_actions, self.config.max_action_dim)
        return self.action_in_proj(noisy_actions.to(compute_dtype(self.action_in_proj)))

    def embed_condition(self, time: torch.Tensor) -> torch.Tensor:
        """Return the condition (n, w) of the expert's norms at flow times (n,)."""
        width, dtype = self.time_mlp_in.in_features, compute_dtype(self.time_mlp_in)
        encoded = encode_time(time, width, self.config.min_period, self.config.max_period).to(dtype)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(encoded))))

    def embed_time(self, time: torch.Tensor) -> torch.Tensor:
        """Return the modulations (n, (6 layers + 3) · w) of the expert's norms at flow times (n,)."""
        return self.paligemma_with_expert.expert_modulation(self.embed_condition(time))

    def modulation(self, time: torch.Tensor) -> torch.Tensor:
        """Return what an encoded flow time does to the expert's norms: it is their modulation."""
        return time
