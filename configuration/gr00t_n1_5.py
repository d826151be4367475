"""Configuration of GR00T N1.5, a flow-matching vision-language-action policy (NVIDIA 2025, arXiv 2503.14734)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .eagle import EagleBaseConfig, EagleConfig1_5
from .flow_matching import FlowmatchingActionHeadConfig, FlowmatchingActionHeadConfig_1_5
from .gr00t import DIT, GR00TConfig, nested

# As nvidia/GR00T-N1.5-3B publishes them.
BACKBONE: dict[str, Any] = {
    "select_layer": 12,
    "tune_llm": False,
    "tune_visual": True,
    "reproject_vision": False,
    "use_flash_attention": True,
    "load_bf16": False,
    "eagle_path": "NVEagle/eagle_er-qwen3_1_7B-Siglip2_400M_stage1_5_128gpu_er_v7_1mlp_nops",
    "project_to_dim": None,
}
HEAD: dict[str, Any] = {
    "backbone_embedding_dim": 2048,
    "max_action_dim": 32,
    "diffusion_model_cfg": DIT | {"cross_attention_dim": 2048},
    "vl_self_attention_cfg": {
        "attention_head_dim": 64,
        "dropout": 0.2,
        "final_dropout": True,
        "num_attention_heads": 32,
        "num_layers": 4,
        "positional_embeddings": None,
    },
}


class GR00TN1_5Config(GR00TConfig):
    """Configure GR00T N1.5. Defaults are those of nvidia/GR00T-N1.5-3B; nested fields are completed with them.

    States and actions of any width up to `max_state_dim` and `action_dim` are padded with zeros by the processor, and
    every robot has projectors of its own, so that one set of weights serves many robots. A config without features
    describes the network only; set them for a robot with `set_input_output_features`.

    Values of the nested fields can be given by their own names, in the constructor, at loading and on assignment:
    `select_layer`, `tune_llm`, `tune_visual`, `project_to_dim`, `tune_projector`, `tune_diffusion_model`,
    `action_dim`, `action_horizon`, `max_state_dim`, `num_inference_timesteps`, `mask_padding`, …

    Args:
        backbone_cfg (`dict`, *optional*): arguments of `EagleBackbone1_5`.
        action_head_cfg (`dict`, *optional*): fields of `FlowmatchingActionHeadConfig_1_5`. Its `action_dim` is the
            padded width, its `mask_padding=True` makes a sample independent of the batch it is in, which the published
            model is not.
        eagle_config (`dict`, *optional*): fields in which the vision-language model differs from the published one,
            see `EagleConfig1_5`.
        compute_dtype, model_dtype (`str`): as published, without effect: `dtype` at loading says the weights' type.
        n_action_steps (`int`, *optional*): actions executed before the next prediction; by default the whole chunk.
        loss_over (`str`, *optional*, defaults to `"real"`): see `PolicyConfig`; NVIDIA trains GR00T over `"steps"`.
        embodiment_tag (`str`, *optional*, defaults to `"new_embodiment"`): which robot it is.
        embodiment_ids (`dict[str, int]`, *optional*): robot → the slot of its projectors; by default the published.
        state_parts, action_parts (`dict[str, dict]`, *optional*): part → `{"width": …, "mode": …}`, in the order in
            which they stand in the feature; by default one part, in the mode of its feature type.
        empty_cameras (`int`, *optional*, defaults to 0): see `VisionLanguageActionConfig`; an empty one has no tokens.
        tokenizer_name (`str`, *optional*): Hub id or folder of the tokenizer; the published checkpoint has none.
        max_instruction_tokens (`int`, *optional*, defaults to 256): tokens of an instruction at most.
        image_crop_scale (`float`, *optional*, defaults to 0.95): share of a picture's height and width that is seen.
        attention_implementation (`str`, *optional*): of the vision-language model; by default what
            `attn_implementation` asks of every transformers model, which is `"sdpa"`.

    Raises:
        InvalidConfigError: values that disagree, or that no network can have.
        UnknownConfigFieldError: a field that does not exist, nested ones as well.
    """

    model_type = "gr00t_n1_5"
    default_backbone: ClassVar[Mapping[str, Any]] = BACKBONE
    default_head: ClassVar[Mapping[str, Any]] = HEAD
    default_embodiments: ClassVar[Mapping[str, int]] = {
        "gr1": 24,
        "oxe_droid": 17,
        "agibot_genie1": 26,
        "new_embodiment": 31,
    }
    eagle_class: ClassVar[type[EagleBaseConfig]] = EagleConfig1_5
    head_class: ClassVar[type[FlowmatchingActionHeadConfig]] = FlowmatchingActionHeadConfig_1_5
    feature_width_name: ClassVar[str] = "backbone_embedding_dim"

    tokenizer_name: str | None = "lerobot/eagle2hg-processor-groot-n1p5"

    use_vlln = nested("action_head_cfg", "use_vlln")
    expand_batch = nested("action_head_cfg", "expand_batch")
    num_target_vision_tokens = nested("action_head_cfg", "num_target_vision_tokens")
    vl_self_attention_cfg = nested("action_head_cfg", "vl_self_attention_cfg")
    backbone_embedding_dim = nested("action_head_cfg", "backbone_embedding_dim")

    @property
    def image_token_index(self) -> int:
        """The id of the token in whose place a picture's token stands."""
        return self.eagle_config["image_token_index"]
