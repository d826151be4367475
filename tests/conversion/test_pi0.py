"""π0's published names, layout by layout, for every weight of the real-size model."""

import json

import pytest
import torch

from manipulators import PI0Policy, PI0PolicyConfig
from manipulators.conversion.pi0 import pi0_fields, rename_pi0_weights
from manipulators.errors import InvalidConfigError

BACKBONE = "model.paligemma_with_expert."
EMBEDDING = f"{BACKBONE}embed_tokens.weight"
LAYOUTS = ("openpi", "lerobot_pi0_base", "lerobot_save", "lerobot_pi0_old2025", "transformers_native_5_23")
CONFIG = {
    "type": "pi0",
    "input_features": {
        "observation.state": {"type": "STATE", "shape": [7]},
        "observation.images.base": {"type": "VISUAL", "shape": [3, 480, 640]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
}


@pytest.fixture(scope="module")
def published(shared):
    """Return a function: layout → the name and shape of every weight of the real-size model in it."""
    rows = json.loads((shared / "specs" / "pi0_keys.json").read_text())["keys"].values()
    # "(dead)" is the table's remark on a weight that nothing reads.
    return lambda layout: {row[layout].removesuffix(" (dead)"): row["shape"] for row in rows if row[layout]}


@pytest.fixture(scope="module")
def expected():
    """Names and shapes of our real-size model, which is built without memory for its weights."""
    with torch.device("meta"):
        policy = PI0Policy(PI0PolicyConfig.from_dict(pi0_fields(CONFIG, {})))
    return {name: list(weight.shape) for name, weight in policy.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_of_every_layout(published, expected, layout):
    assert rename_pi0_weights(published(layout)) == expected


def test_a_name_that_nobody_publishes_stays():
    assert rename_pi0_weights({"paligemma_with_expert.somebody.weight": 3}) == {
        "paligemma_with_expert.somebody.weight": 3
    }


def test_our_own_names_stay(expected):
    assert rename_pi0_weights(expected) == expected


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        (
            "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.7.mlp.fc1.bias",
            "vision_tower.encoder.layers.7.mlp.fc1.bias",
        ),
        (
            "model.paligemma_with_expert.paligemma.language_model.model.layers.17.self_attn.q_proj.weight",
            "layers.17.language_model.self_attn.q_proj.weight",
        ),
        # What transformers' own π0 writes is neither its own names nor LeRobot's.
        (
            "paligemma_with_expert.paligemma.model.language_model.model.layers.3.input_layernorm.weight",
            "layers.3.language_model.input_layernorm.weight",
        ),
        (
            "_orig_mod.paligemma_with_expert.gemma_expert.model.layers.3.mlp.up_proj.weight",
            "layers.3.gemma_expert.mlp.up_proj.weight",
        ),
        ("paligemma_with_expert.gemma_expert.model.norm.weight", "expert_norm.weight"),
        ("paligemma.model.language_model.norm.weight", "language_norm.weight"),  # a file of the backbone alone
    ],
)
def test_names(published, ours):
    assert rename_pi0_weights({published: 3}) == {BACKBONE + ours: 3}


def test_head_is_the_embedding_where_it_stands_alone():
    head = {"paligemma_with_expert.paligemma.lm_head.weight": "head"}
    embedding = {"paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight": "embedding"}
    assert rename_pi0_weights(head) == {EMBEDDING: "head"}
    for both in (head | embedding, embedding | head):
        assert rename_pi0_weights(both) == {EMBEDDING: "embedding"}


@pytest.mark.parametrize(
    "name", ["model.dit.embed_tokens.weight", "paligemma_with_expert.gemma_expert.lm_head.weight"]
)
def test_words_of_the_expert_are_left_out(name):
    assert rename_pi0_weights({name: 3}) == {}


# --- config -----------------------------------------------------------------------------------------------


def test_fields():
    config = PI0PolicyConfig.from_dict(
        pi0_fields(
            CONFIG
            | {
                "paligemma_variant": "gemma_2b",
                "action_expert_variant": "gemma_300m",
                "optimizer_lr": 2.5e-5,
                "dtype": "bfloat16",
                "chunk_size": 30,
                "n_action_steps": 20,
                "image_resolution": [224, 224],
                "empty_cameras": 1,
                "tokenizer_max_length": 48,
                "input_features": CONFIG["input_features"]
                | {"observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]}},
            },
            {},
        )
    )
    assert (config.chunk_size, config.n_action_steps) == (30, 20)
    assert config.optional_cameras == ("observation.images.empty_camera_0",)
    assert list(config.image_features) == ["observation.images.base", "observation.images.empty_camera_0"]
    backbone = config.backbone_config()
    assert backbone.paligemma_config.text_config.hidden_size == 2048
    assert backbone.gemma_expert_config.hidden_size == 1024


def test_actions_relative_to_the_state_are_a_matter_of_the_processors():
    """LeRobot says them in its config too, where they were refused."""
    relative = {"use_relative_actions": True, "relative_exclude_joints": ["gripper"], "action_feature_names": ["a"]}
    assert pi0_fields(CONFIG | relative, {}) == pi0_fields(CONFIG, {})


def test_variants_of_other_sizes():
    fields = pi0_fields(CONFIG | {"paligemma_variant": "gemma_300m", "action_expert_variant": "gemma_2b"}, {})
    backbone = PI0PolicyConfig.from_dict(fields).backbone_config()
    text, expert = backbone.paligemma_config.text_config, backbone.gemma_expert_config
    assert (text.hidden_size, text.intermediate_size, expert.hidden_size) == (1024, 4096, 2048)
    assert backbone.paligemma_config.projection_dim == 1024
    with pytest.raises(InvalidConfigError, match=r"paligemma_variant='gemma_2'.*gemma_2b"):
        pi0_fields(CONFIG | {"paligemma_variant": "gemma_2"}, {})


def test_fields_of_the_first_generation():
    """LeRobot 0.1 to 0.3: other names, pictures padded above and to the left."""
    old = {
        "resize_imgs_with_padding": [224, 224],
        "num_steps": 8,
        "tokenizer_max_length": 40,
        "proj_width": 1024,
        "attention_implementation": "fa2",
        "freeze_vision_encoder": True,
        "adapt_to_pi_aloha": False,
    }
    config = PI0PolicyConfig.from_dict(pi0_fields(CONFIG | old, {}))
    assert (config.num_inference_steps, config.max_instruction_tokens) == (8, 40)
    assert (config.image_resolution, config.image_padding) == ((224, 224), "top_left")
    assert config.freeze_vision_encoder and config.attention_implementation is None
    assert PI0PolicyConfig.from_dict(pi0_fields(CONFIG, {})).image_padding == "centered"
    with pytest.raises(InvalidConfigError, match="adapt_to_pi_aloha=True"):
        pi0_fields(CONFIG | {"adapt_to_pi_aloha": True}, {})
