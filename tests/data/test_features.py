"""Features as datasets declare them: cameras in either order, and what a policy makes of them."""

import json
import logging
import shutil

import pytest
import torch

from manipulators import ACTConfig, LeRobotDataset, PolicyFeature, convert_dataset
from manipulators.data.features import camera_channels_last
from manipulators.data.policy_features import policy_features
from manipulators.data.selection import dimension_labels
from manipulators.errors import DatasetFormatError, InvalidConfigError, UnknownDatasetFeatureError

CAMERA = "observation.images.top"
HWC, CHW = ["height", "width", "channels"], ["channels", "height", "width"]


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ([3, 480, 640], CHW, [480, 640, 3]),  # openpi's converter for ALOHA
        ([3, 480, 640], None, [480, 640, 3]),
        ([3, 480, 640], HWC, [480, 640, 3]),  # misnamed: the sizes decide
        ([480, 640, 3], HWC, [480, 640, 3]),
        ([480, 640, 3], None, [480, 640, 3]),
        ([1, 48, 64], ["channel", "height", "width"], [48, 64, 1]),
        ([3, 32, 3], CHW, [32, 3, 3]),  # either order by its sizes: the names decide
        ([3, 32, 3], HWC, [3, 32, 3]),
        ([3, 32, 3], None, [3, 32, 3]),
    ],
)
def test_cameras_are_read_as_height_width_channels(shape, names, expected):
    declared = {"dtype": "video", "shape": shape, "names": names, "info": {"video.fps": 10}}
    read = camera_channels_last(declared)
    assert read["shape"] == expected
    assert read["info"] == {"video.fps": 10}
    assert read["names"] == (names if expected == shape else HWC)
    assert declared["shape"] == shape  # what was given stays as it was


def declare(root, **camera):
    """Change what meta/info.json says of the camera."""
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][CAMERA] |= camera
    path.write_text(json.dumps(info))
    return root


@pytest.mark.parametrize("names", [CHW, None])
def test_a_dataset_with_channels_first(tiny, tmp_path, names):
    plain = LeRobotDataset(tiny)
    other = declare(shutil.copytree(tiny, tmp_path / "other"), shape=[3, 64, 64], names=names)
    dataset = LeRobotDataset(other, decoded_cache=tmp_path / "frames")
    assert dataset.features[CAMERA]["shape"] == [64, 64, 3]
    assert dataset.dimension_names[CAMERA] == HWC
    assert torch.equal(dataset[5][CAMERA], plain[5][CAMERA])  # through the cache, whose frames are 64 × 64
    written = LeRobotDataset(convert_dataset(other, tmp_path / "written", progress=False))
    assert written.features[CAMERA]["shape"] == [64, 64, 3]


def test_the_features_of_a_policy(tmp_path, tiny):
    declare(tiny, shape=[3, 64, 64], names=CHW)
    inputs, outputs = LeRobotDataset(tiny).policy_features
    assert inputs == {CAMERA: PolicyFeature("VISUAL", (3, 64, 64)), "observation.state": PolicyFeature("STATE", (2,))}
    assert outputs == {"action": PolicyFeature("ACTION", (1,))}  # without next.reward and the index columns
    chosen = LeRobotDataset(tiny, features=["observation.state", "action"]).policy_features
    assert list(chosen.inputs) == ["observation.state"]


def test_a_config_for_a_dataset(tiny):
    dataset = LeRobotDataset(tiny)
    config = ACTConfig.for_dataset(dataset, chunk_size=16, dim_model=32)
    assert (type(config), config.chunk_size, config.dim_model) == (ACTConfig, 16, 32)
    assert config.input_features == dataset.policy_features.inputs
    assert config.output_features == {"action": PolicyFeature("ACTION", (1,))}
    blind = ACTConfig.for_dataset(dataset, inputs=["observation.state"])
    assert list(blind.input_features) == ["observation.state"]
    with pytest.raises(InvalidConfigError, match=r"inputs names 'observation.stat'. Did you mean 'observation.state'"):
        ACTConfig.for_dataset(dataset, inputs=["observation.stat"])


def test_an_observation_that_no_policy_reads():
    with pytest.raises(
        UnknownDatasetFeatureError, match=r"'observation.effort'.*features=\[…\]\), in a recipe inputs:"
    ):
        policy_features({"observation.effort": {"dtype": "float32", "shape": [7]}})


def test_a_camera_of_two_sizes_is_refused(tiny):
    declare(tiny, shape=[64, 64], names=None)
    with pytest.raises(DatasetFormatError, match=r"shape \[64, 64\]; expected \[height, width, channels\]"):
        LeRobotDataset(tiny).policy_features


@pytest.mark.parametrize("shape", [5, "3", None])
def test_a_shape_that_is_no_list_is_refused(tiny, shape):
    declare(tiny, shape=shape)
    with pytest.raises(DatasetFormatError, match="expected a list of sizes"):
        LeRobotDataset(tiny)


def test_names_that_are_not_one_for_each_dimension_are_left_out(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("manipulators"), "propagate", True)
    state = {"dtype": "float32", "shape": [3], "names": ["state"], "units": "m"}
    assert dimension_labels("observation.state", state, "names") is None
    assert "observation.state is 3 wide and meta/info.json has 1 names for it: state." in caplog.text
    assert dimension_labels("observation.state", state, "units") == ["m", "m", "m"]
    grouped = state | {"names": {"arm": ["x", "y"], "hand": ["grip"]}, "units": None}
    assert dimension_labels("observation.state", grouped, "names") == ["x", "y", "grip"]
    assert dimension_labels("observation.state", grouped, "units") is None
    matrix = {"dtype": "float32", "shape": [2, 2], "names": ["a", "b", "c", "d"]}
    assert dimension_labels("action", matrix, "names") == ["a", "b", "c", "d"]
    camera = {"dtype": "video", "shape": [4, 6, 3], "names": ["height", "width", "channels"]}
    assert dimension_labels("observation.images.top", camera, "names") == ["height", "width", "channels"]
