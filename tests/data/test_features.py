"""Features as datasets declare them: cameras in either order, and what a policy makes of them."""

import io
import json
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from manipulators import ACTConfig, LeRobotDataset, PolicyFeature, convert_dataset
from manipulators.data.features import camera_channels_last, holds_depth, standard_dtype
from manipulators.data.naming import suggested_names
from manipulators.data.policy_features import policy_features
from manipulators.errors import DatasetFormatError, InvalidConfigError, UnknownDatasetFeatureError, VideoError

from .conftest import edit_json, record, record_v2

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


def test_a_camera_of_one_size_is_refused_unless_it_is_left_out(tiny):
    declare(tiny, shape=[64], names=None)
    with pytest.raises(DatasetFormatError, match=r"shape \[64\]; expected \[height, width, channels\].*--features"):
        LeRobotDataset(tiny)
    assert CAMERA not in LeRobotDataset(tiny, features=["action"])[0]


@pytest.mark.parametrize("shape", ["3", None, [64, 0, 3], [64, 64.5, 3], [[64, 64, 3]]])
def test_a_shape_that_is_no_list_is_refused(tiny, shape):
    declare(tiny, shape=shape)
    with pytest.raises(DatasetFormatError, match="expected a list of sizes"):
        LeRobotDataset(tiny)


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        *(("float", "float32"), ("double", "float64"), ("Float32", "float32"), ("torch.float32", "float32")),
        *(("<f4", "float32"), ("half", "float16"), ("boolean", "bool"), ("Video", "video"), ("language", "language")),
    ],
)
def test_dtypes_however_they_are_spelled(spelling, dtype):
    assert standard_dtype(spelling) == dtype


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_a_state_of_another_spelling_or_without_a_sign_is_read(tmp_path, version):
    """A policy would otherwise be trained on the camera alone."""
    root = tmp_path / "other"
    record(root) if version == "v3.0" else record_v2(root, version)
    path = root / "meta/info.json"
    for file in root.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        states = pa.array([[row, 65535] for row in table["index"].to_pylist()], pa.list_(pa.uint16()))
        pq.write_table(
            table.set_column(table.column_names.index("observation.state"), "observation.state", states), file
        )
    for spelling in ("uint16", "float", "double"):
        info = json.loads(path.read_text())
        info["features"]["observation.state"]["dtype"] = spelling
        path.write_text(json.dumps(info))
        dataset = LeRobotDataset(root)
        assert dataset[4]["observation.state"].tolist() == [4, 65535]
        assert "observation.state" in dataset.policy_features.inputs
    written = convert_dataset(root, tmp_path / "written", progress=False)
    assert json.loads((written / "meta/info.json").read_text())["features"]["observation.state"]["dtype"] == "float64"
    assert LeRobotDataset(written)[4]["observation.state"].tolist() == [4, 65535]


def test_what_is_left_out_is_said(tiny, caplog):
    path = tiny / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"] |= {"subtask": {"dtype": "language", "shape": [1]}}
    info["features"][CAMERA]["video_info"] = {"video.is_depth_map": True}  # as version 2.0 says it
    path.write_text(json.dumps(info))
    assert LeRobotDataset(tiny).camera_names == []
    assert f"subtask of {tiny} is not read: it has dtype 'language'" in caplog.text
    assert f"{CAMERA} of {tiny} is not read: it holds depth" in caplog.text
    with pytest.raises(UnknownDatasetFeatureError, match="holds depth"):
        LeRobotDataset(tiny, features=[CAMERA])
    info["features"]["observation.state"]["dtype"] = "complex64"
    path.write_text(json.dumps(info))
    with pytest.raises(DatasetFormatError, match=r"observation\.state of .* has dtype 'complex64'.*--data\.features"):
        LeRobotDataset(tiny)
    assert "observation.state" not in LeRobotDataset(tiny, features=["action"])[0]


@pytest.mark.parametrize(
    "details", [{"is_depth_map": True}, {"video.pix_fmt": "gray16le"}, {"video.pix_fmt": "gray12le"}]
)
def test_depth_is_known_by_every_sign(details):
    assert holds_depth({"info": details}) and holds_depth({"video_info": details, "info": None})
    assert not holds_depth({"info": {"video.pix_fmt": "gray", "is_depth_map": False}})


def put_pictures(root, pictures):
    """Write pictures into the column of the camera, and leave the rest as it is."""
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    cells = []
    for picture, suffix in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, suffix)
        cells.append({"bytes": buffer.getvalue(), "path": None})
    column = pa.array(cells, table.schema.field(CAMERA).type)
    pq.write_table(table.set_column(table.column_names.index(CAMERA), table.schema.field(CAMERA), column), file)


