"""The networks that several benchmarks measure, at the published size and at others that suit a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PI0Config, PI0ForConditionalGeneration

from manipulators import (
    ACTConfig,
    DiffusionConfig,
    GR00TN1_5Config,
    GR00TN1Config,
    PI0Policy,
    PI0PolicyConfig,
    PI05PolicyConfig,
)
from manipulators.conversion.pi0 import rename_pi0_weights

SIZES = ("tiny", "medium", "published")
WIDTH = 32  # of state and action
SIDE, PATCH = 224, 14  # height and width of a picture, and of its patches
SIDES = {"tiny": 2 * PATCH, "medium": SIDE, "published": SIDE}
VOCABULARY = 2048
IMAGE_TOKEN = 4  # that stands for pictures in a tokenizer of words
OBSERVED = ("pixel_values", "input_ids", "attention_mask", "state")  # what π0 reads to sample

LAYERS = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64}
TEXT = LAYERS | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": VOCABULARY}
EXPERT = LAYERS | {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": VOCABULARY}
# LeRobot writes the feed-forward width of the published vision tower, 4304, into whatever config it is given.
VISION = {
    "hidden_size": 384,
    "intermediate_size": 4304,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}

# Small enough to try a benchmark within seconds.
TINY_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
TINY_TEXT = TINY_LAYERS | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCABULARY}
TINY_VISION = VISION | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDES["tiny"],
}
TEXTS = {"tiny": TINY_TEXT, "medium": TEXT}
EXPERTS = {"tiny": TINY_TEXT | {"hidden_size": 32}, "medium": EXPERT}
VISIONS = {"tiny": TINY_VISION, "medium": VISION}

SMALL_RESNET = {"layer_type": "basic", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}

HEADS = {
    "tiny": {"width": 48, "blocks": 2, "features": 64, "hidden": 32},
    "medium": {"width": 512, "blocks": 8, "features": 512, "hidden": 512},
    "published": {"width": 1536, "blocks": 16, "features": 2048, "hidden": 1024},
}


def features(cameras: Iterable[object], width: int = WIDTH, height: int = SIDE, across: int | None = None) -> dict:
    """Return input and output features of a robot with these cameras, and a state and actions of the same width.

    Args:
        cameras: their names.
        width: of state and actions.
        height, across: of a picture; by default it is square.
    """
    picture = {"type": "VISUAL", "shape": (3, height, height if across is None else across)}
    pictures = {f"observation.images.{camera}": picture for camera in cameras}
    return {
        "input_features": pictures | {"observation.state": {"type": "STATE", "shape": (width,)}},
        "output_features": {"action": {"type": "ACTION", "shape": (width,)}},
    }


def pi0_config(size: str, cameras: int, config_class: type[PI0PolicyConfig] = PI0PolicyConfig) -> PI0PolicyConfig:
    """Return π0's config, or that of a policy with its fields."""
    robot = features(range(cameras), height=SIDES[size])
    if size == "published":
        return config_class(**robot)
    text = TEXTS[size]
    return config_class(
        **robot,
        image_resolution=(SIDES[size], SIDES[size]),
        paligemma_config={
            "projection_dim": text["hidden_size"],
            "text_config": text,
            "vision_config": VISIONS[size],
        },
        gemma_expert_config=EXPERTS[size],
    )


def pi05_config(size: str, cameras: int) -> PI05PolicyConfig:
    """Return π0.5's config."""
    return pi0_config(size, cameras, PI05PolicyConfig)


def pi0_inputs(config: PI0PolicyConfig, batch: int, training: bool = False) -> dict[str, torch.Tensor]:
    """Return model inputs with noise, and for training with labels and times; the last token stands for pictures."""
    inputs = config.example_inputs(batch) | config.example_draws(batch, training=training)
    vocabulary = config.backbone_config().paligemma_config.text_config.vocab_size
    return inputs | {"input_ids": inputs["input_ids"] % (vocabulary - 1)}


def native_pi0(ours: PI0Policy) -> PI0ForConditionalGeneration:
    """Return transformers' own π0 with the sizes, the weights, the type and the device of ours."""
    config = ours.config.backbone_config()
    text, vision = (getattr(config.paligemma_config, name).to_diff_dict() for name in ("text_config", "vision_config"))
    vlm = {
        "text_config": text,
        "vision_config": vision,
        "projection_dim": config.paligemma_config.projection_dim,
        "image_token_id": text["vocab_size"] - 1,
    }
    native = PI0Config(vlm_config=vlm, dit_config=config.gemma_expert_config.to_diff_dict())
    with ours.device:
        network = PI0ForConditionalGeneration._from_config(native, dtype=ours.dtype)
    weights = ours.state_dict()
    renamed = {name: next(iter(rename_pi0_weights({name: None})), None) for name in network.state_dict()}
    network.load_state_dict({theirs: weights[name] for theirs, name in renamed.items() if name}, strict=False)
    return network.to(ours.device)  # its table of frequencies is filled on the CPU


