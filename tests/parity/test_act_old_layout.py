"""LeRobot 0.1 to 0.3: statistics among the weights. The reference is `old033_act_envstate`, made by LeRobot 0.3.3."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from manipulators import PolicyPipeline
from manipulators.errors import MissingStatisticsError, WeightsMismatchError


@pytest.fixture
def case(shared):
    return shared / "golden" / "old033_act_envstate"


def part(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def test_chunk_and_actions_are_equal(case):
    inputs, outputs = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    pipeline = PolicyPipeline.from_pretrained(case / "checkpoint", device="cpu")
    observation = part(inputs, "chunk/")
    normalised = pipeline.policy.predict_action_chunk(**pipeline.processor(observation))
    torch.testing.assert_close(normalised, outputs["chunk/action_norm"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(pipeline.predict_chunk(observation), outputs["chunk/action"], atol=2e-5, rtol=1e-4)


def test_the_sequence_of_actions_is_equal(case):
    inputs, outputs = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    pipeline = PolicyPipeline.from_pretrained(case / "checkpoint", device="cpu")
    rows = part(inputs, "select/")
    actions = [pipeline({name: value[i] for name, value in rows.items()}) for i in range(10)]
    torch.testing.assert_close(torch.stack(actions), outputs["select/action"], atol=2e-5, rtol=1e-4)


@pytest.fixture
def changed(case, tmp_path):
    """Copy the checkpoint with its tensors changed by a function."""

    def change(function):
        folder = tmp_path / "changed"
        shutil.copytree(case / "checkpoint", folder)
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return change


def test_missing_statistics_are_named(changed):
    folder = changed(lambda tensors: tensors.pop("normalize_inputs.buffer_observation_state.std"))
    with pytest.raises(MissingStatisticsError, match=r"observation\.state .*needs mean and std"):
        PolicyPipeline.from_pretrained(folder)


def test_statistics_of_an_unknown_feature_are_refused(changed):
    folder = changed(lambda tensors: tensors.update({"normalize_inputs.buffer_gripper.mean": torch.zeros(1)}))
    with pytest.raises(WeightsMismatchError, match="buffer_gripper"):
        PolicyPipeline.from_pretrained(folder)


def test_names_with_underscores_are_found(changed):
    """`observation.images.cam_high` flattens to a name that un-flattens to another."""

    def rename(tensors):
        for which in ("mean", "std"):
            name = f"normalize_inputs.buffer_observation_state.{which}"
            tensors[f"normalize_inputs.buffer_observation_images_cam_high.{which}"] = torch.zeros(3, 1, 1) + 0.5
            assert name in tensors

    folder = changed(rename)
    config = json.loads((folder / "config.json").read_text())
    config["input_features"]["observation.images.cam_high"] = {"type": "VISUAL", "shape": [3, 64, 64]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsMismatchError, match="image_encoder"):  # the statistics fit; there is no image encoder
        PolicyPipeline.from_pretrained(folder)
