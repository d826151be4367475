"""PI05Policy: π0 with the state in its prompt and the flow time in its norms (Physical Intelligence 2025)."""

from __future__ import annotations

from ...configuration.pi05 import PI05PolicyConfig
from ..action_heads.pi05 import HEADS, PI05FlowMatching
from ..registry import register_policy
from .pi0 import EXACT, PI0Policy


@register_policy("pi05_policy")
class PI05Policy(PI0Policy):
    """Map pictures and a prompt that tells the robot's state to a chunk of actions; see `PI0Policy`.

    The input `state` is not read by the network: the processor has written it into `input_ids`. Source: arXiv
    2504.16054.

    Args:
        config (`PI05PolicyConfig`): with input and output features set.
    """

    config_class = PI05PolicyConfig
    network_class = PI05FlowMatching
    _keep_in_fp32_modules_strict = [*EXACT, "expert_modulation", *HEADS]
