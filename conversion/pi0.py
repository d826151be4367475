"""π0 as LeRobot (both generations), openpi and transformers publish it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configuration.features import IMAGE_PREFIX
from ..configuration.pi0 import GEMMA_EXPERT, PALIGEMMA, PI0PolicyConfig
from ..errors import InvalidConfigError, nearest
from ..modeling.action_heads.pi0 import PI0FlowMatching
from ..modeling.backbones.paligemma_with_expert import PaliGemmaWithExpertModel
from ..modeling.policies.pi0 import PI0Policy
from .lerobot_steps import NEW_LINE, TOKENIZER
from .published_policy import PublishedPolicy, Weights, known_fields, register_published
from .rename import rename

# openpi has neither the leading `model.` nor, in a file of the backbone alone, its name. LeRobot's files of 2025 have
# PaliGemma without `model.` and its language model with it, as transformers 4.51 did. transformers' own π0 calls
# PaliGemma `vlm` and the expert `dit`, and its vision tower has lost a level.
_PALIGEMMA = r"^(?:(?:model\.)?(?:paligemma_with_expert\.)?paligemma\.(?:model\.)?|model\.vlm\.)"
_LANGUAGE = _PALIGEMMA + r"language_model\.(?:model\.)?"
_EXPERT = r"^(?:(?:model\.)?(?:paligemma_with_expert\.)?gemma_expert\.(?:model\.)?|model\.dit\.(?:model\.)?)"
# `time_mlp` is π0.5's, which has no `state_proj` and no `action_time_mlp`.
_HEADS = r"(state_proj|action_in_proj|(?:action_)?time_mlp_(?:in|out)|action_out_proj)\."

BACKBONE = "model.paligemma_with_expert."
RENAMES = [
    (_PALIGEMMA + r"vision_tower\.(?:vision_model\.)?", BACKBONE + "vision_tower."),
    (_PALIGEMMA + r"multi_modal_projector\.", BACKBONE + "multi_modal_projector."),
    (_PALIGEMMA + r"(?:language_model\.)?lm_head\.", BACKBONE + "lm_head."),
    (_LANGUAGE + r"embed_tokens\.", BACKBONE + "embed_tokens."),
    (_LANGUAGE + r"norm\.", BACKBONE + "language_norm."),
    (_LANGUAGE + r"layers\.(\d+)\.", BACKBONE + r"layers.\1.language_model."),
    # Of π0.5, whose norms have no weights of their own.
    (_EXPERT + r"(layers\.\d+\.[a-z_]+norm|norm)\.dense\.", BACKBONE + r"expert_modulation.\1."),
    (_EXPERT + r"layers\.(\d+)\.", BACKBONE + r"layers.\1.gemma_expert."),
    (_EXPERT + r"norm\.", BACKBONE + "expert_norm."),
    (_EXPERT + r"(lm_head|embed_tokens)\.", BACKBONE + r"expert_\1."),
    (r"^(?:model\.|embed_action_time\.)?" + _HEADS, r"model.\1."),
]
EMBEDDING, LM_HEAD = BACKBONE + "embed_tokens.weight", BACKBONE + "lm_head.weight"
# The expert's words: it reads none and says none.
UNUSED = (BACKBONE + "expert_lm_head.weight", BACKBONE + "expert_embed_tokens.weight")

VARIANTS = {
    "gemma_2b": PALIGEMMA["text_config"],
    "gemma_300m": GEMMA_EXPERT,
}


def rename_pi0_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return published π0 weights under our names; other names stay as they are.

    PaliGemma's word embedding and its head are tied when pretrained. A file that was saved before any fine-tuning may
    hold the head alone, which is then the embedding; where both are there the head is stale, because LeRobot trains
    only the embedding.
    """
    renamed = rename(state_dict, RENAMES)
    head = renamed.pop(LM_HEAD, None)
    if head is not None and EMBEDDING not in renamed:
        renamed[EMBEDDING] = head
    return {name: value for name, value in renamed.items() if name not in UNUSED}


# LeRobot's fields under other names than ours; `num_steps` and `resize_imgs_with_padding` are those of 0.1 to 0.3.
_FIELDS = {
    "tokenizer_max_length": "max_instruction_tokens",
    "num_steps": "num_inference_steps",
    "resize_imgs_with_padding": "image_resolution",
}

# Fields whose values follow from others, or that only LeRobot's training reads.
_FOLLOWING = ("paligemma_variant", "action_expert_variant", "proj_width", "train_state_proj")


def pi0_fields(
    config: Mapping[str, Any], weights: Weights, config_class: type[PI0PolicyConfig] = PI0PolicyConfig
) -> dict[str, Any]:
    """Return the fields of π0's or π0.5's config for LeRobot's; sizes follow from the variants that it names.

    Raises:
        InvalidConfigError: an unknown variant, or a conversion of joints that is done in LeRobot's code.
    """
    if config.get("adapt_to_pi_aloha"):
        raise InvalidConfigError(
            "adapt_to_pi_aloha=True: LeRobot converts the joints of this checkpoint's robot in its own code, which is "
            "not done here. Convert them yourself and set adapt_to_pi_aloha to false in config.json."
        )
    read = (*_FIELDS, *_FOLLOWING)
    fields = known_fields(config, config_class, read) | variant_fields(config)
    fields |= {ours: config[theirs] for theirs, ours in _FIELDS.items() if theirs in config}
    fields.pop("attention_implementation", None)  # a matter of the machine
    if "resize_imgs_with_padding" in config:
        fields["image_padding"] = "top_left"
    # LeRobot lists the cameras that a robot lacks among the features, and masks whichever is absent.
    empty = [name for name in fields["input_features"] if name.startswith(f"{IMAGE_PREFIX}empty_camera_")]
    fields["optional_cameras"] = empty
    return fields


def variant_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that the variants named by a LeRobot or openpi config stand for."""
    text = _variant(config, "paligemma_variant", "gemma_2b")
    return {
        "paligemma_config": {"text_config": text, "projection_dim": text["hidden_size"]},
        "gemma_expert_config": _variant(config, "action_expert_variant", "gemma_300m"),
    }


def _variant(config: Mapping[str, Any], field: str, default: str) -> dict[str, Any]:
    name = config.get(field, default)
    if isinstance(name, str) and name.endswith("_lora"):
        whole = name.removesuffix("_lora")
        raise InvalidConfigError(
            f"{field}={name!r}: openpi trained this checkpoint with LoRA, and its converter leaves LoRA's weights "
            f"out. Merge them into the others before the conversion (w + lora_a · lora_b · alpha / rank), then write "
            f"{whole!r} into config.json."
        )
    if name not in VARIANTS:
        raise InvalidConfigError(f"{field}={name!r} is not known. {nearest(str(name), VARIANTS)}")
    return dict(VARIANTS[name])


PI0 = register_published(
    PublishedPolicy(
        policy_class=PI0Policy,
        components={BACKBONE: PaliGemmaWithExpertModel, "model.": PI0FlowMatching},
        rename=rename_pi0_weights,
        fields=pi0_fields,
        lerobot_type="pi0",
        text_steps=(NEW_LINE, TOKENIZER),
    )
)
