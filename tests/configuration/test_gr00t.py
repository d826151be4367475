"""The configurations of GR00T N1.5 and N1: nested fields as published, and the short names of what is in them."""

import json

import pytest

from manipulators.configuration.gr00t_n1 import GR00TN1Config
from manipulators.configuration.gr00t_n1_5 import GR00TN1_5Config
from manipulators.errors import InvalidConfigError, UnknownConfigFieldError

BOTH = pytest.mark.parametrize("config_class", [GR00TN1_5Config, GR00TN1Config])
FEATURES = {
    "input_features": {
        "observation.images.wrist": {"type": "VISUAL", "shape": (3, 48, 64)},
        "observation.state": {"type": "STATE", "shape": (5,)},
    },
    "output_features": {"action": {"type": "ACTION", "shape": (4,)}},
}


@BOTH
def test_the_published_values_are_the_defaults(config_class):
    config = config_class()
    assert (config.action_dim, config.action_horizon, config.n_action_steps) == (32, 16, 16)
    assert (config.max_state_dim, config.select_layer, config.hidden_size) == (64, 12, 2048)
    assert (config.tune_llm, config.tune_visual, config.tune_projector, config.tune_diffusion_model) == (
        False,
        True,
        True,
        True,
    )
    assert config.embodiment_id == 31
    assert config.image_size == 224
    assert config.tokens_per_image == (256 if config_class is GR00TN1_5Config else 64)
    assert config.features_width == (2048 if config_class is GR00TN1_5Config else 1536)
    assert config.mask_padding is False


@BOTH
def test_json_is_read_back(config_class):
    config = config_class(**FEATURES, select_layer=3, embodiment_tag="gr1", action_horizon=4)
    values = json.loads(config.to_json_string())
    assert (values["action_dim"], values["action_horizon"], values["hidden_size"]) == (32, 4, 2048)
    again = config_class.from_dict(values)
    assert again.to_dict() == config.to_dict()
    assert (again.select_layer, again.embodiment_id, again.n_action_steps) == (3, 24, 4)


@BOTH
def test_short_names_reach_the_nested_fields_at_every_door(config_class):
    told = {"select_layer": 6, "tune_llm": True, "num_inference_timesteps": 2, "max_state_dim": 8, "action_horizon": 5}
    assigned = config_class()
    for name, value in told.items():
        setattr(assigned, name, value)
    for config in (config_class(**told), config_class.from_dict(config_class().to_dict(), **told), assigned):
        assert (config.backbone_cfg["select_layer"], config.backbone_cfg["tune_llm"]) == (6, True)
        head = config.action_head_cfg
        assert (head["num_inference_timesteps"], head["max_state_dim"], head["action_horizon"]) == (2, 8, 5)
        assert config.n_action_steps == 5
        assert config.select_layer == 6


@BOTH
def test_the_padded_width_is_one(config_class):
    config = config_class(**FEATURES, action_dim=7)
    assert (config.action_head_cfg["action_dim"], config.action_head_cfg["max_action_dim"]) == (7, 7)
    assert (config.action_dim, config.model_action_dim, config.robot_action_dim) == (7, 7, 4)
    with pytest.raises(InvalidConfigError, match="max_action_dim=9"):
        config_class(action_head_cfg={"action_dim": 8, "max_action_dim": 9})


@BOTH
@pytest.mark.parametrize("name", ["action_dim", "action_horizon"])
def test_top_and_head_must_agree(config_class, name):
    with pytest.raises(InvalidConfigError, match=rf"{name}=8 disagrees with action_head_cfg\['{name}'\]=16"):
        config_class(action_head_cfg={name: 16}, **{name: 8})
    assert getattr(config_class(action_head_cfg={name: 8}, max_action_dim=8, **{name: 8}), name) == 8


@BOTH
def test_hidden_size_is_the_language_models(config_class):
    with pytest.raises(InvalidConfigError, match="hidden_size=1024, but the language model"):
        config_class(hidden_size=1024)


