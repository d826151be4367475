"""Observation in, action out: shapes, history, queue, names, and what must not pass silently."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor

from manipulators import PolicyPipeline
from manipulators.errors import (
    CheckpointError,
    FeatureShapeError,
    FeatureValueError,
    InvalidConfigError,
    ManipulatorsError,
    MissingFeatureError,
    UnknownFeatureError,
)
from manipulators.inference.action_sources import TemporalEnsembler


def observation(seed=0, batch=None):
    generator = np.random.default_rng(seed)
    lead = () if batch is None else (batch,)
    return {
        "observation.state": generator.normal(size=(*lead, 3)),
        "observation.images.wrist": generator.integers(0, 256, (*lead, 32, 32, 3), dtype=np.uint8),
        "observation.images.above": generator.integers(0, 256, (*lead, 32, 32, 3), dtype=np.uint8),
    }


def state(value):
    return {"observation.state": [value]}


def moved(policy):
    """Draw every parameter, so that none is left at its initial zero."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


# --- what is changed while it runs ------------------------------------------------------------------------


def test_number_of_executed_actions_changes_at_the_next_episode(act):
    pipeline = PolicyPipeline(**act(n_action_steps=3))
    chunks = [pipeline.predict_chunk(observation(seed)) for seed in range(3)]
    pipeline(observation(0))
    pipeline.policy.config.n_action_steps = 1
    assert torch.equal(pipeline(observation(1)), chunks[0][1])  # the episode ends as it began
    pipeline.reset()
    found = [pipeline(observation(seed)) for seed in range(3)]
    assert all(torch.equal(action, chunk[0]) for action, chunk in zip(found, chunks, strict=True))


def test_temporal_ensembling_can_be_switched_on_and_off(act):
    pipeline = PolicyPipeline(**act(n_action_steps=1))
    moved(pipeline.policy)
    plain = [pipeline(observation(seed)) for seed in range(3)]
    pipeline.policy.config.temporal_ensemble_coeff = 0.5
    pipeline.reset()
    averaged = [pipeline(observation(seed)) for seed in range(3)]
    assert torch.equal(averaged[0], plain[0]) and not torch.allclose(averaged[2], plain[2], atol=1e-4)
    pipeline.policy.config.temporal_ensemble_coeff = None
    pipeline.reset()
    assert torch.equal(torch.stack([pipeline(observation(seed)) for seed in range(3)]), torch.stack(plain))


def test_config_that_no_policy_can_have_is_refused_at_the_next_episode(act):
    pipeline = PolicyPipeline(**act())
    pipeline.policy.config.n_action_steps = 9
    with pytest.raises(InvalidConfigError, match="n_action_steps=9 must lie between 1 and chunk_size=5"):
        pipeline.reset()


@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_what_was_begun_in_inference_mode_goes_on_outside(act, coefficient):
    parts = act(n_action_steps=1 if coefficient else 2, temporal_ensemble_coeff=coefficient)
    pipeline, other = PolicyPipeline(**parts), PolicyPipeline(**parts)
    with torch.inference_mode():
        pipeline.reset()
        pipeline(observation(0))
    pipeline(observation(1)).add_(0.0)  # one that was queued inside can be changed
    expected = [other(observation(seed)) for seed in range(4)][2:]
    assert torch.equal(torch.stack([pipeline(observation(seed)) for seed in (2, 3)]), torch.stack(expected))
    parts["model"].train()(**parts["model"].config.example_inputs(2)).loss.backward()


# --- shapes and queue -------------------------------------------------------------------------------------


def test_one_observation_and_a_batch(act):
    pipeline = PolicyPipeline(**act())
    assert not pipeline.policy.training
    assert pipeline(observation()).shape == (2,)
    assert pipeline.predict_chunk(observation()).shape == (5, 2)
    pipeline.reset()
    assert pipeline(observation(batch=3)).shape == (3, 2)
    assert pipeline.predict_chunk(observation(batch=3)).shape == (3, 5, 2)
    pipeline.reset()
    assert pipeline(observation(batch=1)).shape == (1, 2)


def test_batch_equals_its_parts(act):
    pipeline = PolicyPipeline(**act())
    raw = observation(batch=3)
    together = pipeline.predict_chunk(raw)
    for i in range(3):
        alone = pipeline.predict_chunk({name: value[i] for name, value in raw.items()})
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-4)


def test_actions_are_robot_units_on_the_cpu(act):
    parts = act()
    pipeline = PolicyPipeline(**parts)
    chunk = parts["model"].predict_action_chunk(**parts["processor"](observation()))
    found = pipeline.predict_chunk(observation())
    # Mean 0.1 and 0.35, standard deviation 0.5 and 0.75: the fixture's statistics of `action`.
    torch.testing.assert_close(found, chunk[0] * torch.tensor([0.5, 0.75]) + torch.tensor([0.1, 0.35]))
    assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad


