"""AutoPolicy and transformers' own Auto classes find the policy that config.json names, or say what is wrong."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from manipulators import ACTConfig, ACTPolicy, AutoPolicy, PolicyPipeline, PolicyProcessor
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    InvalidConfigError,
    MissingFileError,
    UnknownPolicyError,
)
from manipulators.modeling.registry import register_policy

DOORS = {"AutoPolicy": AutoPolicy.from_pretrained, "PolicyPipeline": PolicyPipeline.from_pretrained}


@pytest.fixture(params=DOORS)
def load(request):
    return DOORS[request.param]


@pytest.fixture
def folder(tiny_act, statistics_of, tmp_path):
    config = tiny_act()
    torch.manual_seed(0)
    processor = PolicyProcessor.from_config(config, statistics_of(config))
    PolicyPipeline(model=ACTPolicy(config), processor=processor, device="cpu").save_pretrained(tmp_path)
    return tmp_path


def test_transformers_auto_classes(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ACTConfig and config.chunk_size == 5
    assert type(AutoModel.from_pretrained(folder)) is ACTPolicy
    assert type(AutoModel.from_config(config)) is ACTPolicy
    assert type(AutoProcessor.from_pretrained(folder)) is PolicyProcessor


def test_auto_policy(folder):
    policy = AutoPolicy.from_pretrained(folder)
    assert type(policy) is ACTPolicy and not policy.training
    assert type(AutoPolicy.from_pretrained(str(folder))) is ACTPolicy
    assert AutoPolicy.from_pretrained(folder, dropout=0.5).config.dropout == 0.5
    assert AutoPolicy.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_auto_policy_from_config(tiny_act):
    policy = AutoPolicy.from_config(tiny_act(chunk_size=7))
    assert type(policy) is ACTPolicy and policy.config.action_horizon == 7


def test_auto_policy_is_not_built():
    with pytest.raises(CheckpointError, match=r"AutoPolicy\.from_pretrained"):
        AutoPolicy()


def test_missing_folder(load, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere is neither a folder nor a readable Hub repository"):
        load(tmp_path / "nowhere")


def test_missing_config(load, folder):
    (folder / "config.json").unlink()
    with pytest.raises(
        MissingFileError, match=r"holds no config\.json.*it holds model\.safetensors, processor_config"
    ):
        load(folder)


def test_empty_folder(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="it holds nothing"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("content", [b'{"model_type": ', b"", b"\x00\xff", b"[1]", b'"act_policy"', b"null"])
def test_corrupt_config(load, folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"config\.json is not a readable JSON"):
        load(folder)


def rewrite(folder, **fields):
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))


def test_unknown_model_type_names_the_nearest(load, folder):
    rewrite(folder, model_type="act_polcy")
    with pytest.raises(UnknownPolicyError, match=r"'act_polcy'\. Did you mean 'act_policy'"):
        load(folder)


def test_model_of_transformers(load, folder):
    rewrite(folder, model_type="bert")
    with pytest.raises(UnknownPolicyError, match="'bert'"):
        load(folder)


@pytest.mark.parametrize("model_type", [None, 3, ["act_policy"]])
def test_no_model_type(load, folder, model_type):
    rewrite(folder, model_type=model_type)
    with pytest.raises(UnknownPolicyError, match="names no model_type"):
        load(folder)


# --- registry ---------------------------------------------------------------------------------------------


def test_registering_needs_a_policy_config():
    with pytest.raises(InvalidConfigError, match="a subclass of PolicyConfig"):
        register_policy("nothing")(type("Nothing", (), {}))


def test_registered_name_must_be_the_configs():
    with pytest.raises(InvalidConfigError, match="'act_policy', registered as 'act'"):
        register_policy("act")(ACTPolicy)


def test_taken_name():
    other = type("Other", (), {"config_class": ACTConfig})
    with pytest.raises(InvalidConfigError, match="'act_policy' is taken by ACTPolicy"):
        register_policy("act_policy")(other)


def test_registering_twice_is_harmless():
    assert register_policy("act_policy")(ACTPolicy) is ACTPolicy
