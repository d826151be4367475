"""NVIDIA's metadata.json, of two robots: features, parts and statistics for a processor; errors say what exists."""

import copy
import json

import numpy as np
import pytest
import torch

from manipulators import PolicyFeature
from manipulators.conversion.gr00t_metadata import read_embodiment
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    EmbodimentError,
    InvalidConfigError,
    MissingFeatureError,
    MissingFileError,
    UnknownFeatureError,
)
from manipulators.processing.gr00t import GR00TN1_5Processor
from manipulators.processing.word_tokenizer import word_tokenizer


def statistics(width, low):
    ends = {"min": low, "max": low + 2, "mean": low + 1, "std": 0.5, "q01": low + 0.5, "q99": low + 1.5}
    return {which: [value] * width for which, value in ends.items()}


def vector(width):
    return {"absolute": True, "rotation_type": None, "shape": [width], "continuous": True}


def robot(tag, **state):
    return {
        "statistics": {
            "state": {name: statistics(width, i) for i, (name, width) in enumerate(state.items())},
            "action": {"arm": statistics(2, 0.0), "gripper": statistics(1, 4.0)},
        },
        "modalities": {
            "video": {
                "ego_view": {"resolution": [20, 10], "channels": 3, "fps": 20.0},
                "wrist": {"resolution": [8, 8], "channels": 3, "fps": 20.0},
            },
            "state": {name: vector(width) for name, width in state.items()},
            "action": {"arm": vector(2), "gripper": vector(1)},
        },
        "embodiment_tag": tag,
    }


@pytest.fixture
def metadata():
    return {"gr1": robot("gr1", left_arm=2, right_arm=2, waist=3), "new_embodiment": robot("new_embodiment", arm=2)}


@pytest.fixture(params=["experiment_cfg/metadata.json", "metadata.json"])
def folder(metadata, tmp_path, request):
    path = tmp_path / request.param
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(metadata))
    return tmp_path


def test_one_of_two_robots(folder):
    found = read_embodiment(folder, "gr1", modes={"action.gripper": "binary"})
    assert found.tag == "gr1"
    assert found.input_features == {
        "observation.images.ego_view": PolicyFeature("VISUAL", (3, 10, 20)),  # recorded as width, height
        "observation.images.wrist": PolicyFeature("VISUAL", (3, 8, 8)),
        "observation.state": PolicyFeature("STATE", (7,)),
    }
    assert found.output_features == {"action": PolicyFeature("ACTION", (3,))}
    assert list(found.state_parts) == ["left_arm", "right_arm", "waist"]
    assert found.state_parts["waist"] == {"width": 3, "mode": "min_max"}
    assert found.action_parts == {
        "arm": {"width": 2, "mode": "min_max"},
        "gripper": {"width": 1, "mode": "binary"},
    }
    assert found.statistics["observation.state"]["waist"]["max"] == [4, 4, 4]
    assert found.rename_map["video.wrist"] == "observation.images.wrist"


def test_the_networks_own_order_and_choice(metadata):
    """NVIDIA's data config names them; the file may hold more, in another order."""
    keys = ["video.wrist", "state.waist", "state.left_arm", "action.gripper", "action.arm"]
    found = read_embodiment(metadata, "gr1", modes="q99", keys=keys)
    assert list(found.input_features) == ["observation.images.wrist", "observation.state"]
    assert list(found.state_parts) == ["waist", "left_arm"] and list(found.action_parts) == ["gripper", "arm"]
    assert found.input_features["observation.state"].shape == (5,)
    assert found.action_parts["arm"]["mode"] == "q99"


def test_file_and_content_say_the_same(metadata, folder):
    path = next(folder.rglob("metadata.json"))
    assert read_embodiment(path, "gr1") == read_embodiment(metadata, "gr1") == read_embodiment(folder, "gr1")


