"""LeRobot's names and files, example by example; whole checkpoints are in tests/parity."""

import json

import pytest
import torch
from safetensors.torch import save_file

from manipulators.checkpoint import find_layout
from manipulators.conversion.lerobot_steps import Processors, relative_to
from manipulators.errors import CheckpointError, CorruptFileError, MissingFileError


def test_layout_is_told_by_the_config():
    assert find_layout({"type": "act"}) is not None
    assert find_layout({"model_type": "act_policy"}) is None
    assert find_layout({"model_type": "act_policy", "type": "act"}) is None


# --- processors -------------------------------------------------------------------------------------------


FEATURES = {"action": {"type": "ACTION", "shape": [2]}}
MODES = {"STATE": "MEAN_STD", "ACTION": "QUANTILES"}


def write_processors(folder, index=3, file="statistics.safetensors", registry_name="normalizer_processor"):
    steps = [{"registry_name": "to_batch_processor", "config": {}} for _ in range(index)]
    normalizer = {"eps": 1e-6, "norm_map": MODES, "features": FEATURES}
    steps.append({"registry_name": registry_name, "config": normalizer, "state_file": file})
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    after = [{"registry_name": "unnormalizer_processor", "config": normalizer, "state_file": file}]
    (folder / "policy_postprocessor.json").write_text(json.dumps({"steps": after}))
    save_file(
        {"observation.images.cam_high.mean": torch.tensor([[[0.1]], [[0.2]], [[0.3]]]), "action.q01": torch.ones(2)},
        folder / file,
    )


@pytest.mark.parametrize(("index", "file"), [(0, "a.safetensors"), (1, "step_7.safetensors"), (4, "x.y.safetensors")])
def test_state_file_is_followed_wherever_the_step_stands(tmp_path, index, file):
    write_processors(tmp_path, index, file)
    found = Processors(tmp_path)
    statistics = found.normalizer["statistics"]
    assert statistics.keys() == {"observation.images.cam_high", "action"}  # split at the last dot
    assert statistics["observation.images.cam_high"]["mean"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert found.unnormalizer["statistics"]["action"]["q01"].tolist() == [1, 1]
    assert (found.normalizer["eps"], found.rename_map, found.relative_to(2)) == (1e-6, {}, None)


def test_normalizer_that_is_not_there(tmp_path):
    write_processors(tmp_path, registry_name="other_processor")
    with pytest.raises(CheckpointError, match="one normalizer among its processor steps; it has: to_batch_processor"):
        Processors(tmp_path)


def test_a_step_that_is_not_implemented_is_refused_by_name(tmp_path):
    write_processors(tmp_path)
    path = tmp_path / "policy_preprocessor.json"
    steps = json.loads(path.read_text())["steps"]
    crop = {"registry_name": "hil_processor/image_crop_resize", "config": {"resize_size": [96, 96]}}
    path.write_text(json.dumps({"steps": [crop, *steps]}))
    with pytest.raises(CheckpointError, match="do not exist here: hil_processor/image_crop_resize"):
        Processors(tmp_path)


TOKENIZER = {"registry_name": "tokenizer_processor", "config": {"max_length": 12, "padding_side": "right"}}
RELATIVE = {"registry_name": "relative_actions_processor", "config": {"enabled": True}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda before, after: before[-1]["config"].update(normalize_observation_keys=["a"]),
            r"observation_keys=\['a'\]",
        ),
        (lambda before, after: before[-1]["config"].update(gain=2), "gain=2 in normalizer_processor"),
        (lambda before, after: before[-1]["config"]["norm_map"].update(STATE="MEAN"), "norm_map="),
        (lambda before, after: before[-1]["config"].pop("norm_map"), "normalizer_processor without a norm_map"),
        (lambda before, after: before[-1]["config"].update(eps="text"), "eps='text'"),
        (lambda before, after: after[-1]["config"].update(eps=1e-3), "eps=1e-06 and un-normalises with eps=0.001"),
        (lambda before, after: before[-1].update(state="x"), "state='x' in normalizer_processor"),
        (lambda before, after: before[-1].update(state_file=7), "state_file=7 is no name"),
        (lambda before, after: before[0].update(state_file="x"), "state_file='x' in to_batch_processor"),
        (lambda before, after: before[0]["config"].update(axis=1), "axis=1 in to_batch_processor"),
        (lambda before, after: before.append(TOKENIZER | {"config": {"padding_side": "left"}}), "padding_side='left'"),
        (lambda before, after: before.append(TOKENIZER | {"config": {"truncation": 1.5}}), "truncation=1.5"),
        (
            lambda before, after: before.insert(0, RELATIVE),
            r"relative .*enabled=True\) .*enabled=False\); both are on",
        ),
        (lambda before, after: before.append(RELATIVE), "runs normalizer_processor, relative_actions_processor; here"),
        (lambda before, after: after.insert(0, after[0]), "one unnormalizer among its processor steps"),
        (lambda before, after: after.append(TOKENIZER), "do not exist here: tokenizer_processor"),
    ],
)
def test_a_field_or_an_order_that_is_not_done_here_is_refused_by_name(tmp_path, change, message):
    write_processors(tmp_path)
    paths = [tmp_path / f"policy_{kind}processor.json" for kind in ("pre", "post")]
    steps = [json.loads(path.read_text())["steps"] for path in paths]
    change(*steps)
    for path, changed in zip(paths, steps, strict=True):
        path.write_text(json.dumps({"steps": changed}))
    with pytest.raises((CheckpointError, CorruptFileError), match=message):
        Processors(tmp_path)


