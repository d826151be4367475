"""GR00TN1_5Policy: Eagle 2.5 and a flow-matching action head, for many robots (NVIDIA 2025, arXiv 2503.14734)."""

from __future__ import annotations

from ...configuration.gr00t_n1_5 import GR00TN1_5Config
from ..action_heads.flow_matching_1_5 import FlowmatchingActionHead_1_5
from ..backbones.eagle_1_5 import EagleBackbone1_5
from ..registry import register_policy
from .gr00t import HEAD, PROJECTORS, GR00TPolicy, parts_of, sampling_stages


@register_policy("gr00t_n1_5")
class GR00TN1_5Policy(GR00TPolicy):
    """Be GR00T N1.5; see `GR00TPolicy`.

    Args:
        config (`GR00TN1_5Config`): its defaults are the published model's.
    """

    config_class = GR00TN1_5Config
    backbone_class = EagleBackbone1_5
    head_class = FlowmatchingActionHead_1_5
    # The learned tokens are as small as a projector. What works on the features does so for the transformer, in layers
    # of the same kind.
    modules_to_save = (*PROJECTORS, HEAD + "future_tokens", "backbone.eagle_linear")
    parameter_parts = parts_of(
        "backbone.eagle_model", modules_to_save, (HEAD + "model", HEAD + "vlln", HEAD + "vl_self_attention")
    )
    stages = sampling_stages("backbone.eagle_model")