def test_queue_is_refilled_when_it_is_empty(act):
    pipeline = PolicyPipeline(**act(n_action_steps=2))
    first, second = pipeline.predict_chunk(observation(1)), pipeline.predict_chunk(observation(3))
    actions = [pipeline(observation(seed)) for seed in (1, 2, 3, 4)]
    torch.testing.assert_close(torch.stack(actions), torch.cat([first[:2], second[:2]]))


def test_reset_begins_anew(act):
    pipeline = PolicyPipeline(**act())
    first = pipeline(observation(1))
    pipeline(observation(2))
    pipeline.reset()
    assert torch.equal(pipeline(observation(1)), first)


def test_predict_chunk_leaves_the_queue_alone(act):
    pipeline, undisturbed = PolicyPipeline(**act()), PolicyPipeline(**act())
    for seed in range(3):
        pipeline.predict_chunk(observation(9))
        assert torch.equal(pipeline(observation(seed)), undisturbed(observation(seed)))


def test_temporal_ensembling(act):
    pipeline = PolicyPipeline(**act(n_action_steps=1, temporal_ensemble_coeff=0.5))
    reference = TemporalEnsembler(0.5, 5)
    for seed in range(7):
        reference.push(pipeline.predict_chunk(observation(seed))[None])
        torch.testing.assert_close(pipeline(observation(seed)), reference.pop()[0])


@pytest.mark.parametrize(("first", "second"), [(None, 2), (2, None), (2, 3)])
def test_another_batch_size_within_an_episode(act, first, second):
    pipeline = PolicyPipeline(**act())
    pipeline(observation(batch=first))
    with pytest.raises(FeatureShapeError, match="call reset"):
        pipeline(observation(batch=second))
    pipeline.reset()
    pipeline(observation(batch=second))


# --- history ----------------------------------------------------------------------------------------------


def test_first_observation_is_repeated_then_history_moves_on(last_two):
    pipeline = PolicyPipeline(**last_two())
    assert [pipeline(state(value)).tolist() for value in (1.0, 2.0, 5.0)] == [[1, 1], [1, 2], [2, 5]]
    pipeline.reset()
    assert pipeline(state(8.0)).tolist() == [8, 8]


def test_history_moves_on_while_the_queue_is_emptied(last_two):
    pipeline = PolicyPipeline(**last_two(n_action_steps=2))
    actions = [pipeline(state(value)).tolist() for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert actions == [[1, 1], [1, 101], [2, 3], [2, 103], [4, 5]]


def test_history_of_a_batch(last_two):
    pipeline = PolicyPipeline(**last_two())
    pipeline({"observation.state": [[1.0], [10.0]]})
    assert pipeline({"observation.state": [[2.0], [20.0]]}).tolist() == [[1, 2], [10, 20]]


def test_history_does_not_follow_an_array_that_is_written_again(last_two):
    """Simulators return the same array at every step."""
    pipeline = PolicyPipeline(**last_two())
    buffer = np.array([1.0], dtype=np.float32)
    pipeline({"observation.state": buffer})
    buffer[:] = 2.0
    assert pipeline({"observation.state": buffer}).tolist() == [1, 2]


@pytest.mark.parametrize("bad", [{"observation.state": [float("nan")]}, {"observation.state": [1.0, 2.0]}, {}])
@pytest.mark.parametrize("already_seen", [0, 1])
def test_refused_observation_leaves_no_trace(last_two, bad, already_seen):
    pipeline = PolicyPipeline(**last_two())
    for _ in range(already_seen):
        pipeline(state(4.0))
    with pytest.raises(ManipulatorsError):
        pipeline(bad)
    assert pipeline(state(4.0)).tolist() == [4, 4]


def test_refused_first_observation_does_not_fix_the_batch(act):
    pipeline = PolicyPipeline(**act())
    with pytest.raises(FeatureShapeError):
        pipeline(observation() | {"observation.state": [1.0]})
    assert pipeline(observation(batch=2)).shape == (2, 2)


def test_unknown_feature_is_refused_with_history_as_without(last_two):
    pipeline = PolicyPipeline(**last_two())
    with pytest.raises(UnknownFeatureError, match=r"observation\.stat"):
        pipeline(state(1.0) | {"observation.stat": [2.0]})


def test_predict_chunk_takes_history_or_repeats(last_two):
    pipeline = PolicyPipeline(**last_two())
    assert pipeline.predict_chunk(state(3.0)).tolist() == [[3, 3], [3, 103], [3, 203]]
    assert pipeline.predict_chunk({"observation.state": [[[1.0], [2.0]]]})[0, 0].tolist() == [1, 2]


# --- what nobody should pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, [1.0], "state", 3, np.zeros(3), [{"observation.state": [0.0]}]])
def test_observation_that_is_no_mapping(last_two, given):
    pipeline = PolicyPipeline(**last_two())
    for call in (pipeline, pipeline.predict_chunk):
        with pytest.raises(FeatureValueError, match="An observation is a mapping of feature names to arrays"):
            call(given)


@pytest.mark.parametrize("name", [1, None, ("observation.state",)])
def test_feature_without_a_name(last_two, name):
    with pytest.raises(FeatureValueError, match="features have names"):
        PolicyPipeline(**last_two())({name: [1.0]})


@pytest.mark.parametrize("value", [np.array("text"), np.array(["a"]), None, b"1", {}, object(), [[1.0], [2.0, 3.0]]])
def test_state_that_is_no_number(last_two, value):
    with pytest.raises(FeatureValueError, match=r"observation\.state is a .* that cannot be read as numbers"):
        PolicyPipeline(**last_two())({"observation.state": value})


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "CMYK", "P"])
def test_pictures_in_other_colours(act, mode):
    raw = observation() | {"observation.images.wrist": Image.new("RGB", (32, 32)).convert("RGB")}
    pipeline = PolicyPipeline(**act())
    pipeline.predict_chunk(raw)
    with pytest.raises(FeatureValueError, match=rf'mode {mode}, whose channels are not red.*convert\("RGB"\)'):
        pipeline.predict_chunk(raw | {"observation.images.wrist": Image.new(mode, (32, 32))})


