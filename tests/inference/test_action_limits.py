"""Actions within bounds: the range of the training data, and the step from one to the next."""

import numpy as np
import pytest
import torch

from manipulators import ACTPolicy, PolicyPipeline, PolicyProcessor
from manipulators.errors import FeatureValueError, InvalidConfigError
from manipulators.inference.action_limits import StepLimit

STATE = {"type": "STATE", "shape": [2]}


def processor(names=None, units=None, relative_to=None, limits=(-1.0, 1.0)):
    return PolicyProcessor(
        input_features={"observation.state": STATE},
        output_features={"action": {"type": "ACTION", "shape": [2]}},
        normalization_mapping={"STATE": "IDENTITY", "ACTION": "IDENTITY"},
        statistics={"action": {"min": [limits[0]] * 2, "max": [limits[1]] * 2}},
        dimension_names=names,
        units=units,
        relative_to=relative_to,
    )


def follow(limit, actions, state=None):
    """Return actions (h, a) limited one after the other, from a state (s,)."""
    chunk = torch.tensor(actions, dtype=torch.float32)[None]
    return limit.limited_chunk(chunk, None if state is None else torch.tensor([state]))[0].tolist()


NAMES = {"action": ["x", "grip"], "observation.state": ["grip", "x"]}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0.5, [[0, 0], [0.5, -0.5], [1, -1]]),
        ([0.25, 4], [[0, 0], [0.25, -3], [0.5, -3]]),
        ({"grip": 2.0}, [[0, 0], [3, -2], [3, -3]]),
        (np.float32(0.5), [[0, 0], [0.5, -0.5], [1, -1]]),
    ],
)
def test_steps_of_all_of_each_and_by_name(step, expected):
    assert follow(StepLimit(step, processor(NAMES)), [[0, 0], [3, -3], [3, -3]]) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"names": NAMES}, [[5.5, 1.5]]),  # x from the state's second number, grip from its first
        ({"names": {"action": ["x", "grip"], "observation.state": ["a", "x"]}}, [[5.5, 9]]),
        ({"names": NAMES, "units": {"action": ["m/s", "m"], "observation.state": ["m", "m"]}}, [[9, 1.5]]),
        ({"relative_to": [0, None]}, [[1.5, 9]]),
        ({}, [[9, 9]]),
    ],
    ids=["names", "one name", "other units", "relative", "no names"],
)
def test_first_action_is_limited_where_state_and_action_compare(fields, expected):
    assert follow(StepLimit(0.5, processor(**fields)), [[9, 9]], state=[1.0, 5.0]) == expected


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"y": 1.0}, r"names 'y', which is no action\. Available: grip, x"),
        (0, "must be above 0"),
        (-1.0, "must be above 0"),
        (float("nan"), "must be above 0"),
        (True, "must be above 0"),
        ("fast", "must be above 0"),
        ({"x": "fast"}, "must be above 0"),
        ([1.0], "has 1 numbers for 2 actions: x, grip"),
    ],
)
def test_impossible_steps(step, message):
    with pytest.raises(InvalidConfigError, match=message):
        StepLimit(step, processor(NAMES))


def test_pipeline_limits_every_executed_action(last_two):
    """The chunk (before, now + 100·i) would jump by 100 in its second number."""
    parts = last_two(n_action_steps=2)
    pipeline = PolicyPipeline(**parts, max_action_step=[100.0, 3.0])
    found = [pipeline({"observation.state": [value]}).tolist() for value in (1.0, 2.0, 3.0)]
    assert found == [[1, 1], [1, 4], [2, 3]]
    with pytest.raises(FeatureValueError, match="NaN"):
        pipeline({"observation.state": [float("nan")]})
    assert pipeline({"observation.state": [4.0]}).tolist() == [2, 6]
    assert pipeline.predict_chunk({"observation.state": [1.0]}).tolist() == [[1, 1], [1, 4], [1, 7]]
    assert pipeline.settings["max_action_step"] == [100.0, 3.0]
    pipeline.reset()
    assert pipeline({"observation.state": [50.0]}).tolist() == [50, 50]


def test_pipeline_limits_after_clamping(last_two):
    parts = last_two()
    parts["processor"].statistics["action"] = {"min": [0.0, 0.0], "max": [10.0, 150.0]}
    pipeline = PolicyPipeline(**parts, clamp_actions=True, max_action_step=4.0)
    assert [pipeline({"observation.state": [value]}).tolist() for value in (1.0, 20.0, 20.0)] == [
        [1, 1],
        [1, 5],
        [5, 9],
    ]


@pytest.fixture
def relative(tiny_act, statistics_of):
    """Return a function: arguments → a pipeline whose first action is a difference to the state, predicted as 3."""

    def build(**arguments):
        config = tiny_act(normalization_mapping={"STATE": "IDENTITY", "ACTION": "IDENTITY"})
        statistics = {"action": {"min": [-1.0, -1.0], "max": [1.0, 1.0]}}
        parts = PolicyProcessor.from_config(config, statistics, relative_to=[1, None])
        policy = ACTPolicy(config)
        with torch.no_grad():
            policy.action_head.action_head.weight.zero_()
            policy.action_head.action_head.bias.copy_(torch.tensor([3.0, 0.5]))
        return PolicyPipeline(model=policy, processor=parts, device="cpu", **arguments)

    return build


def test_relative_dimensions_are_compared_and_clamped_as_differences(relative):
    state = {"observation.state": [0.0, 50.0, 0.0]}
    pipeline = relative()
    assert pipeline(state).tolist() == [53.0, 0.5]
    assert pipeline.outside_training_range == {"0": 1.0, "1": 0.0}
    assert relative(clamp_actions=True)(state).tolist() == [51.0, 0.5]
    assert relative(max_action_step=0.25)(state).tolist() == [50.25, 0.5]
