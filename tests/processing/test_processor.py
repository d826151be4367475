"""Observations in, model inputs out; chunks in, robot units out; what does not fit is refused by name."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from manipulators import ACTPolicy, PolicyPipeline, PolicyProcessor
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    FeatureShapeError,
    FeatureValueError,
    ManipulatorsError,
    MissingFeatureError,
    MissingFileError,
    MissingStatisticsError,
    ProcessingError,
    UnknownFeatureError,
)


def image(level, *leading):
    return np.full((*leading, 4, 6, 3), level, dtype=np.uint8)


def observation(*leading):
    return {
        "observation.state": np.broadcast_to(np.array([1.0, 2.0, 3.0]), (*leading, 3)),
        "observation.environment_state": np.full((*leading, 1), 4.0),
        "observation.images.above": image(255, *leading),
        "observation.images.wrist": image(51, *leading),
    }


# --- observations -----------------------------------------------------------------------------------------


def test_one_observation(plain):
    inputs = plain(observation())
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "pixel_values": (1, 2, 3, 4, 6),
        "state": (1, 3),
        "environment_state": (1, 1),
    }
    assert inputs["state"].tolist() == [[1, 2, 3]] and inputs["environment_state"].tolist() == [[4]]
    # Cameras in the policy's order (wrist, above), whatever order they come in.
    assert inputs["pixel_values"][0, :, 0, 0, 0].tolist() == pytest.approx([0.2, 1.0])
    assert all(value.dtype == torch.float32 for value in inputs.values())


def test_batch_of_observations(plain):
    inputs = plain(observation(5))
    assert inputs["pixel_values"].shape == (5, 2, 3, 4, 6) and inputs["state"].shape == (5, 3)


def test_cameras_of_two_sizes_stay_a_list(tiny_act, statistics_of):
    config = tiny_act({"wide": (3, 4, 8), "tall": (3, 8, 4)})
    processor = PolicyProcessor.from_config(config, statistics_of(config))
    raw = {"observation.state": [0, 0, 0], "observation.images.tall": np.zeros((3, 8, 4))}
    pixels = processor(raw | {"observation.images.wide": np.zeros((4, 8, 3))})["pixel_values"]
    assert [tuple(view.shape) for view in pixels] == [(1, 3, 4, 8), (1, 3, 8, 4)]


def test_statistics_are_applied(tiny_act):
    config = tiny_act(state=2, normalization_mapping={"STATE": "MIN_MAX", "ACTION": "MEAN_STD"})
    statistics = {
        "observation.state": {"min": [0.0, 0.0], "max": [2.0, 4.0]},
        "action": {"mean": [1.0, 0.0], "std": [2.0, 4.0]},
        "not.a.feature": {"mean": [1.0]},
    }
    processor = PolicyProcessor.from_config(config, statistics)
    inputs = processor({"observation.state": [2.0, 1.0]}, actions=[[3.0, -4.0], [1.0, 0.0]])
    torch.testing.assert_close(inputs["state"], torch.tensor([[1.0, -0.5]]))
    torch.testing.assert_close(inputs["actions"], torch.tensor([[[1.0, -1.0], [0.0, 0.0]]]))
    assert inputs["action_is_pad"].tolist() == [[False, False]]
    torch.testing.assert_close(processor.decode_actions(inputs["actions"][0]), torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    assert "not.a.feature" not in processor.statistics


def test_bookkeeping_is_left_alone(plain):
    extra = {"timestamp": 0.1, "frame_index": 3, "task": "push", "action": [9, 9], "action_is_pad": [True], "index": 4}
    assert plain(observation() | extra).keys() == {"pixel_values", "state", "environment_state"}


def test_renamed_features(plain):
    plain.rename_map = {"observation.images.hand": "observation.images.wrist"}
    raw = observation()
    raw["observation.images.hand"] = raw.pop("observation.images.wrist")
    assert plain(raw)["pixel_values"][0, :, 0, 0, 0].tolist() == pytest.approx([0.2, 1.0])


def test_two_names_of_one_feature_are_refused(plain):
    plain.rename_map = {"observation.images.hand": "observation.images.wrist"}
    with pytest.raises(ProcessingError, match=r"observation\.images\.hand"):
        plain(observation() | {"observation.images.hand": image(0)})


# --- refusals ---------------------------------------------------------------------------------------------


def test_missing_features_are_named(plain):
    raw = observation()
    del raw["observation.images.wrist"], raw["observation.state"]
    with pytest.raises(MissingFeatureError, match=r"lacks observation\.images\.wrist, observation\.state\. Given"):
        plain(raw)


def test_unknown_feature_names_the_nearest(plain):
    with pytest.raises(UnknownFeatureError, match=r"wirst', which.*Did you mean 'observation\.images\.wrist'"):
        plain(observation() | {"observation.images.wirst": image(0)})


def test_keys_that_are_no_names(plain):
    with pytest.raises(ProcessingError):
        plain(observation() | {3: 1})


@pytest.mark.parametrize("value", [None, 3, [1, 2], np.zeros(3)])
def test_observation_that_is_no_mapping(plain, value):
    with pytest.raises(FeatureValueError, match="is a mapping of feature names"):
        plain(value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"observation.state": [1, 2]}, FeatureShapeError, "expected a last dimension of 3"),
        ({"observation.state": [1, 2, float("nan")]}, FeatureValueError, r"observation\.state holds NaN"),
        ({"observation.state": np.zeros((1, 1, 3))}, FeatureShapeError, "no leading dimension, or batch"),
        ({"observation.state": np.zeros((2, 3))}, FeatureShapeError, "one batch size"),
        ({"observation.images.wrist": image(0)[:3]}, FeatureShapeError, r"observation\.images\.wrist"),
        ({"observation.images.wrist": np.full((4, 6, 3), 2.0)}, FeatureValueError, "float images lie in"),
    ],
)
def test_features_that_do_not_fit(plain, change, error, message):
    with pytest.raises(error, match=message):
        plain(observation() | change)


# --- labels -----------------------------------------------------------------------------------------------


def test_labels(plain):
    one = plain(observation(), actions=[[1, 2], [3, 4]], action_is_pad=[False, True])
    assert one["actions"].tolist() == [[[1, 2], [3, 4]]] and one["action_is_pad"].tolist() == [[False, True]]
    batch = plain(observation(3), actions=np.zeros((3, 2, 2)), action_is_pad=np.zeros((3, 2), dtype=bool))
    assert batch["actions"].shape == (3, 2, 2) and batch["action_is_pad"].dtype == torch.bool


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ({"actions": np.zeros((5, 3))}, FeatureShapeError, "action has shape .* a last dimension of 2"),
        ({"actions": np.zeros(2)}, FeatureShapeError, r"expected \(1, horizon, 2\)"),
        ({"actions": np.zeros((2, 5, 2))}, FeatureShapeError, r"expected \(1, horizon, 2\)"),
        ({"actions": np.full((5, 2), np.nan)}, FeatureValueError, "action holds NaN"),
        ({"actions": np.zeros((5, 2)), "action_is_pad": np.zeros(5)}, FeatureValueError, "expected bool"),
        ({"actions": np.zeros((5, 2)), "action_is_pad": np.zeros(4, bool)}, FeatureShapeError, r"expected \(1, 5\)"),
    ],
)
def test_labels_that_do_not_fit(plain, labels, error, message):
    with pytest.raises(error, match=message):
        plain(observation(), **labels)


# --- decoding ---------------------------------------------------------------------------------------------


def test_decoded_actions_are_float32_on_the_cpu(plain):
    for leading in ((), (5,), (2, 5)):
        chunk = torch.ones(*leading, 2, dtype=torch.bfloat16, requires_grad=True)
        decoded = plain.decode_actions(chunk)
        assert decoded.shape == (*leading, 2) and decoded.dtype == torch.float32 and not decoded.requires_grad


@pytest.mark.parametrize(
    ("chunk", "error"),
    [
        (torch.zeros(5, 3), FeatureShapeError),
        (torch.full((5, 2), float("nan")), FeatureValueError),
        (torch.full((5, 2), float("inf")), FeatureValueError),
    ],
)
def test_actions_that_must_not_reach_a_robot(plain, chunk, error):
    with pytest.raises(error, match="The predicted chunk"):
        plain.decode_actions(chunk)


# --- history ----------------------------------------------------------------------------------------------


def test_history_of_one_observation_is_repeated(history_processor):
    raw = {"observation.images.top": image(51), "observation.state": [1.0, 2.0]}
    inputs = history_processor(raw)
    assert inputs["pixel_values"].shape == (1, 2, 1, 3, 4, 6) and inputs["state"].shape == (1, 2, 2)
    assert torch.equal(inputs["state"][:, 0], inputs["state"][:, 1])


def test_history_is_kept_in_order(history_processor):
    states = np.arange(12.0).reshape(3, 2, 2)
    inputs = history_processor({"observation.images.top": image(51, 3, 2), "observation.state": states})
    assert inputs["pixel_values"].shape == (3, 2, 1, 3, 4, 6)
    for step in range(2):
        single = history_processor({"observation.images.top": image(51), "observation.state": states[1, step]})
        torch.testing.assert_close(inputs["state"][1, step], single["state"][0, 0])


@pytest.mark.parametrize("leading", [(2,), (3, 1), (3, 3), (1, 3, 2)])
def test_history_of_another_length(history_processor, leading):
    raw = {"observation.images.top": image(51, *leading), "observation.state": np.zeros((*leading, 2))}
    with pytest.raises(FeatureShapeError, match="batch, then 2 observations of history"):
        history_processor(raw)


# --- building ---------------------------------------------------------------------------------------------


def test_missing_statistics(tiny_act):
    with pytest.raises(MissingStatisticsError, match=r"observation\.state is normalised with MEAN_STD.*IDENTITY"):
        PolicyProcessor.from_config(tiny_act(), None)


@pytest.mark.parametrize("value", [None, 3, {"mean": None, "std": None}, {"mean": ["a"] * 3, "std": [1] * 3}])
def test_statistics_of_another_form(tiny_act, statistics_of, value):
    config = tiny_act()
    with pytest.raises(ManipulatorsError, match=r"observation\.state"):
        PolicyProcessor.from_config(config, statistics_of(config) | {"observation.state": value})


def test_type_without_a_mode():
    features = {"observation.state": {"type": "STATE", "shape": (3,)}}
    with pytest.raises(CheckpointError, match="No normalization mode for STATE"):
        PolicyProcessor(input_features=features, normalization_mapping={"ACTION": "IDENTITY"})


@pytest.mark.parametrize("mapping", [{"STATE": "MEANSTD"}, {"STAT": "MEAN_STD"}])
def test_unknown_mode_or_type(mapping):
    with pytest.raises(ManipulatorsError, match="Did you mean"):
        PolicyProcessor(normalization_mapping=mapping)


# --- saving and loading -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_act, statistics_of, tmp_path):
    """A policy, its processor and the folder that holds both."""
    config = tiny_act({"wrist": (3, 32, 32), "above": (3, 32, 32)})
    torch.manual_seed(0)
    policy = ACTPolicy(config)
    processor = PolicyProcessor.from_config(
        config,
        statistics_of(config),
        dimension_names={"action": ["x", "gripper"]},
        units={"action": ["m", "1"]},
        normalization_eps=1e-6,
        rename_map={"a": "observation.images.wrist"},
    )
    PolicyPipeline(model=policy, processor=processor, device="cpu").save_pretrained(tmp_path)
    return policy, processor, tmp_path


LOADERS = {"class": PolicyProcessor.from_pretrained, "AutoProcessor": AutoProcessor.from_pretrained}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_reload(saved, load):
    _, processor, folder = saved
    loaded = load(folder)
    assert type(loaded) is PolicyProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert list(loaded.input_features) == list(processor.input_features)
    raw = {
        "observation.state": [0.1, 0.2, 0.3],
        "observation.images.wrist": np.full((32, 32, 3), 7, dtype=np.uint8),
        "observation.images.above": np.full((32, 32, 3), 9, dtype=np.uint8),
    }
    for name, value in processor(raw, actions=[[1, 2]]).items():
        assert torch.equal(loaded(raw, actions=[[1, 2]])[name], value), name


def test_every_statistic_survives_exactly(saved):
    _, processor, folder = saved
    stored = json.loads((folder / "processor_config.json").read_text())["statistics"]
    assert stored == processor.statistics
    assert stored["observation.state"]["q99"] == [0.75, 1.0, 1.25]


DOORS = LOADERS | {"PolicyPipeline": PolicyPipeline.from_pretrained}


# AutoProcessor reads the file itself before it knows whose it is, so its errors are transformers' own.
@pytest.mark.parametrize("text", ['{"n_obs', "", "[1]", "\x00\xff"])
@pytest.mark.parametrize("load", [DOORS["class"], DOORS["PolicyPipeline"]], ids=["class", "PolicyPipeline"])
def test_corrupt_file(saved, load, text):
    *_, folder = saved
    (folder / "processor_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptFileError, match=r"processor_config\.json"):
        load(folder)


@pytest.mark.parametrize("load", DOORS.values(), ids=DOORS)
def test_missing_file(saved, load):
    *_, folder = saved
    (folder / "processor_config.json").unlink()
    with pytest.raises(MissingFileError, match=r"processor_config\.json"):
        load(folder)


def rewrite(folder, **fields):
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_unknown_field(saved):
    *_, folder = saved
    rewrite(folder, n_obs_step=2)
    with pytest.raises(CheckpointError, match="unknown fields: n_obs_step"):
        PolicyProcessor.from_pretrained(folder)


def test_unknown_field_of_a_newer_format(saved):
    *_, folder = saved
    rewrite(folder, n_obs_step=2, format_version=2)
    assert PolicyProcessor.from_pretrained(folder).n_obs_steps == 1


@pytest.mark.parametrize(
    "fields", [{"input_features": 3}, {"statistics": [1]}, {"normalization_mapping": {"STATE": "?"}}]
)
def test_fields_of_another_form(saved, fields):
    *_, folder = saved
    rewrite(folder, **fields)
    with pytest.raises(ManipulatorsError):
        PolicyProcessor.from_pretrained(folder)


@pytest.mark.parametrize("change", ["order", "width", "camera", "action", "history"])
def test_processor_of_another_policy(saved, tiny_act, statistics_of, change):
    policy, *_ = saved
    cameras = {"wrist": (3, 32, 32), "above": (3, 32, 32)}
    config = {
        "order": lambda: tiny_act(dict(reversed(cameras.items()))),
        "width": lambda: tiny_act(cameras, state=4),
        "camera": lambda: tiny_act({"wrist": (3, 32, 32), "below": (3, 32, 32)}),
        "action": lambda: tiny_act(cameras),
        "history": lambda: tiny_act(cameras),
    }[change]()
    if change == "action":
        config.output_features = {"action": {"type": "ACTION", "shape": (3,)}}
    processor = PolicyProcessor.from_config(config, statistics_of(config))
    processor.n_obs_steps = 2 if change == "history" else 1
    with pytest.raises(CheckpointError, match=r"differ from the policy's"):
        PolicyPipeline(model=policy, processor=processor)


def test_saved_processor_of_another_policy(saved):
    *_, folder = saved
    fields = json.loads((folder / "processor_config.json").read_text())["input_features"]
    rewrite(folder, input_features=dict(reversed(fields.items())))
    with pytest.raises(CheckpointError, match="input_features differ"):
        PolicyPipeline.from_pretrained(folder)