def native_pi0_inputs(inputs: dict[str, torch.Tensor], image_token: int) -> dict[str, torch.Tensor]:
    """Return inputs as transformers' network takes them: a token of the prompt per token of a picture."""
    b, cameras, _, height, width = inputs["pixel_values"].shape
    tokens = cameras * (height // PATCH) * (width // PATCH)
    pictures = torch.full((b, tokens), image_token, device=inputs["state"].device)
    given = {name: inputs[name] for name in ("pixel_values", "state", "actions", "noise") if name in inputs}
    return given | {
        "input_ids": torch.cat([pictures, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(pictures), inputs["attention_mask"]], dim=1),
        "pixel_attention_mask": torch.ones(b, cameras, dtype=torch.bool, device=pictures.device),
        **({"timestep": inputs["time"]} if "time" in inputs else {}),
    }


def gr00t_head(width: int, blocks: int, features: int, hidden: int) -> dict[str, Any]:
    """Return the fields of GR00T N1.5's action head that LeRobot's config has too."""
    common = {"dropout": 0.2, "final_dropout": True, "positional_embeddings": None}
    size = 48 if width % 48 == 0 else 64
    return {
        "input_embedding_dim": width,
        "hidden_size": hidden,
        "backbone_embedding_dim": features,
        "action_dim": 32,
        "action_horizon": 16,
        "max_state_dim": 64,
        "max_num_embodiments": 32,
        "num_inference_timesteps": 4,
        "num_target_vision_tokens": 32,
        "diffusion_model_cfg": common
        | {
            "num_attention_heads": width // size,
            "attention_head_dim": size,
            "num_layers": blocks,
            "output_dim": hidden,
            "norm_type": "ada_norm",
            "interleave_self_attention": True,
            "cross_attention_dim": features,
        },
        "vl_self_attention_cfg": common
        | {"num_attention_heads": features // 64, "attention_head_dim": 64, "num_layers": 4},
    }


def gr00t_config(size: str, cameras: int) -> GR00TN1_5Config:
    """Return the config of GR00T N1.5, whose medium size has π0's widths."""
    robot = features(range(cameras), height=SIDES[size])
    if size == "published":
        return GR00TN1_5Config(**robot, eagle_config={"image_token_index": IMAGE_TOKEN})
    return GR00TN1_5Config(
        **robot,
        backbone_cfg={"select_layer": TEXTS[size]["num_hidden_layers"]},
        eagle_config={
            "image_token_index": IMAGE_TOKEN,
            "vision_config": VISIONS[size] | {"intermediate_size": 1536},
            "text_config": TEXTS[size],
        },
        action_head_cfg=gr00t_head(**HEADS[size]),
    )


def gr00t_n1_config(size: str, cameras: int) -> GR00TN1Config:
    """Return the config of GR00T N1, of the widths of N1.5 below the published size."""
    robot = features(range(cameras), height=SIDES[size])
    if size == "published":
        return GR00TN1Config(**robot, backbone_cfg={"img_context_token_id": IMAGE_TOKEN})
    head = gr00t_head(**HEADS[size])
    of_n1_5 = ("backbone_embedding_dim", "num_target_vision_tokens", "vl_self_attention_cfg")
    transformer = {name: x for name, x in head["diffusion_model_cfg"].items() if name != "cross_attention_dim"}
    head = {name: x for name, x in head.items() if name not in of_n1_5} | {"diffusion_model_cfg": transformer}
    text, width = TEXTS[size], HEADS[size]["width"]
    return GR00TN1Config(
        **robot,
        backbone_cfg={
            "select_layer": text["num_hidden_layers"],
            "projector_dim": text["hidden_size"],
            "project_to_dim": width,
            "img_context_token_id": IMAGE_TOKEN,
        },
        eagle_config={"vision_config": VISIONS[size] | {"intermediate_size": 1536}, "llm_config": text},
        action_head_cfg=head,
    )


def act_config(size: str) -> ACTConfig:
    """Return ACT's config, published for ALOHA: one camera of 480×640, 14 joints; or of small layers."""
    if size == "published":
        return ACTConfig(**features(["top"], 14, 480, 640), pretrained_backbone_weights=None)
    small = {"dim_model": 32, "n_heads": 2, "dim_feedforward": 64, "chunk_size": 10}
    return ACTConfig(
        **features(["top"], 14, 64), **small, vision_config=SMALL_RESNET, pretrained_backbone_weights=None
    )


def diffusion_config(size: str, scheduler: str, steps: int) -> DiffusionConfig:
    """Return Diffusion Policy's config, published for PushT: one camera of 96×96, width 2; or of small layers."""
    sampling = {"noise_scheduler_type": scheduler, "num_inference_steps": steps}
    published = {"horizon": 16, "n_action_steps": 8, "crop_shape": (84, 84), "use_group_norm": True}
    small = {} if size == "published" else {"down_dims": (32, 64), "vision_config": SMALL_RESNET}
    return DiffusionConfig(**features(["top"], 2, 96), **sampling, **published, **small)
