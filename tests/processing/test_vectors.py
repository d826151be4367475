"""States and actions of any width inside the network's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manipulators import PolicyProcessor
from manipulators.errors import FeatureShapeError, InvalidConfigError
from manipulators.processing.vectors import PaddedVectors


class Padding(PolicyProcessor):
    """A processor that pads and does nothing else."""

    vectors_class = PaddedVectors


def build(state=3, action=2, **widths):
    return Padding(
        input_features={"observation.state": {"type": "STATE", "shape": (state,)}},
        output_features={"action": {"type": "ACTION", "shape": (action,)}},
        normalization_mapping={"STATE": "IDENTITY", "ACTION": "IDENTITY"},
        **widths,
    )


@settings(max_examples=30, deadline=None)
@given(state=st.integers(1, 5), action=st.integers(1, 5), more=st.integers(0, 3), horizon=st.integers(1, 3))
def test_padding_is_zero_and_comes_off(state, action, more, horizon):
    processor = build(state, action, max_state_dim=state + more, max_action_dim=action + more)
    actions = torch.randn(horizon, action)
    inputs = processor({"observation.state": torch.ones(state)}, actions=actions)
    assert inputs["state"].tolist() == [[1.0] * state + [0.0] * more]
    assert inputs["actions"].shape == inputs["action_mask"].shape == (1, horizon, action + more)
    assert inputs["action_mask"].sum().item() == horizon * action
    assert not inputs["actions"][~inputs["action_mask"]].any()
    assert torch.equal(processor.decode_actions(inputs["actions"])[0], actions)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"max_state_dim": 2}, "state is 3 wide, the network's max_state_dim is 2"),
        ({"max_action_dim": 1}, "action is 2 wide, the network's max_action_dim is 1"),
    ],
)
def test_wider_than_the_network(widths, message):
    with pytest.raises(InvalidConfigError, match=message):
        build(**widths)


def test_chunk_of_another_width():
    processor = build(max_action_dim=5)
    with pytest.raises(FeatureShapeError, match="a last dimension of 5, padding included"):
        processor.decode_actions(torch.zeros(4, 2))
    actions = processor.decode_actions(torch.zeros(4, 2), padded=False)
    assert torch.equal(actions, processor.decode_actions(torch.zeros(4, 5)))
    with pytest.raises(FeatureShapeError):
        processor.decode_actions(torch.zeros(4, 5), padded=False)
