"""Policies small enough to be computed by hand, and an ACT policy with its processor."""

import pytest
import torch

from manipulators import ACTPolicy, PolicyConfig, PolicyModel, PolicyOutput, PolicyProcessor, register_policy
from manipulators.modeling import registry


class LastTwoConfig(PolicyConfig):
    """Configure `LastTwoPolicy`."""

    model_type = "last_two_for_tests"
    n_obs_steps: int = 2
    n_action_steps: int = 1

    @property
    def action_horizon(self) -> int:
        return 3


class LastTwoPolicy(PolicyModel):
    """Return what it saw: action i of the chunk is (state before, state now + 100·i)."""

    config_class = LastTwoConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.post_init()

    def forward(self, state=None, actions=None, action_is_pad=None, return_loss=True):
        steps = 100 * torch.arange(3, dtype=state.dtype)
        before, now = state[:, 0, :1], state[:, 1, :1]  # (b, 1) each
        return PolicyOutput(actions=torch.stack([before.expand(-1, 3), now + steps], dim=-1) * self.scale)


@pytest.fixture
def last_two(monkeypatch):
    """Return a function: config fields → the policy that shows its history and a processor that changes nothing."""
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    register_policy("last_two_for_tests")(LastTwoPolicy)

    def build(**fields):
        config = LastTwoConfig(
            input_features={"observation.state": {"type": "STATE", "shape": (1,)}},
            output_features={"action": {"type": "ACTION", "shape": (2,)}},
            normalization_mapping=dict.fromkeys(("STATE", "VISUAL", "ENV", "ACTION"), "IDENTITY"),
            **fields,
        )
        return {"model": LastTwoPolicy(config), "processor": PolicyProcessor.from_config(config), "device": "cpu"}

    return build


@pytest.fixture
def act(tiny_act, statistics_of):
    """Return a function: config fields → a tiny ACT policy with two cameras, and its processor."""

    def build(**fields):
        config = tiny_act({"wrist": (3, 32, 32), "above": (3, 32, 32)}, **fields)
        torch.manual_seed(0)
        processor = PolicyProcessor.from_config(config, statistics_of(config))
        return {"model": ACTPolicy(config), "processor": processor, "device": "cpu"}

    return build
