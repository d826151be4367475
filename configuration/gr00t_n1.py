"""Configuration of GR00T N1, a flow-matching vision-language-action policy (NVIDIA 2025, arXiv 2503.14734)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .eagle import EagleBaseConfig, EagleConfig
from .flow_matching import FlowmatchingActionHeadConfig
from .gr00t import DIT, GR00TConfig, nested

# As nvidia/GR00T-N1-2B publishes them.
BACKBONE: dict[str, Any] = {
    "select_layer": 12,
    "model_name": None,
    "tune_llm": False,
    "tune_visual": True,
    "reproject_vision": False,
    "scale_image_resolution": 1,
    "processor_cfg": {"max_input_tiles": 1, "model_spec": {"template": "qwen2-chat", "num_image_token": 64}},
    "projector_dim": 2048,
    "allow_reshape_visual": True,
    "remove_llm": False,
    "load_pretrained_det_eagle_path": None,
    "eagle_path": None,
    "use_flash_attention": False,
    "load_bf16": False,
    "project_to_dim": 1536,
    "use_local_eagle_hg_model": True,
    "img_context_token_id": 49154,
}
HEAD: dict[str, Any] = {
    "max_action_dim": 32,
    "diffusion_model_cfg": DIT,
}


class GR00TN1Config(GR00TConfig):
    """Configure GR00T N1. Defaults are those of nvidia/GR00T-N1-2B; nested fields are completed with them.

    What is not said here is as in `GR00TN1_5Config`.

    Args:
        backbone_cfg (`dict`, *optional*): arguments of `EagleBackbone`, `img_context_token_id` among them.
        action_head_cfg (`dict`, *optional*): fields of `FlowmatchingActionHeadConfig`.
        eagle_config (`dict`, *optional*): fields in which the vision-language model differs from the published one,
            see `EagleConfig`.
        fields: see `GR00TN1_5Config`.
    """

    model_type = "gr00t_n1"
    default_backbone: ClassVar[Mapping[str, Any]] = BACKBONE
    default_head: ClassVar[Mapping[str, Any]] = HEAD
    default_embodiments: ClassVar[Mapping[str, int]] = {"gr1": 24, "new_embodiment": 31}
    eagle_class: ClassVar[type[EagleBaseConfig]] = EagleConfig
    head_class: ClassVar[type[FlowmatchingActionHeadConfig]] = FlowmatchingActionHeadConfig
    feature_width_name: ClassVar[str] = "the diffusion_model_cfg's cross_attention_dim, or else input_embedding_dim,"

    processor_cfg = nested("backbone_cfg", "processor_cfg")
    projector_dim = nested("backbone_cfg", "projector_dim")
    scale_image_resolution = nested("backbone_cfg", "scale_image_resolution")
    img_context_token_id = nested("backbone_cfg", "img_context_token_id")

    @property
    def image_token_index(self) -> int:
        """The id of the token in whose place a picture's token stands."""
        return self.img_context_token_id

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that the network sees."""
        return super().image_size * self.scale_image_resolution

    @property
    def tokens_per_image(self) -> int:
        """Image tokens in the prompt of one picture."""
        return self.eagle_class.of(self.eagle_config).image_tokens(self.scale_image_resolution)

    @property
    def projects_features(self) -> bool:
        """Whether the backbone projects the language model's features to `project_to_dim`."""
        return super().projects_features and self.projector_dim != -1
