"""GR00TN1Policy: Eagle 2 and a flow-matching action head, for many robots (NVIDIA 2025, arXiv 2503.14734)."""

from __future__ import annotations

from ...configuration.gr00t_n1 import GR00TN1Config
from ..action_heads.flow_matching import FlowmatchingActionHead
from ..backbones.eagle import EagleBackbone
from ..registry import register_policy
from .gr00t import GR00TPolicy


@register_policy("gr00t_n1")
class GR00TN1Policy(GR00TPolicy):
    """Run GR00T N1; see `GR00TPolicy`.

    Args:
        config (`GR00TN1Config`): its defaults are the published model's.
    """

    config_class = GR00TN1Config
    backbone_class = EagleBackbone
    head_class = FlowmatchingActionHead
