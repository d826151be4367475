"""A chunk that is executed whole stays whole when another length is chosen: one rule for all policies."""

import pytest

from manipulators import ACTConfig, ComposedConfig, GR00TN1_5Config, GR00TN1Config, PI0PolicyConfig
from manipulators.errors import InvalidConfigError

COMPOSED = {"backbone": {"type": "act"}, "action_head": {"type": "flow_matching"}}
CASES = {
    "act": (ACTConfig, "chunk_size", {}),
    "pi0": (PI0PolicyConfig, "chunk_size", {}),
    "composed": (ComposedConfig, "chunk_size", COMPOSED),
    "gr00t_n1": (GR00TN1Config, "action_horizon", {}),
    "gr00t_n1_5": (GR00TN1_5Config, "action_horizon", {}),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_another_length_in_the_constructor(case):
    config_class, name, fields = case
    config = config_class(**fields | {name: 10})
    assert (config.action_horizon, config.n_action_steps) == (10, 10)


def test_another_length_by_assignment(case):
    config_class, name, fields = case
    config = config_class(**fields)
    assert config.n_action_steps == config.action_horizon != 10
    setattr(config, name, 10)
    assert (config.action_horizon, config.n_action_steps) == (10, 10)
    config.validate()


def test_another_length_of_a_saved_config(case, tmp_path):
    config_class, name, fields = case
    config_class(**fields).save_pretrained(tmp_path)
    config = config_class.from_pretrained(tmp_path, **{name: 10})
    assert (config.action_horizon, config.n_action_steps) == (10, 10)


def test_a_part_of_the_chunk_stays_that_part(case):
    config_class, name, fields = case
    config = config_class(**fields | {"n_action_steps": 7})
    setattr(config, name, 10)
    assert (config.action_horizon, config.n_action_steps) == (10, 7)
    setattr(config, name, 5)
    with pytest.raises(InvalidConfigError, match=r"n_action_steps=7 must lie between 1 and .*=5"):
        config.validate()
