"""LeRobot's names and files, example by example; whole checkpoints are in tests/parity."""

import json

import pytest
import torch
from safetensors.torch import save_file

from manipulators.checkpoint import find_layout
from manipulators.conversion.layouts.lerobot import _read_processors, _relative_to
from manipulators.errors import CheckpointError, MissingFileError


def test_layout_is_told_by_the_config():
    assert find_layout({"type": "act"}) is not None
    assert find_layout({"model_type": "act_policy"}) is None
    assert find_layout({"model_type": "act_policy", "type": "act"}) is None


# --- processors -------------------------------------------------------------------------------------------


def write_processors(folder, index=3, file="statistics.safetensors", registry_name="normalizer_processor"):
    steps = [{"registry_name": "to_batch_processor", "config": {}} for _ in range(index)]
    steps.append({"registry_name": registry_name, "config": {"eps": 1e-6, "norm_map": {}}, "state_file": file})
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    after = [{"registry_name": "unnormalizer_processor", "config": {}, "state_file": file}]
    (folder / "policy_postprocessor.json").write_text(json.dumps({"steps": after}))
    save_file(
        {"observation.images.cam_high.mean": torch.tensor([[[0.1]], [[0.2]], [[0.3]]]), "action.q01": torch.ones(2)},
        folder / file,
    )


@pytest.mark.parametrize(("index", "file"), [(0, "a.safetensors"), (1, "step_7.safetensors"), (4, "x.y.safetensors")])
def test_state_file_is_followed_wherever_the_step_stands(tmp_path, index, file):
    write_processors(tmp_path, index, file)
    normalizer, unnormalizer, general = _read_processors(tmp_path)
    assert normalizer["statistics"].keys() == {"observation.images.cam_high", "action"}  # split at the last dot
    assert normalizer["statistics"]["observation.images.cam_high"]["mean"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert unnormalizer["statistics"]["action"]["q01"].tolist() == [1, 1]
    assert (normalizer["eps"], general) == (1e-6, {"rename_map": {}})


def test_normalizer_that_is_not_there(tmp_path):
    write_processors(tmp_path, registry_name="other_processor")
    with pytest.raises(CheckpointError, match="one normalizer among its processor steps; it has: to_batch_processor"):
        _read_processors(tmp_path)


def test_a_step_that_is_not_implemented_is_refused_by_name(tmp_path):
    write_processors(tmp_path)
    path = tmp_path / "policy_preprocessor.json"
    steps = json.loads(path.read_text())["steps"]
    crop = {"registry_name": "hil_processor/image_crop_resize", "config": {"resize_size": [96, 96]}}
    path.write_text(json.dumps({"steps": [crop, *steps]}))
    with pytest.raises(CheckpointError, match="do not exist here: hil_processor/image_crop_resize"):
        _read_processors(tmp_path)
    steps[-1]["config"]["normalize_observation_keys"] = ["observation.state"]
    path.write_text(json.dumps({"steps": steps}))
    with pytest.raises(CheckpointError, match=r"normalize_observation_keys=\['observation.state'\]"):
        _read_processors(tmp_path)


def test_processors_that_are_not_there(tmp_path):
    with pytest.raises(MissingFileError, match="it holds nothing"):
        _read_processors(tmp_path)


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
    assert _relative_to(step, 3) == expected
