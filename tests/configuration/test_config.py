"""A config refuses what no policy can be built from, wherever it comes from, and survives JSON unchanged."""

import copy
import json
import logging
import pickle

import pytest
import torch

from manipulators import ACTConfig, FeatureType, NormalizationMode, PI0PolicyConfig, PolicyConfig, PolicyFeature
from manipulators.errors import InvalidConfigError, UnknownConfigFieldError

STATE = {"observation.state": {"type": "STATE", "shape": [3]}}
ACTION = {"action": {"type": "ACTION", "shape": [2]}}
CAMERA = {"observation.images.top": {"type": "VISUAL", "shape": [3, 32, 32]}}

IMPOSSIBLE = [
    ({"chunk_size": 0, "n_action_steps": 0}, "must lie between 1 and chunk_size=0"),
    ({"n_action_steps": 101}, "n_action_steps=101 must lie between 1 and chunk_size=100"),
    ({"n_action_steps": 0}, "n_action_steps=0"),
    ({"temporal_ensemble_coeff": 0.01}, "needs n_action_steps=1, not 100"),
    ({"n_obs_steps": 2}, "n_obs_steps=2"),
    ({"dim_model": 510}, "dim_model=510 must be a multiple of n_heads=8"),
    ({"dim_model": 0}, "dim_model=0 must be at least 1"),
    ({"n_heads": 0}, "n_heads=0 must be at least 1"),
    ({"dim_feedforward": 0}, "dim_feedforward=0"),
    ({"latent_dim": -1}, "latent_dim=-1"),
    ({"n_encoder_layers": 0}, "n_encoder_layers=0"),
    ({"n_decoder_layers": 0}, "n_decoder_layers=0"),
    ({"n_vae_encoder_layers": 0}, "n_vae_encoder_layers=0"),
    ({"dim_model": 10, "n_heads": 2, "input_features": CAMERA}, "dim_model=10 must be a multiple of 4"),
    ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
    ({"dropout": -0.1}, "dropout=-0.1"),
    ({"dropout": float("nan")}, "dropout=nan"),
    ({"kl_weight": -1.0}, "kl_weight=-1.0"),
    ({"kl_weight": float("nan")}, "kl_weight=nan"),
    ({"vision_backbone": "resnet17"}, "Did you mean 'resnet18'"),
    ({"replace_final_stride_with_dilation": True}, "replace_final_stride_with_dilation=True"),
    ({"feedforward_activation": "glu"}, "glu"),
    ({"chunk_size": 2.5}, "chunk_size.*float"),
    ({"chunk_size": True}, "chunk_size.*bool"),
    ({"chunk_size": "8"}, "chunk_size.*str"),
    ({"dropout": True}, "dropout.*bool"),
    ({"use_vae": 1}, "use_vae.*int"),
    ({"normalization_mapping": {"STAT": "MEAN_STD"}}, "'STAT'; its keys are feature types: STATE, VISUAL"),
    ({"normalization_mapping": {"STATE": "MEANSTD"}}, "Did you mean 'MEAN_STD'"),
    ({"input_features": ["observation.state"]}, "input_features"),
    ({"input_features": {"observation.state": [3]}}, "is not a feature"),
    ({"input_features": {"state": STATE["observation.state"]}}, "are named 'observation.state'"),
    ({"input_features": {"observation.images.a": STATE["observation.state"]}}, "are named 'observation.state'"),
    ({"input_features": {"observation.imgs.a": CAMERA["observation.images.top"]}}, r"observation.images.<camera>"),
    ({"input_features": {"observation.env": {"type": "ENV", "shape": [3]}}}, "'observation.environment_state'"),
    ({"input_features": {"observation.state": {"type": "STATE", "shape": [3, 2]}}}, "must be a vector"),
    ({"input_features": ACTION}, "actions are outputs"),
    ({"output_features": {"acton": ACTION["action"]}}, "the only output is 'action'"),
    ({"output_features": {"action": {"type": "STATE", "shape": [2]}}}, "of type ACTION"),
    ({"output_features": {"action": {"type": "ACTION", "shape": [2, 2]}}}, "shape \\(width,\\)"),
]