@BOTH
def test_features_that_do_not_fit_are_refused(config_class):
    with pytest.raises(InvalidConfigError, match=r"action_dim=3, but the features need 4"):
        config_class(**FEATURES, action_dim=3)
    with pytest.raises(InvalidConfigError, match=r"max_state_dim=4, but the features need 5"):
        config_class(**FEATURES, max_state_dim=4)
    angles = {"arm": {"width": 3, "mode": "sin_cos"}, "hand": {"width": 2, "mode": "min_max"}}
    with pytest.raises(InvalidConfigError, match=r"max_state_dim=7, but the features need 8"):
        config_class(**FEATURES, state_parts=angles, max_state_dim=7)
    assert config_class(**FEATURES, state_parts=angles, max_state_dim=8).model_state_dim == 8
    with pytest.raises(InvalidConfigError, match="environment_state"):
        config_class(
            input_features=FEATURES["input_features"]
            | {"observation.environment_state": {"type": "ENV", "shape": (2,)}}
        )
    with pytest.raises(InvalidConfigError, match=r"needs a camera.*empty_cameras=1"):
        config_class(input_features={"observation.state": {"type": "STATE", "shape": (5,)}})
    with pytest.raises(InvalidConfigError, match="needs the robot's state"):
        config_class(input_features={"observation.images.wrist": {"type": "VISUAL", "shape": (3, 48, 64)}})


@BOTH
def test_actions_that_could_not_depend_on_the_state_are_refused(config_class):
    with pytest.raises(InvalidConfigError, match="interleave_self_attention=False"):
        config_class(diffusion_model_cfg=config_class().diffusion_model_cfg | {"interleave_self_attention": False})


@BOTH
def test_embodiments_have_slots(config_class):
    config = config_class(embodiment_tag="my_arm", embodiment_ids={"my_arm": 7})
    assert config.embodiment_id == 7
    with pytest.raises(InvalidConfigError, match=r"embodiment_tag='gr2' has no slot. Did you mean 'gr1'"):
        config_class(embodiment_tag="gr2")
    with pytest.raises(InvalidConfigError, match=r"slot 31, but there are max_num_embodiments=6"):
        config_class(max_num_embodiments=6)


@BOTH
def test_unknown_names_are_refused(config_class):
    with pytest.raises(UnknownConfigFieldError, match="select_layer"):
        config_class(select_layers=3)
    with pytest.raises(UnknownConfigFieldError, match="backbone_cfg has no field 'select_layers'"):
        config_class(backbone_cfg={"select_layers": 3})
    with pytest.raises(UnknownConfigFieldError, match="select_layer"):
        config_class().select_layers = 3


@BOTH
def test_horizon_is_checked(config_class):
    with pytest.raises(InvalidConfigError, match=r"n_action_steps=17 must lie between 1 and action_horizon=16"):
        config_class(n_action_steps=17)
    config = config_class(n_action_steps=4)
    config.action_horizon = 8
    assert config.n_action_steps == 4


@BOTH
def test_examples_of_any_robot_and_of_one(config_class):
    tiny = {"vision_config": {"image_size": 28, "patch_size": 14}}
    inputs = config_class(eagle_config=tiny, max_state_dim=6).example_inputs(3)
    assert inputs["pixel_values"].shape == (3, 1, 3, 28, 28)
    assert inputs["state"].shape == (3, 6)
    assert "action_mask" not in inputs
    config = config_class(**FEATURES, eagle_config=tiny, max_state_dim=6)
    inputs = config.example_inputs(2)
    assert inputs["actions"].shape == (2, 16, 32)
    assert inputs["action_mask"][0, 0].tolist() == [True] * 4 + [False] * 28
    tokens = (inputs["input_ids"] == config.image_token_index).sum(1)
    assert tokens.tolist() == [config.tokens_per_image] * 2
    assert inputs["embodiment_id"].tolist() == [31, 24]