@pytest.mark.parametrize(
    ("declared", "colours"),
    [([64, 64, 1], 1), ([1, 64, 64], 1), ([64, 64], 1), ([64, 64, 4], 4), ([4, 64, 64], 4), ([3, 64, 64], 3)],
)
def test_grey_pictures_and_those_with_opacity_are_read_in_colours(tmp_path, declared, colours):
    root = declare(record(tmp_path / "png", use_videos=False), shape=declared, names=None)
    picture = np.full((64, 64), 90, np.uint8) if colours == 1 else np.full((64, 64, colours), 90, np.uint8)
    put_pictures(root, [(picture, "PNG")] * 7)
    stats = json.loads((root / "meta/stats.json").read_text())
    edit_json(
        root / "meta/stats.json",
        **{CAMERA: {key: [7] if key == "count" else [[[0.5 * (key != "std")]]] * colours for key in stats[CAMERA]}},
    )
    dataset = LeRobotDataset(root)
    assert dataset[4][CAMERA].unique().tolist() == [90] and dataset[4][CAMERA].shape == (3, 64, 64)
    assert dataset.policy_features.inputs[CAMERA].shape == (3, 64, 64)
    assert dataset.statistics[CAMERA]["mean"].shape == (3, 1, 1)
    written = LeRobotDataset(convert_dataset(root, tmp_path / "written", progress=False))
    assert written[4][CAMERA].unique().tolist() == [90]
    assert written.statistics[CAMERA]["mean"].ravel().tolist() == pytest.approx([90 / 255] * 3)


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "PNG"), (np.float32, "TIFF"), (np.int32, "TIFF")])
def test_depth_in_a_colour_camera_is_refused_by_name(tmp_path, dtype, suffix):
    root = record(tmp_path / "png", use_videos=False)
    plain, depth = (np.zeros((64, 64, 3), np.uint8), "PNG"), (np.full((64, 64), 1000, dtype), suffix)
    put_pictures(root, [plain, plain, plain, depth, plain, plain, plain])
    dataset, message = LeRobotDataset(root), r"images\.top in row 3 of .*file-000\.parquet.*depth"
    dataset[2]
    for read in (lambda: dataset[3], lambda: convert_dataset(root, tmp_path / "new", progress=False)):
        with pytest.raises(DatasetFormatError, match=message):
            read()
    assert len(LeRobotDataset(root, features=["action"])[:]["action"]) == 7


@pytest.mark.parametrize("use_videos", [True, False])
def test_pictures_of_another_size_are_refused_with_their_file(tmp_path, use_videos):
    root = declare(record(tmp_path / "other", use_videos=use_videos), shape=[32, 64, 3])
    for read in (lambda: LeRobotDataset(root)[0:4], lambda: LeRobotDataset(root)[1]):
        with pytest.raises(VideoError, match=r"other.* has pictures of 64 × 64 .*says 32 × 64 of observation"):
            read()


def test_a_video_of_deep_grey_is_refused(tiny):
    path = tiny / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "gray16le"
        picture = np.full((64, 64), 1000, np.uint16)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray16le")))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"file-000\.mp4 holds grey levels .*gray16le"):
        LeRobotDataset(tiny)[0]


OPENPI = {
    "state": {"dtype": "float32", "shape": [2]},
    "actions": {"dtype": "float32", "shape": [1]},
    "image": {"dtype": "image", "shape": [64, 64, 3]},
    "observation/wrist_image": {"dtype": "image", "shape": [64, 64, 3]},
}


def test_the_names_of_other_projects_are_recognised():
    assert suggested_names(OPENPI) == {
        "actions": "action",
        "state": "observation.state",
        "image": "observation.images.image",
        "observation/wrist_image": "observation.images.wrist_image",
    }
    with pytest.raises(UnknownDatasetFeatureError) as raised:
        policy_features(OPENPI)
    message = str(raised.value)
    assert message.startswith("No policy reads 'actions', 'image', 'observation/wrist_image': policies know")
    assert (
        "rename_map={'actions': 'action', 'state': 'observation.state', 'image': 'observation.images.image'" in message
    )
    assert "--data.rename_map '{actions: action, state: observation.state, image: observation.images.image," in message
    assert "--rename-map actions=action state=observation.state image=observation.images.image" in message


def test_a_state_under_another_name_is_not_left_out_in_silence(caplog):
    features = {"action": OPENPI["actions"], "qpos": OPENPI["state"], "force": OPENPI["state"]}
    assert policy_features(features | {"next.reward": {"dtype": "float32", "shape": [1]}}).inputs == {}
    assert "No policy reads 'qpos', 'force', which is left out" in caplog.text
    assert "--data.rename_map '{qpos: observation.state}'" in caplog.text


def test_a_feature_that_is_asked_for_by_the_name_it_should_have(tiny):
    path = tiny / "meta/info.json"
    path.write_text(path.read_text().replace('"action"', '"actions"'))
    with pytest.raises(UnknownDatasetFeatureError, match=r"'action', which .* calls 'actions'. Rename: rename_map="):
        LeRobotDataset(tiny, features=["action"])