@pytest.mark.parametrize(("fields", "message"), IMPOSSIBLE)
def test_impossible_fields_in_the_constructor(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        ACTConfig(**fields)


@pytest.mark.parametrize(("fields", "message"), IMPOSSIBLE)
def test_impossible_fields_in_json(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        ACTConfig.from_dict({"model_type": "act_policy"} | json.loads(json.dumps(fields)))


@pytest.mark.parametrize(("fields", "message"), IMPOSSIBLE)
def test_impossible_fields_as_overrides_of_json(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        ACTConfig.from_dict({"model_type": "act_policy"}, **fields)


@pytest.mark.parametrize(("fields", "message"), [row for row in IMPOSSIBLE if "n_obs_steps" not in row[0]])
def test_impossible_assignments_are_found_by_validate(fields, message):
    config = ACTConfig()

    def assign():
        for name, value in fields.items():
            setattr(config, name, value)
        config.validate()

    with pytest.raises(InvalidConfigError, match=message):
        assign()


def test_unknown_field_in_the_constructor():
    with pytest.raises(UnknownConfigFieldError, match=r"'chunk_sise'\. Did you mean 'chunk_size'"):
        ACTConfig(chunk_sise=3)


def test_unknown_field_on_assignment():
    with pytest.raises(UnknownConfigFieldError, match=r"'dim_modle'\. Did you mean 'dim_model'"):
        ACTConfig().dim_modle = 3


@pytest.mark.parametrize("keywords", [{}, {"chunk_sise": 3}])
def test_unknown_field_in_json_and_in_overrides(keywords):
    saved = {"model_type": "act_policy"} | ({} if keywords else {"chunk_sise": 3})
    with pytest.raises(UnknownConfigFieldError, match="Did you mean 'chunk_size'"):
        ACTConfig.from_dict(saved, **keywords)


def test_unknown_field_of_a_newer_format_is_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        config = ACTConfig.from_dict({"model_type": "act_policy", "format_version": 2, "future": 1, "chunk_size": 7})
    assert config.chunk_size == 7 and not hasattr(config, "future")
    (message,) = [record.getMessage() for record in caplog.records if "newer version" in record.getMessage()]
    assert "format 2, read here: 1" in message and message.endswith("future.")


@pytest.mark.parametrize("name", ["state_dim", "action_dim", "action_horizon", "image_features"])
def test_what_follows_from_other_fields_cannot_be_set(name):
    with pytest.raises(InvalidConfigError, match=f"{name} follows from the other fields"):
        setattr(ACTConfig(), name, 3)


def test_json_of_another_policy():
    with pytest.raises(InvalidConfigError, match="'diffusion_policy', but ACTConfig reads 'act_policy'"):
        ACTConfig.from_dict({"model_type": "diffusion_policy"})


def test_json_in_lerobots_layout():
    with pytest.raises(InvalidConfigError, match="LeRobot's layout"):
        ACTConfig.from_dict({"type": "act"})


def test_defaults_are_the_papers():
    config = ACTConfig()
    assert (config.chunk_size, config.n_action_steps, config.dim_model, config.dim_feedforward) == (
        100,
        100,
        512,
        3200,
    )
    assert (config.n_encoder_layers, config.n_decoder_layers, config.n_vae_encoder_layers) == (4, 1, 4)
    assert (config.latent_dim, config.kl_weight, config.dropout, config.n_heads) == (32, 10.0, 0.1, 8)
    assert (config.use_vae, config.pre_norm, config.temporal_ensemble_coeff) == (True, False, None)
    assert set(config.normalization_mapping.values()) == {NormalizationMode.MEAN_STD}
    assert (config.model_type, config.format_version, config.n_obs_steps) == ("act_policy", 1, 1)


def test_values_are_converted():
    config = ACTConfig(kl_weight=5, input_features=STATE, normalization_mapping={"STATE": "MIN_MAX"})
    assert type(config.kl_weight) is float
    assert config.input_features == {"observation.state": PolicyFeature(FeatureType.STATE, (3,))}
    modes = {"STATE": "MIN_MAX", "VISUAL": "MEAN_STD", "ENV": "MEAN_STD", "ACTION": "MEAN_STD"}
    assert {kind: mode.value for kind, mode in config.normalization_mapping.items()} == modes
    config.dropout = 0
    assert type(config.dropout) is float


def test_assigned_mapping_is_completed_like_a_constructed_one():
    config = ACTConfig()
    config.normalization_mapping = {"STATE": "MIN_MAX"}
    assert config.normalization_mapping == ACTConfig(normalization_mapping={"STATE": "MIN_MAX"}).normalization_mapping


@pytest.mark.parametrize("field", ["input_features", "output_features", "normalization_mapping"])
def test_none_after_construction_is_as_good_as_before(field):
    config = ACTConfig()
    setattr(config, field, None)
    config.validate()
    assert getattr(config, field) == getattr(ACTConfig(), field)


def test_chunk_that_is_executed_whole_stays_so():
    config = ACTConfig()
    config.chunk_size = 16
    assert (config.n_action_steps, config.action_horizon) == (16, 16)
    partly = ACTConfig(chunk_size=16, n_action_steps=8)
    partly.chunk_size = 32
    assert partly.n_action_steps == 8


@pytest.mark.parametrize("config_class", [ACTConfig, PI0PolicyConfig])
def test_chunk_that_is_executed_whole_stays_so_in_an_override(config_class):
    assert config_class.from_dict(config_class().to_dict(), chunk_size=10).n_action_steps == 10
    saved = config_class(n_action_steps=8).to_dict()
    assert config_class.from_dict(saved, chunk_size=10).n_action_steps == 8
    with pytest.raises(InvalidConfigError, match="n_action_steps=8"):
        config_class.from_dict(saved, chunk_size=4)


def test_set_input_output_features():
    config = ACTConfig()
    config.set_input_output_features(CAMERA | STATE, ACTION)
    assert (config.state_dim, config.environment_state_dim, config.action_dim) == (3, None, 2)
    assert list(config.image_features) == ["observation.images.top"]
    with pytest.raises(InvalidConfigError, match=r"are named 'observation\.state'"):
        config.set_input_output_features({"state": PolicyFeature("STATE", (3,))}, ACTION)


def test_action_width_is_unknown_without_outputs():
    with pytest.raises(InvalidConfigError, match="output_features"):
        ACTConfig().action_dim


def test_json_round_trip_keeps_everything_in_order(tmp_path):
    inputs = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 8, 9]} for name in ("z", "a", "m")} | STATE
    config = ACTConfig(
        input_features=inputs,
        output_features=ACTION,
        normalization_mapping={"ACTION": "QUANTILES"},
        vision_config={"hidden_sizes": [8, 16], "depths": [1, 1]},
        chunk_size=9,
        n_action_steps=1,
        temporal_ensemble_coeff=0.5,
        dim_model=16,
        n_heads=2,
        pretrained_backbone_weights=None,
    )
    config.save_pretrained(tmp_path)
    loaded = ACTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert list(loaded.input_features) == list(inputs)
    assert list(loaded.image_features) == ["observation.images.z", "observation.images.a", "observation.images.m"]
    assert json.loads(config.to_json_string())["normalization_mapping"]["ACTION"] == "QUANTILES"
    assert "use_cache" not in config.to_dict()
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 3  # of a processor's tokenizer
    assert not {"pad_token_id", "bos_token_id", "eos_token_id"} & config.to_dict().keys()


