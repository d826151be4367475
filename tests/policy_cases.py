"""Tiny policies for every generic test. A policy joins the whole suite by one entry in `CASES`.

A policy of another package is tested alone: the variable POLICY_CASES names a file with its own `CASES`, name → the
fields of a `Case`.
"""

import os
import runpy
from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One tiny policy.

    `config` builds its config anew. `untrained` names the parameters that no gradient can reach by design.
    `complete` marks the one case per policy that has every kind of tensor: its checkpoint is broken tensor by tensor.
    `graph` marks the cases that are compiled and exported: those of every policy hold all operations and forms of
    input of its others, which only leave some out.
    """

    config: Callable[[], Any]
    untrained: frozenset[str] = frozenset()
    complete: bool = False
    graph: bool = False


RESNET = {"layer_type": "basic", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
# Not in alphabetical order: a sorted JSON file would swap them.
TWO_CAMERAS = {"wrist": (3, 32, 32), "above": (3, 32, 32)}


def features_of(cameras: dict | None, state: int | None, environment: int | None) -> dict[str, dict]:
    """Return the features of a config: cameras `{name: (c, h, w)}`, states of these widths, actions of width 2."""
    inputs = {f"observation.images.{name}": ("VISUAL", shape) for name, shape in (cameras or {}).items()}
    if state:
        inputs["observation.state"] = ("STATE", (state,))
    if environment:
        inputs["observation.environment_state"] = ("ENV", (environment,))
    return {
        "input_features": {name: {"type": kind, "shape": shape} for name, (kind, shape) in inputs.items()},
        "output_features": {"action": {"type": "ACTION", "shape": (2,)}},
    }


def tiny_act(cameras: dict | None = None, state: int | None = 3, environment: int | None = None, **fields):
    """Return an `ACTConfig` with cameras `{name: (c, h, w)}`, states of these widths and actions of width 2."""
    from manipulators import ACTConfig

    sizes = {
        "chunk_size": 5,
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 32,
        "n_encoder_layers": 2,
        "n_vae_encoder_layers": 1,
        "latent_dim": 4,
        "vision_config": RESNET if cameras else None,
        "pretrained_backbone_weights": None,
    }
    return ACTConfig(**features_of(cameras, state, environment), **(sizes | fields))


def tiny_diffusion(cameras: dict | None = None, state: int | None = 3, environment: int | None = None, **fields):
    """Return a `DiffusionConfig`, arguments as in `tiny_act`.

    Padded steps are left out of the loss, which the paper does not do and every policy here can.
    """
    from manipulators import DiffusionConfig

    sizes = {
        "horizon": 8,
        "n_action_steps": 4,
        "down_dims": (16, 32),
        "n_groups": 4,
        "kernel_size": 3,
        "diffusion_step_embed_dim": 8,
        "num_train_timesteps": 5,
        # The paper's schedule leaves next to no signal at its end, of which a prediction would magnify rounding.
        "beta_schedule": "linear",
        "beta_start": 0.1,
        "beta_end": 0.5,
        "spatial_softmax_num_keypoints": 4,
        "crop_shape": (28, 24) if cameras else None,
        "vision_config": RESNET if cameras else None,
        "do_mask_loss_for_padding": True,
    }
    return DiffusionConfig(**features_of(cameras, state, environment), **(sizes | fields))


CLIP_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 12,
    "eos_token_id": 3,  # that of `word_tokenizer`
}
LANGUAGE = {
    "use_language_conditioning": True,
    "language_config": CLIP_TEXT,
    "language_projection_dim": 6,
    "language_dropout_prob": 0.5,
}


GEMMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
}
SIGLIP = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_pi0(cameras: dict | None = None, state: int = 3, config_class: str = "PI0PolicyConfig", **fields):
    """Return a `PI0PolicyConfig`, arguments as in `tiny_act`."""
    import manipulators

    sizes = {
        "chunk_size": 5,
        "max_state_dim": 6,
        "max_action_dim": 4,
        "image_resolution": (28, 28),
        "max_instruction_tokens": 6,
        "num_inference_steps": 3,
        "paligemma_config": {"projection_dim": 32, "text_config": GEMMA, "vision_config": SIGLIP},
        "gemma_expert_config": GEMMA | {"hidden_size": 16, "intermediate_size": 24},
    }
    return getattr(manipulators, config_class)(**features_of(cameras or TWO_CAMERAS, state, None), **(sizes | fields))


def tiny_pi05(cameras: dict | None = None, state: int = 3, **fields):
    """Return a `PI05PolicyConfig`, arguments as in `tiny_act`."""
    return tiny_pi0(cameras, state, "PI05PolicyConfig", **({"max_instruction_tokens": 24} | fields))


DIT = {
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "num_layers": 2,
    "output_dim": 16,
    "dropout": 0.2,
    "interleave_self_attention": True,
    "positional_embeddings": None,
}
FLOW_HEAD = {
    "action_dim": 4,
    "max_action_dim": 4,
    "action_horizon": 5,
    "max_state_dim": 6,
    "max_num_embodiments": 3,
    "max_seq_len": 8,
    "input_embedding_dim": 24,
    "hidden_size": 16,
    "num_inference_timesteps": 2,
}


EMBODIMENTS = {"new_embodiment": 1, "gr1": 2}


def tiny_gr00t_n1_5(cameras: dict | None = None, state: int = 3, **fields):
    """Return a `GR00TN1_5Config`, arguments as in `tiny_act`."""
    from manipulators import GR00TN1_5Config

    features_transformer = DIT | {"num_attention_heads": 4, "num_layers": 1}
    parts = {
        "backbone_cfg": {"select_layer": 1},
        "eagle_config": {"vision_config": SIGLIP, "text_config": GEMMA, "image_token_index": 4},
        "action_head_cfg": FLOW_HEAD
        | {
            "backbone_embedding_dim": 32,
            "diffusion_model_cfg": DIT,
            "vl_self_attention_cfg": features_transformer,
            "num_target_vision_tokens": 2,
        },
        "embodiment_ids": EMBODIMENTS,
    }
    return GR00TN1_5Config(**features_of(cameras or TWO_CAMERAS, state, None), **(parts | fields))


def tiny_gr00t_n1(cameras: dict | None = None, state: int = 3, **fields):
    """Return a `GR00TN1Config`, arguments as in `tiny_act`."""
    from manipulators import GR00TN1Config

    parts = {
        "backbone_cfg": {"select_layer": 1, "projector_dim": 32, "project_to_dim": 24, "img_context_token_id": 4},
        "eagle_config": {"vision_config": SIGLIP, "llm_config": GEMMA | {"head_dim": 8}},
        "action_head_cfg": FLOW_HEAD | {"diffusion_model_cfg": DIT},
        "embodiment_ids": EMBODIMENTS,
    }
    return GR00TN1Config(**features_of(cameras or TWO_CAMERAS, state, None), **(parts | fields))


# Tiny backbones and action heads for `ComposedConfig`, by type.
BACKBONES = {
    "act": {
        "dim_model": 16,
        "n_heads": 2,
        "dim_feedforward": 32,
        "n_encoder_layers": 1,
        "latent_dim": 4,
        "vision_config": RESNET,
        "pretrained_backbone_weights": None,
    },
    "diffusion": {"vision_config": RESNET, "crop_shape": (28, 24), "spatial_softmax_num_keypoints": 4},
    "eagle": {
        "select_layer": 1,
        "projector_dim": 32,
        "project_to_dim": 24,
        "img_context_token_id": 4,
        "eagle_config": {"vision_config": SIGLIP, "llm_config": GEMMA | {"head_dim": 8}},
    },
    "eagle_1_5": {
        "select_layer": 1,
        "eagle_config": {"vision_config": SIGLIP, "text_config": GEMMA, "image_token_index": 4},
    },
}
_FLOW_FIELDS = ("max_seq_len", "input_embedding_dim", "hidden_size", "num_inference_timesteps")
_FLOW = {name: FLOW_HEAD[name] for name in _FLOW_FIELDS} | {"diffusion_model_cfg": DIT}
HEADS = {
    "act": {"n_heads": 1, "dim_feedforward": 32},
    "diffusion": {
        "down_dims": (16, 32),
        "n_groups": 4,
        "kernel_size": 3,
        "diffusion_step_embed_dim": 8,
        "num_train_timesteps": 5,
        "beta_schedule": "linear",
        "beta_start": 0.1,
        "beta_end": 0.5,
    },
    "flow_matching": _FLOW,
    "flow_matching_1_5": _FLOW | {"use_vlln": False, "num_target_vision_tokens": 2},
}


def tiny_composed(
    backbone: str,
    head: str,
    cameras: dict | None = None,
    state: int | None = 3,
    environment: int | None = None,
    backbone_fields: dict | None = None,
    head_fields: dict | None = None,
    **fields,
):
    """Return a `ComposedConfig` of a backbone and an action head by their types, otherwise as `tiny_act`."""
    from manipulators import ComposedConfig

    parts = {
        "backbone": {"type": backbone} | BACKBONES[backbone] | (backbone_fields or {}),
        "action_head": {"type": head} | HEADS[head] | (head_fields or {}),
    }
    features = features_of(TWO_CAMERAS if cameras is None else cameras, state, environment)
    return ComposedConfig(**features, **({"chunk_size": 8} | parts | fields))


def statistics_of(config) -> dict:
    """Return statistics of every kind for each feature of a config, other ones per dimension."""
    starts = {"mean": 0.1, "std": 0.5, "min": -2.0, "max": 1.0, "q01": -1.5, "q99": 0.75, "q10": -1.0, "q90": 0.5}
    widths = {name: f.shape[0] for name, f in (config.input_features | config.output_features).items()}
    return {
        name: {which: [start + 0.25 * i for i in range(width)] for which, start in starts.items()}
        for name, width in widths.items()
    }


def processor_of(config):
    """Return the processor of a config's policy."""
    from manipulators.processing.registry import processor_class
    from manipulators.processing.word_tokenizer import word_tokenizer

    words = {"tokenizer": word_tokenizer(["push the red button"])} if config.reads_instruction else {}
    return processor_class(config).from_config(config, statistics_of(config), **words)


