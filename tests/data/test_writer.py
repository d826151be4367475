import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from manipulators.data.dataset import LeRobotDataset
from manipulators.data.writer import LeRobotWriter
from manipulators.errors import (
    DatasetFormatError,
    DiskFullError,
    InvalidFrameError,
    OutputExistsError,
    RecordingError,
    VideoError,
)

from .conftest import FEATURES, frame, record

ACTION_ONLY = {"action": {"dtype": "float32", "shape": [2]}}


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_every_frame_comes_back(tmp_path, codec):
    dataset = LeRobotDataset(record(tmp_path / "d", (3, 4, 2), codec=codec))
    samples = list(dataset)
    assert [s["action"].item() for s in samples] == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    greys = [float(s["observation.images.top"].float().mean()) for s in samples]
    assert np.abs(np.subtract(greys, [0, 20, 40, 60, 80, 100, 120, 140, 160])).max() < 3
    assert [s["task"] for s in samples] == ["push"] * 3 + ["pull"] * 4 + ["push"] * 2
    assert dataset.statistics["action"]["q50"].tolist() == [40.0]
    assert dataset.statistics["next.reward"]["std"].tolist() == [0.0]


def test_layout(tiny):
    info = json.loads((tiny / "meta/info.json").read_text())
    counts = [info[name] for name in ("total_episodes", "total_frames", "total_tasks", "splits")]
    assert counts == [2, 7, 2, {"train": "0:2"}]
    assert info["codebase_version"] == "v3.0" and info["robot_type"] == "tiny"
    assert info["features"]["observation.images.top"]["info"]["video.codec"] == "h264"
    data = pq.ParquetFile(tiny / "data/chunk-000/file-000.parquet")
    assert [data.metadata.row_group(i).num_rows for i in range(data.num_row_groups)] == [3, 4]
    features = datasets.Features.from_arrow_schema(data.schema_arrow)
    assert features["observation.state"] == datasets.List(datasets.Value("float32"), length=2)
    assert features["action"] == datasets.Value("float32")
    episodes = pq.read_table(tiny / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    place = {name.split("/")[-1]: value for name, value in episodes[1].items() if name.startswith("videos/")}
    assert place == {"chunk_index": 0, "file_index": 0, "from_timestamp": 0.3, "to_timestamp": 0.7}
    assert (episodes[1]["dataset_from_index"], episodes[1]["dataset_to_index"]) == (3, 7)
    assert episodes[1]["tasks"] == ["pull"] and episodes[1]["stats/action/mean"] == [45.0]
    assert not (tiny / "encoding").exists()


def test_tasks_are_a_pandas_index(tiny):
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(tiny / "meta/tasks.parquet")
    assert table.index.name == "task" and table.loc["pull"].task_index == 1


def test_files_are_split_at_their_size(tmp_path):
    root = record(tmp_path / "d", (2, 2, 3), video_files_size_in_mb=1e-6)
    assert [path.name for path in sorted(root.glob("videos/*/*/*.mp4"))] == [f"file-00{i}.mp4" for i in range(3)]
    greys = [float(s["observation.images.top"].float().mean()) for s in LeRobotDataset(root)]
    assert np.abs(np.subtract(greys, [0, 20, 40, 60, 80, 100, 120])).max() < 3


def test_discarded_frames_leave_no_trace(tmp_path):
    with LeRobotWriter(tmp_path / "d", 10, FEATURES) as writer:
        writer.add_frame(frame(9), task="wrong")
        writer.discard_episode()
        writer.add_frame(frame(1), task="right")
        writer.end_episode()
        writer.add_frame(frame(9), task="unfinished")
    dataset = LeRobotDataset(tmp_path / "d")
    assert len(dataset) == 1 and dataset.tasks == ["right"]
    assert abs(float(dataset[0]["observation.images.top"].float().mean()) - 20) < 3
    assert dataset.statistics["observation.images.top"]["count"].tolist() == [1]


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(OutputExistsError, match="rm -r"):
        LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["d"]


def test_nothing_appears_before_close_or_after_an_error(tmp_path):
    with pytest.raises(KeyError), LeRobotWriter(tmp_path / "d", 10, FEATURES) as writer:
        writer.add_frame(frame(1), task="push")
        writer.end_episode()
        writer.add_frame(frame(2), task="push")
        assert (tmp_path / "d.incomplete").is_dir() and not (tmp_path / "d").exists()
        raise KeyError
    assert not (tmp_path / "d").exists() and not (tmp_path / "d.incomplete").exists()
    with pytest.raises(RecordingError, match="closed"):
        writer.add_frame(frame(3), task="push")


def test_empty_recordings(tmp_path):
    with (
        pytest.raises(RecordingError, match="at least one episode"),
        LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY),
    ):
        pass
    with LeRobotWriter(tmp_path / "e", 10, ACTION_ONLY) as writer:
        with pytest.raises(RecordingError, match="at least one frame"):
            writer.end_episode()
        with pytest.raises(RecordingError, match="instruction"):
            writer.add_frame({"action": [0, 1]}, task="")
        writer.add_frame({"action": [0, 1]}, task="push")
        writer.end_episode()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"action": None}, "lacks action"),
        ({"actions": [0.0]}, "Did you mean 'action'"),
        ({"action": [0.0, 1.0]}, r"shape \(2,\).*\(1,\)"),
        ({"action": [np.nan]}, "not finite"),
        ({"action": ["a"]}, "recorded as float32"),
        ({"observation.images.top": np.zeros((64, 64, 3))}, "uint8"),
        ({"observation.images.top": np.zeros((64, 32, 3), np.uint8)}, "recorded as"),
    ],
)
def test_frames_that_do_not_fit(tmp_path, change, message):
    bad = {name: value for name, value in (frame(0) | change).items() if value is not None}
    with LeRobotWriter(tmp_path / "d", 10, FEATURES) as writer:
        with pytest.raises(InvalidFrameError, match=message):
            writer.add_frame(bad, task="push")
        writer.add_frame(frame(1), task="push")
        writer.end_episode()
    assert len(LeRobotDataset(tmp_path / "d")) == 1