def test_features_that_are_normalised_are_those_of_the_config(tmp_path):
    """LeRobot leaves out what its step does not list, and goes by the kind that stands there."""
    write_processors(tmp_path)
    found = Processors(tmp_path)
    found.check_agreement({}, FEATURES)
    state = {"observation.state": {"type": "STATE", "shape": [3]}}
    with pytest.raises(CheckpointError, match=r"lists 'observation\.state' as None"):
        found.check_agreement(state, FEATURES)
    with pytest.raises(CheckpointError, match=r"lists 'action' as .*shape=\(2,\).*shape=\(3,\)"):
        found.check_agreement({}, {"action": {"type": "ACTION", "shape": [3]}})
    found.check_agreement({"observation.images.top": {"type": "VISUAL", "shape": [3, 8, 8]}}, FEATURES)  # IDENTITY
    with pytest.raises(CheckpointError, match="lacks pi0_new_line_processor, tokenizer_processor"):
        found.check_agreement({}, FEATURES, ("pi0_new_line_processor", "tokenizer_processor"))
    found.text_steps = ["pi0_new_line_processor", "tokenizer_processor"]
    with pytest.raises(CheckpointError, match="runs pi0_new_line_processor, which this policy's prompts have not"):
        found.check_agreement({}, FEATURES, ("tokenizer_processor",))
    found.unnormalizer["norm_map"] = {"ACTION": "MIN_MAX"}
    with pytest.raises(CheckpointError, match="normalised with QUANTILES and un-normalised with MIN_MAX"):
        found.check_agreement({}, FEATURES)


def test_processors_that_are_not_there(tmp_path):
    with pytest.raises(MissingFileError, match="it holds nothing"):
        Processors(tmp_path)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"exclude_joints": ["gripper"], "action_names": ["x", "Gripper.pos", "z"]}, [0, None, 2]),
        ({"exclude_joints": ["gripper"], "action_names": ["x", "gripper"]}, [0, None, 2]),  # fewer names than widths
        ({"exclude_joints": ["gripper"], "action_names": None}, [0, 1, 2]),
        ({"exclude_joints": [], "action_names": ["x", "gripper", "z"]}, [0, 1, 2]),
        ({}, [0, 1, 2]),
    ],
)
def test_relative_actions(step, expected):
    assert relative_to(step, 3) == expected