def test_truncated_picture(act, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-1000])
    raw = observation() | {"observation.images.wrist": Image.open(tmp_path / "half.png")}
    with pytest.raises(FeatureValueError, match=r"wrist is a PngImageFile that cannot be read.*truncated"):
        PolicyPipeline(**act())(raw)


@pytest.mark.parametrize(
    "sampling", [{"num_steps": "3"}, {"num_steps": 2.5}, {"noise": 3}, {"generator": 3}, {"step_noise": [1.0]}]
)
def test_sampling_arguments_of_another_type(act, sampling):
    with pytest.raises(InvalidConfigError, match=r"is a .*; expected"):
        PolicyPipeline(**act())(observation(), **sampling)


# --- names ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(act, tmp_path):
    PolicyPipeline(**act()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("yours", ["hand", "observation.images.hand"])
@pytest.mark.parametrize("theirs", ["wrist", "observation.images.wrist"])
def test_camera_map(saved, yours, theirs):
    expected = PolicyPipeline.from_pretrained(saved, device="cpu").predict_chunk(observation())
    pipeline = PolicyPipeline.from_pretrained(saved, device="cpu", camera_map={yours: theirs})
    raw = observation()
    raw["observation.images.hand"] = raw.pop("observation.images.wrist")
    assert torch.equal(pipeline.predict_chunk(raw), expected)
    assert pipeline(raw).shape == (2,)
    assert "observation.images.hand" in pipeline.observation_names


@pytest.mark.parametrize("option", ["camera_map", "rename_map"])
def test_camera_with_a_name_of_another_form(saved, option):
    expected = PolicyPipeline.from_pretrained(saved, device="cpu").predict_chunk(observation())
    raw = observation()
    raw["observation.rgb"] = raw.pop("observation.images.wrist")
    with pytest.raises(MissingFeatureError, match=r"rename_map=\{'observation\.rgb': 'observation\.images\.wrist'\}"):
        PolicyPipeline.from_pretrained(saved, device="cpu")(raw)
    name = {"observation.rgb": "observation.images.wrist"}
    pipeline = PolicyPipeline.from_pretrained(saved, device="cpu", **{option: name})
    assert torch.equal(pipeline.predict_chunk(raw), expected)


def test_cameras_can_be_swapped(saved):
    raw = observation()
    swapped = raw | {
        "observation.images.wrist": raw["observation.images.above"],
        "observation.images.above": raw["observation.images.wrist"],
    }
    plain = PolicyPipeline.from_pretrained(saved, device="cpu")
    mapped = PolicyPipeline.from_pretrained(saved, device="cpu", camera_map={"wrist": "above", "above": "wrist"})
    assert torch.equal(mapped.predict_chunk(swapped), plain.predict_chunk(raw))
    assert not torch.equal(plain.predict_chunk(swapped), plain.predict_chunk(raw))


def test_camera_map_to_no_camera_of_the_policy(saved):
    with pytest.raises(InvalidConfigError, match=r"'wirst'. Did you mean 'observation\.images\.wrist'"):
        PolicyPipeline.from_pretrained(saved, camera_map={"hand": "wirst"})


def test_rename_map_applies_to_states_with_history(last_two):
    parts = last_two()
    parts["processor"].rename_map = {"joints": "observation.state"}
    pipeline = PolicyPipeline(**parts)
    assert pipeline({"joints": [1.0]}).tolist() == [1, 1]
    assert pipeline({"joints": [2.0]}).tolist() == [1, 2]


# --- loading ----------------------------------------------------------------------------------------------


def test_transformers_pipeline_is_ours(saved):
    pipeline = transformers.pipeline("robotics", model=str(saved), device="cpu")
    assert type(pipeline) is PolicyPipeline
    expected = PolicyPipeline.from_pretrained(saved, device="cpu")
    assert torch.equal(pipeline.predict_chunk(observation()), expected.predict_chunk(observation()))
    assert pipeline.processor.to_dict() == AutoProcessor.from_pretrained(saved).to_dict()


def test_bfloat16(saved):
    exact = PolicyPipeline.from_pretrained(saved, device="cpu")
    pipeline = PolicyPipeline.from_pretrained(saved, device="cpu", dtype=torch.bfloat16)
    assert pipeline.policy.dtype == torch.bfloat16
    chunk = pipeline.predict_chunk(observation())
    assert chunk.dtype == torch.float32
    torch.testing.assert_close(chunk, exact.predict_chunk(observation()), atol=0.1, rtol=0.1)


def test_fields_can_be_overridden(saved):
    pipeline = PolicyPipeline.from_pretrained(saved, device="cpu", n_action_steps=1, temporal_ensemble_coeff=0.01)
    assert pipeline.policy.config.temporal_ensemble_coeff == 0.01


def test_policy_without_a_processor(act):
    with pytest.raises(CheckpointError, match="A policy needs its processor"):
        PolicyPipeline(model=act()["model"])


def test_embodiment_that_does_not_exist(saved):
    with pytest.raises(ManipulatorsError, match="franka"):
        PolicyPipeline.from_pretrained(saved, embodiment="franka")


def test_missing_camera(act):
    raw = observation()
    del raw["observation.images.above"]
    with pytest.raises(MissingFeatureError, match=r"lacks observation\.images\.above"):
        PolicyPipeline(**act())(raw)


def test_network_that_returns_nan(act):
    parts = act()
    with torch.no_grad():
        parts["model"].action_head.action_head.bias.fill_(float("nan"))
    with pytest.raises(FeatureValueError, match="The predicted chunk holds NaN"):
        PolicyPipeline(**parts)(observation())


def test_action_that_becomes_infinite_in_robot_units(last_two):
    """Whatever the reason is: nothing of the chunk is queued, and the next observation is predicted anew."""
    parts = last_two(n_action_steps=2)
    pipeline = PolicyPipeline(**parts)
    decode = parts["processor"].vectors.decode
    parts["processor"].vectors.decode = lambda chunk, state: decode(chunk, state) * torch.tensor([1.0, float("inf")])
    with pytest.raises(FeatureValueError, match=r"action in robot units holds NaN or infinity in dimensions \[1\]"):
        pipeline(state(5.0))
    parts["processor"].vectors.decode = decode
    assert pipeline(state(7.0)).tolist() == [7, 7]


# --- range of training ------------------------------------------------------------------------------------


def test_share_of_actions_outside_the_training_range(last_two):
    parts = last_two()
    parts["processor"].statistics["action"] = {"min": [0.0, 0.0], "max": [10.0, 150.0]}
    pipeline = PolicyPipeline(**parts)
    pipeline(state(5.0))  # (5, 5), (5, 105), (5, 205): one of three beyond 150 in the second dimension
    assert pipeline.outside_training_range == pytest.approx({"0": 0.0, "1": 1 / 3})
    pipeline.reset()
    assert pipeline.outside_training_range == {"0": 0.0, "1": 0.0}
    parts["processor"].statistics["action"] = {}
    assert PolicyPipeline(**parts).outside_training_range == {}


def test_clamped_actions(last_two):
    parts = last_two()
    parts["processor"].statistics["action"] = {"min": [0.0, 0.0], "max": [10.0, 150.0]}
    pipeline = PolicyPipeline(**parts, clamp_actions=True)
    assert pipeline.predict_chunk(state(-5.0)).tolist() == [[0, 0], [0, 95], [0, 150]]
