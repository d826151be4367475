"""GR00TPolicy: what GR00T N1.5 and N1 share (NVIDIA 2025, arXiv 2503.14734)."""

from __future__ import annotations

from typing import Any, ClassVar

from ...configuration.gr00t import GR00TConfig
from ..action_heads.flow_matching import FlowmatchingActionHead
from ..backbones.eagle_base import EagleBackboneBase
from .vision_language_action import VisionLanguageActionPolicy


class GR00TPolicy(VisionLanguageActionPolicy):
    """Map prompts with pictures and the robot's state to a chunk of actions; see `VisionLanguageActionPolicy`.

    Subclasses name their parts, which are composed here: a backbone that gives features, a head that reads them.

    Args:
        config (`GR00TConfig`): of the same model; features may be absent.
    """

    backbone_class: ClassVar[type[EagleBackboneBase]]
    head_class: ClassVar[type[FlowmatchingActionHead]]

    _supports_flash_attn = True

    def __init__(self, config: GR00TConfig):
        config.require_features()
        super().__init__(config)
        self.backbone = self.backbone_class.from_config(config)
        self.action_head = self.head_class(config.head_config())
        self.post_init()

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Choose the attention kernel of the vision tower and of the language model."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config.attention_implementation = None
