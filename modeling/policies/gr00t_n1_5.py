"""GR00TN1_5Policy: Eagle 2.5 and a flow-matching action head, for many robots (NVIDIA 2025, arXiv 2503.14734)."""

from __future__ import annotations

from ...configuration.gr00t_n1_5 import GR00TN1_5Config
from ..action_heads.flow_matching_1_5 import FlowmatchingActionHead_1_5
from ..backbones.eagle_1_5 import EagleBackbone1_5
from ..registry import register_policy
from .gr00t import GR00TPolicy


@register_policy("gr00t_n1_5")
class GR00TN1_5Policy(GR00TPolicy):
    """Run GR00T N1.5; see `GR00TPolicy`.

    Args:
        config (`GR00TN1_5Config`): its defaults are the published model's.
    """

    config_class = GR00TN1_5Config
    backbone_class = EagleBackbone1_5
    head_class = FlowmatchingActionHead_1_5
