"""Relative actions: differences to the current state, and back."""

import pytest
import torch

from manipulators import ACTConfig, ACTPolicy, PolicyPipeline, PolicyProcessor
from manipulators.errors import InvalidConfigError, MissingFeatureError, MissingStatisticsError
from manipulators.processing.relative_actions import match_dimensions, to_absolute, to_relative

STATE = {"type": "STATE", "shape": [2]}
ACTION = {"type": "ACTION", "shape": [3]}


def make_processor(relative_to=(0, 1, None), mode="IDENTITY", statistics=None):
    return PolicyProcessor(
        input_features={"observation.state": STATE},
        output_features={"action": ACTION},
        normalization_mapping={"STATE": "IDENTITY", "ACTION": mode},
        statistics=statistics,
        relative_to=list(relative_to),
    )


def test_differences_to_the_state_and_back():
    actions = torch.tensor([[[1.0, 5.0, 9.0], [2.0, 7.0, 8.0]]])
    state = torch.tensor([[10.0, 20.0]])
    relative = to_relative(actions, state, [1, 0, None])
    assert relative.tolist() == [[[-19.0, -5.0, 9.0], [-18.0, -3.0, 8.0]]]
    assert to_absolute(relative, state, [1, 0, None]).tolist() == actions.tolist()


def test_labels_are_relative_and_decoded_actions_absolute():
    processor = make_processor()
    inputs = processor({"observation.state": [1.0, 2.0]}, actions=[[3.0, 3.0, 3.0], [4.0, 4.0, 4.0]])
    assert inputs["actions"].tolist() == [[[2.0, 1.0, 3.0], [3.0, 2.0, 4.0]]]
    decoded = processor.decode_actions(inputs["actions"], state=[1.0, 2.0])
    assert decoded.tolist() == [[[3.0, 3.0, 3.0], [4.0, 4.0, 4.0]]]
    assert processor.decode_actions(inputs["actions"][0], state=[1.0, 2.0]).shape == (2, 3)


def test_statistics_are_those_of_the_differences():
    statistics = {"action": {"mean": [1.0, 1.0, 0.0], "std": [2.0, 1.0, 1.0]}}
    processor = make_processor(mode="MEAN_STD", statistics=statistics)
    inputs = processor({"observation.state": [10.0, 20.0]}, actions=[[13.0, 21.0, 5.0]])
    torch.testing.assert_close(inputs["actions"], torch.tensor([[[1.0, 0.0, 5.0]]]))


def test_decoding_needs_the_state():
    with pytest.raises(MissingFeatureError, match=r"observation\.state"):
        make_processor().decode_actions(torch.zeros(1, 2, 3))


@pytest.mark.parametrize("relative_to", [[0, 1], [0, 1, 2], [0, 1, -1]])
def test_impossible_references_are_refused(relative_to):
    with pytest.raises(InvalidConfigError, match="relative_to"):
        make_processor(relative_to)


@pytest.mark.parametrize("relative_to", [[0], [0, 1, None, None], [0, 1, 2]])
def test_impossible_references_are_refused_when_they_are_assigned_later(relative_to):
    processor = make_processor()
    with pytest.raises(InvalidConfigError, match="must name, for each of the 3 action dimensions"):
        processor.relative_to = relative_to
    assert processor.relative_to == [0, 1, None]
    processor.relative_to = (None, None, 1)
    assert processor.relative_to == [None, None, 1]


def test_statistics_that_are_assigned_later_are_checked_and_used():
    processor = make_processor(mode="MEAN_STD", statistics={"action": {"mean": [0.0] * 3, "std": [1.0] * 3}})
    processor.relative_to = None
    with pytest.raises(MissingStatisticsError, match="has 2 values"):
        processor.statistics = {"action": {"mean": [1.0] * 2, "std": [1.0] * 2}}
    assert processor.decode_actions(torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]
    processor.statistics = {"action": {"mean": [1.0] * 3, "std": [2.0] * 3}}
    assert processor.decode_actions(torch.ones(1, 3)).tolist() == [[3.0, 3.0, 3.0]]


def test_training_range_of_relative_dimensions_is_that_of_the_differences():
    statistics = {"action": {"mean": [0.0] * 3, "std": [1.0] * 3, "min": [-1.0] * 3, "max": [2.0] * 3}}
    low, high = make_processor(mode="MEAN_STD", statistics=statistics).action_range()
    assert low.tolist() == [-1.0, -1.0, -1.0]
    assert high.tolist() == [2.0, 2.0, 2.0]


def test_dimensions_are_matched_by_name():
    assert match_dimensions(["x", "grip", "y"], ["y", "x"], (3, 2)) == [1, None, 0]
    assert match_dimensions(None, None, (2, 2)) == [0, 1]
    with pytest.raises(InvalidConfigError, match="same names"):
        match_dimensions(["a"], ["b"], (1, 1))
    with pytest.raises(InvalidConfigError, match="same names"):
        match_dimensions(None, None, (2, 3))


def test_the_pipeline_adds_the_state_it_predicted_in(tmp_path):
    torch.manual_seed(0)
    config = ACTConfig(
        input_features={"observation.state": STATE},
        output_features={"action": ACTION},
        normalization_mapping=dict.fromkeys(("STATE", "ACTION"), "IDENTITY"),
        chunk_size=4,
        dim_model=16,
        n_heads=2,
        dim_feedforward=16,
        use_vae=False,
    )
    policy = ACTPolicy(config)
    processor = PolicyProcessor(
        policy.config.input_features,
        policy.config.output_features,
        dict.fromkeys(("STATE", "ACTION"), "IDENTITY"),
        relative_to=[0, None, None],
    )
    PolicyPipeline(model=policy, processor=processor).save_pretrained(tmp_path)
    pipeline = PolicyPipeline.from_pretrained(tmp_path)
    observation = {"observation.state": torch.tensor([0.5, 0.25])}
    chunk = pipeline.policy.predict_action_chunk(**pipeline.processor(observation))
    expected = chunk[0].clone()
    expected[:, 0] += 0.5
    torch.testing.assert_close(pipeline.predict_chunk(observation), expected)
    torch.testing.assert_close(pipeline(observation), expected[0])
