"""π0's config: sizes, what must agree, what is refused."""

import pytest
from transformers import GemmaConfig, PaliGemmaConfig

from manipulators import PaliGemmaWithExpertConfig, PI0PolicyConfig
from manipulators.errors import InvalidConfigError, UnknownConfigFieldError

STATE = {"observation.state": {"type": "STATE", "shape": (7,)}}
CAMERA = {"observation.images.base": {"type": "VISUAL", "shape": (3, 480, 640)}}
ACTION = {"action": {"type": "ACTION", "shape": (7,)}}


def config(**fields):
    return PI0PolicyConfig(**({"input_features": CAMERA | STATE, "output_features": ACTION} | fields))


def test_published_sizes():
    backbone = config().backbone_config()
    vision, text = backbone.paligemma_config.vision_config, backbone.paligemma_config.text_config
    expert = backbone.gemma_expert_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1152, 4304, 27)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 224, 14)
    assert vision.vision_use_head is False
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (2048, 16384, 18)
    assert (expert.hidden_size, expert.intermediate_size, expert.num_hidden_layers) == (1024, 4096, 18)
    for gemma in (text, expert):
        assert (gemma.num_attention_heads, gemma.num_key_value_heads, gemma.head_dim) == (8, 1, 256)
        assert (gemma.hidden_act, gemma.rms_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
        assert gemma.rope_parameters["rope_theta"] == 10000.0
    assert text.vocab_size == 257152
    assert backbone.paligemma_config.projection_dim == 2048
    assert backbone.attention_implementation == "sdpa"


def test_defaults():
    assert (config().chunk_size, config().n_action_steps, config().action_horizon) == (50, 50, 50)
    assert config(chunk_size=20).n_action_steps == 20
    assert (config().state_dim, config().model_state_dim) == (7, 32)
    assert (config().action_dim, config().model_action_dim) == (7, 32)
    assert config().normalization_mapping["VISUAL"].value == "IDENTITY"
    assert config().normalization_mapping["STATE"].value == "MEAN_STD"
    assert config(normalization_mapping={"STATE": "QUANTILES"}).normalization_mapping["VISUAL"].value == "IDENTITY"


@pytest.mark.parametrize("kind", [dict, PaliGemmaConfig])
def test_parts_as_mappings_or_configs(kind, tmp_path):
    gemma = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_attention_heads": 4}
    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    paligemma = {
        "projection_dim": 32,
        "text_config": gemma | {"model_type": "gemma", "num_key_value_heads": 1},
        "vision_config": vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
    }
    given = config(
        paligemma_config=kind(**paligemma),
        gemma_expert_config=gemma if kind is dict else GemmaConfig(**gemma, num_key_value_heads=1),
        image_resolution=(28, 28),
    )
    given.save_pretrained(tmp_path)
    for made in (given, PI0PolicyConfig.from_pretrained(tmp_path)):
        backbone = made.backbone_config()
        assert backbone.paligemma_config.text_config.hidden_size == 32
        assert backbone.paligemma_config.vision_config.num_hidden_layers == 1
        assert backbone.paligemma_config.vision_config.patch_size == (14 if kind is dict else 16)  # SigLIP's own
        assert backbone.gemma_expert_config.num_attention_heads == 4


def test_pictures_of_another_resolution():
    assert config(image_resolution=(448, 448)).backbone_config().paligemma_config.vision_config.image_size == 448
    with pytest.raises(InvalidConfigError, match=r"image_resolution=\(28, 28\).*image_size=56"):
        config(image_resolution=(28, 28), paligemma_config={"vision_config": {"image_size": 56}})
    with pytest.raises(InvalidConfigError, match=r"image_resolution=\(224, 280\)"):
        config(image_resolution=(224, 280))


def test_empty_cameras():
    names = ["observation.images.base", "observation.images.empty_camera_0", "observation.images.empty_camera_1"]
    later = PI0PolicyConfig(empty_cameras=2)
    later.set_input_output_features(CAMERA | STATE, ACTION)
    for made in (config(empty_cameras=2), later):
        assert list(made.image_features) == names
        assert made.optional_cameras == tuple(names[1:])
        assert made.image_features[names[2]].shape == (3, 224, 224)
    blind = config(input_features=STATE, empty_cameras=1)
    assert list(blind.image_features) == [names[1]] and blind.optional_cameras == (names[1],)
    again = PI0PolicyConfig.from_dict(config(empty_cameras=2).to_dict())
    assert list(again.image_features) == names and again.optional_cameras == tuple(names[1:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_obs_steps": 2}, "n_obs_steps=2: π0 looks at 1 observation only"),
        ({"n_action_steps": 51}, "n_action_steps=51 must lie between 1 and chunk_size=50"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"max_action_dim": 6}, "max_action_dim=6, but the features have width 7"),
        ({"max_state_dim": 6}, "max_state_dim=6, but the features have width 7"),
        ({"input_features": CAMERA}, "needs the robot's state"),
        ({"input_features": STATE}, "needs a camera"),
        ({"image_padding": "left"}, "image_padding"),
        (
            {"input_features": CAMERA | STATE | {"observation.environment_state": {"type": "ENV", "shape": (2,)}}},
            "does not read 'observation.environment_state'",
        ),
        (
            {"input_features": STATE | {"observation.images.depth": {"type": "VISUAL", "shape": (1, 8, 8)}}},
            "has 1 channels; π0 sees RGB, 3",
        ),
        ({"min_period": 4.0}, "min_period=4.0 must lie below max_period=4.0"),
        ({"time_sampling_beta_beta": 0.0}, "time_sampling_beta_beta=0.0 must be positive"),
        ({"loss_over": "some"}, "loss_over"),
        ({"attention_implementation": "fa2"}, "flash attention takes no mask.*'sdpa'"),
        ({"attention_implementation": "flesh"}, "'flesh' is not known. Available: eager, sdpa, flex"),
        ({"gemma_expert_config": {"num_hidden_layers": 6}}, "num_hidden_layers is 18 in paligemma_config.*but 6"),
        ({"gemma_expert_config": {"num_attention_heads": 4}}, "num_attention_heads is 8"),
        ({"gemma_expert_config": {"head_dim": 128}}, "head_dim is 256"),
        ({"paligemma_config": {"projection_dim": 1024}}, "projection_dim=1024 and text_config.hidden_size=2048"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        config(**fields)


def test_backbone_config_refuses_unknown_fields():
    with pytest.raises(UnknownConfigFieldError, match="Did you mean 'train_expert_only'"):
        PaliGemmaWithExpertConfig(train_expert=True)