def test_copies_and_pickles_are_equal():
    config = ACTConfig(input_features=STATE, output_features=ACTION, chunk_size=7)
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert same.to_dict() == config.to_dict() and same.input_features == config.input_features
    changed = copy.deepcopy(config)
    changed.input_features["observation.environment_state"] = PolicyFeature("ENV", (3,))
    assert list(config.input_features) == ["observation.state"]


class HistoryConfig(PolicyConfig):
    """A policy that looks at two observations."""

    model_type = "history_policy_for_tests"
    n_obs_steps: int = 2
    horizon: int = 4

    @property
    def action_horizon(self) -> int:
        return self.horizon


def test_custom_config_with_history():
    config = HistoryConfig(input_features=CAMERA | STATE, output_features=ACTION)
    inputs = config.example_inputs(5)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "pixel_values": (5, 2, 1, 3, 32, 32),
        "state": (5, 2, 3),
        "actions": (5, 4, 2),
        "action_is_pad": (5, 4),
    }
    assert inputs["action_is_pad"].dtype == torch.bool
    with pytest.raises(UnknownConfigFieldError, match=r"'horizn'\. Did you mean 'horizon'"):
        HistoryConfig(horizn=3)
    with pytest.raises(InvalidConfigError, match="n_obs_steps=0"):
        HistoryConfig(n_obs_steps=0)
