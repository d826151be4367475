"""The networks that several benchmarks measure: π0 and GR00T N1.5, at the published size and at a medium one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PI0Config, PI0ForConditionalGeneration

from manipulators import GR00TN1_5Config, PI0Policy, PI0PolicyConfig
from manipulators.conversion.pi0 import rename_pi0_weights

SIZES = ("medium", "published")
WIDTH = 32  # of state and action
SIDE, TOKENS = 224, 256  # of a picture: its height and width, and its tokens
VOCABULARY = 2048
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
    "patch_size": 14,
    "vision_use_head": False,
}

HEADS = {
    "medium": {"width": 512, "blocks": 8, "features": 512, "hidden": 512},
    "published": {"width": 1536, "blocks": 16, "features": 2048, "hidden": 1024},
}


def features(cameras: Iterable[object], width: int = WIDTH) -> dict[str, dict[str, Any]]:
    """Return input and output features of a robot with these cameras, and a state and actions of the same width."""
    pictures = {f"observation.images.{camera}": {"type": "VISUAL", "shape": (3, SIDE, SIDE)} for camera in cameras}
    return {
        "input_features": pictures | {"observation.state": {"type": "STATE", "shape": (width,)}},
        "output_features": {"action": {"type": "ACTION", "shape": (width,)}},
    }


def pi0_config(size: str, cameras: int) -> PI0PolicyConfig:
    """Return π0's config."""
    parts = {
        "paligemma_config": {"projection_dim": TEXT["hidden_size"], "text_config": TEXT, "vision_config": VISION},
        "gemma_expert_config": EXPERT,
    }
    return PI0PolicyConfig(**features(range(cameras)), **(parts if size == "medium" else {}))


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
    return network


def native_pi0_inputs(inputs: dict[str, torch.Tensor], image_token: int) -> dict[str, torch.Tensor]:
    """Return inputs as transformers' network takes them: a token of the prompt per token of a picture."""
    b, cameras = inputs["pixel_values"].shape[:2]
    pictures = torch.full((b, cameras * TOKENS), image_token, device=inputs["state"].device)
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
    head = HEADS[size]
    text = LAYERS | {"hidden_size": head["features"], "intermediate_size": 2048, "vocab_size": VOCABULARY}
    parts = {
        "backbone_cfg": {"select_layer": LAYERS["num_hidden_layers"]},
        "eagle_config": {
            "image_token_index": VOCABULARY - 1,
            "vision_config": VISION | {"intermediate_size": 1536},
            "text_config": text,
        },
        "action_head_cfg": gr00t_head(**head),
    }
    return GR00TN1_5Config(**features(range(cameras)), **(parts if size == "medium" else {}))