def test_processor_of_a_robot(metadata):
    """Its observations come under NVIDIA's names."""
    robot = read_embodiment({"gr1": metadata["gr1"]}, modes={"state.waist": "sin_cos"})
    processor = GR00TN1_5Processor(
        tokenizer=word_tokenizer(["press it"]),
        input_features=robot.input_features,
        output_features=robot.output_features,
        normalization_mapping={"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
        statistics=robot.statistics,
        state_parts=robot.state_parts,
        action_parts=robot.action_parts,
        rename_map=robot.rename_map,
        embodiment=robot.tag,
        embodiment_ids={robot.tag: 24},
        max_state_dim=12,
        max_action_dim=4,
        image_size=8,
        tokens_per_image=1,
    )
    observation = {
        "video.ego_view": np.zeros((10, 20, 3), np.uint8),
        "video.wrist": np.zeros((8, 8, 3), np.uint8),
        "state.left_arm": [0.0, 2.0],
        "state.right_arm": [2.0, 2.0],
        "state.waist": [0.0, 0.0, torch.pi / 2],
    }
    inputs = processor(observation, task="press it")
    expected = [-1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(inputs["state"], torch.tensor([expected], dtype=torch.float32))
    assert inputs["embodiment_id"].tolist() == [24]
    decoded = processor.decode_actions(torch.zeros(1, 4))
    assert {n: x.tolist() for n, x in processor.split_actions(decoded).items()} == {
        "action.arm": [[1.0, 1.0]],
        "action.gripper": [[5.0]],
    }


def test_errors_say_which_robots_exist(metadata):
    with pytest.raises(EmbodimentError, match=r"no embodiment 'so100'.*: gr1, new_embodiment"):
        read_embodiment(metadata, "so100")
    with pytest.raises(EmbodimentError, match=r"No embodiment is chosen.*: gr1, new_embodiment"):
        read_embodiment(metadata)
    assert read_embodiment({"gr1": metadata["gr1"]}).tag == "gr1"


@pytest.mark.parametrize(
    "arguments",
    [{"keys": ["video.ego_view", "state.left_leg", "action.arm"]}, {"modes": {"state.left_leg": "binary"}}],
)
def test_unknown_parts(metadata, arguments):
    with pytest.raises(UnknownFeatureError, match=r"'state\.left_leg'.*Did you mean 'state\.left_arm'"):
        read_embodiment(metadata, "gr1", **arguments)


def test_no_action_chosen(metadata):
    with pytest.raises(MissingFeatureError, match=r"lacks action\.<part>"):
        read_embodiment(metadata, "gr1", keys=["video.wrist", "state.waist"])


def test_files_that_are_not_nvidias(metadata, tmp_path):
    with pytest.raises(MissingFileError, match=r"holds no experiment_cfg/metadata\.json"):
        read_embodiment(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(CorruptFileError):
        read_embodiment(tmp_path)
    for path in (
        ["modalities", "action"],
        ["statistics", "state", "waist"],
        ["modalities", "state", "waist", "shape"],
    ):
        broken = copy.deepcopy(metadata)
        inner = broken["gr1"]
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        with pytest.raises(CheckpointError, match=f"metadata of 'gr1' is not as NVIDIA writes it: .*{path[-1]}"):
            read_embodiment(broken, "gr1")


def test_a_rotation_needs_a_mode(metadata):
    """NVIDIA turns rotations into other coordinates in its own code; what is not used, or is said, is no matter."""
    metadata["gr1"]["modalities"]["state"]["waist"]["rotation_type"] = "euler_angles_rpy"
    with pytest.raises(
        InvalidConfigError, match=r"state\.waist of 'gr1' is a rotation.*modes={'state\.waist': 'ident"
    ):
        read_embodiment(metadata, "gr1", modes={"action.gripper": "binary"})
    with pytest.raises(InvalidConfigError, match="rotation_type='euler_angles_rpy'"):
        read_embodiment(metadata, "gr1")
    found = read_embodiment(metadata, "gr1", modes={"state.waist": "identity"})
    assert found.state_parts["waist"] == {"width": 3, "mode": "identity"}
    keys = ["video.wrist", "state.left_arm", "action.arm"]
    assert list(read_embodiment(metadata, "gr1", keys=keys).state_parts) == ["left_arm"]


def test_an_entry_that_is_not_known_is_refused_by_name(metadata):
    places = {
        "gr1": ["gr1"],
        "modalities": ["gr1", "modalities"],
        "state.waist": ["gr1", "modalities", "state", "waist"],
        "video.wrist": ["gr1", "modalities", "video", "wrist"],
        "statistics of action.arm": ["gr1", "statistics", "action", "arm"],
    }
    for where, path in places.items():
        changed = copy.deepcopy(metadata)
        inner = changed
        for name in path:
            inner = inner[name]
        inner["mirrored"] = True
        with pytest.raises(InvalidConfigError, match="mirrored=True, which this library does not know") as error:
            read_embodiment(changed, "gr1")
        assert where in str(error.value)
    metadata["gr1"]["modalities"]["state"]["waist"]["shape"] = [3, 2]
    with pytest.raises(CheckpointError, match="not as NVIDIA writes it"):
        read_embodiment(metadata, "gr1")