# Under pre-norm, ACT's decoder starts with a norm of zeros, whose weight multiplies them: zero again. Without a VAE
# the latent is always zero. (Attention among the empty queries is trained through its dropout and its biases.)
ACT_EMPTY_QUERIES = frozenset({"action_head.decoder.layers.0.norm1.weight"})
ACT_EMPTY_LATENT = frozenset({"backbone.encoder_latent_input_proj.weight"})
# A softmax over pixels does not change when every pixel is raised by the same bias.
KEYPOINT_BIAS = frozenset({"diffusion.rgb_encoder.pool.nets.bias"})
KEYPOINT_BIASES = frozenset({f"diffusion.rgb_encoder.{i}.pool.nets.bias" for i in (0, 1)})
# A bias of the keys adds the same to every score of a query, and the softmax takes it off again.
PI0_KEY_BIAS = frozenset({"model.paligemma_with_expert.vision_tower.encoder.layers.0.self_attn.k_proj.bias"})
# As above, and in the blocks of the action head.
GR00T_N1_KEY_BIAS = frozenset(
    {
        "backbone.model.vision_model.encoder.layers.0.self_attn.k_proj.bias",
        *(f"action_head.model.transformer_blocks.{i}.attn1.to_k.bias" for i in range(2)),
    }
)
GR00T_N1_5_KEY_BIAS = frozenset(
    {
        *(name.replace("backbone.model.", "backbone.eagle_model.") for name in GR00T_N1_KEY_BIAS),
        "action_head.vl_self_attention.transformer_blocks.0.attn1.to_k.bias",
    }
)