@pytest.mark.parametrize(
    "features, message",
    [
        ({}, "must name"),
        ({"index": {"dtype": "int64", "shape": [1]}}, "cannot be called"),
        ({"action": {"dtype": "float23", "shape": [1]}}, "'float32'"),
        ({"action": {"dtype": "float32", "shape": []}}, "sizes"),
        ({"action": {"dtype": "float32", "shape": [2], "names": ["x"]}}, "1 names for 2"),
        ({"observation.images.top": {"dtype": "video", "shape": [64, 64]}}, "height"),
    ],
)
def test_features_that_cannot_be_recorded(tmp_path, features, message):
    with pytest.raises(DatasetFormatError, match=message):
        LeRobotWriter(tmp_path / "d", 10, features)
    assert not (tmp_path / "d.incomplete").exists()


def test_video_settings_are_checked_before_recording(tmp_path):
    camera = {"observation.images.top": {"dtype": "video", "shape": [63, 64, 3]}}
    with pytest.raises(VideoError, match="even sides"):
        LeRobotWriter(tmp_path / "d", 10, camera)
    with pytest.raises(VideoError, match="no codec"):
        LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY, codec="vp9")
    with pytest.raises(DatasetFormatError, match="fps"):
        LeRobotWriter(tmp_path / "d", 0, ACTION_ONLY)


@pytest.mark.parametrize("place", ["frame", "episode", "close"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, place):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    writer = LeRobotWriter(tmp_path / "d", 10, FEATURES)
    writer.add_frame(frame(0), task="push")
    writer.end_episode()
    writer.add_frame(frame(1), task="push")
    broken = {
        "frame": "recording.episode.Episode.add",
        "episode": "recording.data_files.DataFiles.append",
        "close": "layouts.writer._write_json",
    }
    monkeypatch.setattr(f"manipulators.data.{broken[place]}", full)
    with pytest.raises(DiskFullError, match=r"The disk mounted at /.* is full with .*d could not be written"):
        {"frame": lambda: writer.add_frame(frame(2), "push"), "episode": writer.end_episode, "close": writer.close}[
            place
        ]()
    assert not list(tmp_path.glob("d*"))
    with pytest.raises(RecordingError, match="closed"):
        writer.end_episode()


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "denied")

    with pytest.raises(PermissionError), LeRobotWriter(tmp_path / "d", 10, FEATURES) as writer:
        monkeypatch.setattr("manipulators.data.recording.episode.Episode.add", denied)
        writer.add_frame(frame(0), task="push")