CASES = {
    "act_states": Case(lambda: tiny_act(environment=4)),
    "act_two_cameras": Case(lambda: tiny_act(TWO_CAMERAS, environment=4), complete=True, graph=True),
    "act_camera_sizes": Case(lambda: tiny_act({"wrist": (3, 32, 32), "above": (3, 32, 64)}), graph=True),
    "act_camera_only": Case(lambda: tiny_act({"above": (3, 32, 32)}, state=None)),
    "act_pre_norm": Case(lambda: tiny_act(pre_norm=True, n_decoder_layers=2), ACT_EMPTY_QUERIES),
    "act_optional_camera": Case(
        lambda: tiny_act(TWO_CAMERAS, optional_cameras=("observation.images.above",), use_vae=False),
        ACT_EMPTY_LATENT,
        graph=True,
    ),
    "act_no_vae": Case(lambda: tiny_act(TWO_CAMERAS, use_vae=False), ACT_EMPTY_LATENT),
    "diffusion_states": Case(lambda: tiny_diffusion(environment=4)),
    "diffusion_two_cameras": Case(
        lambda: tiny_diffusion(TWO_CAMERAS, environment=4, **LANGUAGE), KEYPOINT_BIAS, complete=True, graph=True
    ),
    "diffusion_camera_sizes": Case(
        lambda: tiny_diffusion(
            {"wrist": (3, 32, 32), "above": (3, 32, 64)},
            use_separate_rgb_encoder_per_camera=True,
            use_group_norm=False,
            crop_shape=None,
            prediction_type="v_prediction",
            noise_scheduler_type="DDIM",
            num_inference_steps=3,
        ),
        KEYPOINT_BIASES,
        graph=True,
    ),
    "diffusion_one_step": Case(
        lambda: tiny_diffusion(
            TWO_CAMERAS,
            n_obs_steps=1,
            optional_cameras=("observation.images.above",),
            resize_shape=(40, 48),
            prediction_type="sample",
            use_film_scale_modulation=False,
        ),
        KEYPOINT_BIAS,
        graph=True,
    ),
    "diffusion_language": Case(lambda: tiny_diffusion(**LANGUAGE, noise_scheduler_type="DDIM", clip_sample=False)),
    "pi0": Case(
        lambda: tiny_pi0(optional_cameras=("observation.images.above",)), PI0_KEY_BIAS, complete=True, graph=True
    ),
    "pi0_camera_sizes": Case(lambda: tiny_pi0({"wrist": (3, 32, 32), "above": (3, 24, 48)}), PI0_KEY_BIAS, graph=True),
    "pi0_expert_only": Case(lambda: tiny_pi0({"above": (3, 28, 28)}, train_expert_only=True)),
    "pi05": Case(
        lambda: tiny_pi05(optional_cameras=("observation.images.above",)), PI0_KEY_BIAS, complete=True, graph=True
    ),
    "gr00t_n1_5": Case(
        lambda: tiny_gr00t_n1_5(
            {"wrist": (3, 32, 32), "above": (3, 24, 48)},
            optional_cameras=("observation.images.above",),
            tune_llm=True,
            project_to_dim=32,
            mask_padding=True,
        ),
        GR00T_N1_5_KEY_BIAS,
        complete=True,
        graph=True,
    ),
    "gr00t_n1_5_head_only": Case(
        lambda: tiny_gr00t_n1_5({"above": (3, 28, 28)}, tune_visual=False, use_vlln=False, num_target_vision_tokens=0),
        frozenset(name for name in GR00T_N1_KEY_BIAS if name.startswith("action_head.")),
        graph=True,
    ),
    "gr00t_n1": Case(
        lambda: tiny_gr00t_n1(optional_cameras=("observation.images.above",), tune_llm=True, reproject_vision=True),
        GR00T_N1_KEY_BIAS,
        complete=True,
        graph=True,
    ),
    "composed_act_flow_matching": Case(
        lambda: tiny_composed("act", "flow_matching", environment=4),
        ACT_EMPTY_LATENT | {name for name in GR00T_N1_KEY_BIAS if name.startswith("action_head.")},
        complete=True,
        graph=True,
    ),
    "composed_eagle_diffusion": Case(
        lambda: tiny_composed("eagle", "diffusion"),
        frozenset(name for name in GR00T_N1_KEY_BIAS if name.startswith("backbone.")),
    ),
}
if "POLICY_CASES" in os.environ:
    CASES = {name: Case(**fields) for name, fields in runpy.run_path(os.environ["POLICY_CASES"])["CASES"].items()}
