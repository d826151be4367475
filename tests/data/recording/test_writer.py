import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from manipulators.data.dataset import LeRobotDataset
from manipulators.data.recording.writer import LeRobotWriter
from manipulators.errors import (
    DatasetFormatError,
    DifferentRecordingError,
    DiskFullError,
    FolderInUseError,
    InvalidFrameError,
    OutputExistsError,
    RecordingError,
    VideoError,
)

from ..conftest import FEATURES, frame, record

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


def same_files(one, other):
    files = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in (one, other)]
    assert files[0] == files[1] and files[0]


def add(writer, numbers, task="push"):
    for number in numbers:
        writer.add_frame(frame(number), task=task)
    writer.end_episode()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_stopped_recording_goes_on_to_the_same_bytes(tmp_path, caplog, error):
    undisturbed = record(tmp_path / "undisturbed", (3, 4, 2))
    with pytest.raises(error) as caught, LeRobotWriter(tmp_path / "d", 10, FEATURES, "tiny") as writer:
        add(writer, range(3))
        add(writer, range(3, 7), "pull")
        writer.add_frame(frame(9), task="not finished")
        assert (tmp_path / "d.recording").is_dir() and not (tmp_path / "d").exists()
        raise error
    [note] = caught.value.__notes__
    assert re.search(r"2 finished episodes are kept in .*d\.recording: the same recording goes on after them", note)
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(RecordingError, match="closed"):
        writer.add_frame(frame(3), task="push")
    with pytest.raises(RecordingError, match=r"d is not finished: 2 episodes wait in .*d\.recording\. Go on"):
        LeRobotDataset(tmp_path / "d")
    with LeRobotWriter(tmp_path / "d", 10, FEATURES, "tiny") as writer:
        assert writer.num_episodes == 2 and [episode.length for episode in writer.episodes] == [3, 4]
        add(writer, range(7, 9))
    assert "goes on after its 2 finished episodes" in caplog.text
    same_files(tmp_path / "d", undisturbed)
    assert not list(tmp_path.glob("*.recording"))


DYING = """
import json, os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
from conftest import FEATURES, frame
from manipulators.data.recording.writer import LeRobotWriter

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(name):
    replace = os.replace
    def fatal(source, target):
        die() if str(target).endswith(name) else replace(source, target)
    os.replace = fatal

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

MOMENTS = {
    "in an episode": die,
    "before it is kept": lambda: before("episode-000001"),
    "before the dataset": lambda: before("/dataset"),
    "limit": limit,
}
statuses = {}
for name, moment in MOMENTS.items():
    child = os.fork()
    if not child:
        root = os.path.join(sys.argv[2], name, "dataset")
        with LeRobotWriter(root, 10, FEATURES, "tiny", use_videos=False) as writer:
            for number in range(7):
                writer.add_frame(frame(number), task="push" if number < 3 else "pull")
                if number == 2:
                    writer.end_episode()
                if number == 3:
                    moment()
            writer.end_episode()
        os._exit(0)
    statuses[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""


def test_a_recording_that_dies_keeps_what_was_finished(tmp_path):
    """Killed at several moments, and refused by the system itself, which limits the size of files."""
    command = [sys.executable, "-c", DYING, str(Path(__file__).parents[1]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "in an episode": -9,
        "before it is kept": -9,
        "before the dataset": -9,
        "limit": 1,
    }
    assert "DiskError" in done.stderr and "ulimit -f" in done.stderr and "1 finished episode is kept" in done.stderr
    undisturbed = record(tmp_path / "undisturbed", (3, 4), use_videos=False)
    for name in ("in an episode", "before it is kept", "before the dataset", "limit"):
        with LeRobotWriter(tmp_path / name / "dataset", 10, FEATURES, "tiny", use_videos=False) as writer:
            assert writer.num_episodes == (2 if name == "before the dataset" else 1)
            if writer.num_episodes == 1:
                add(writer, range(3, 7), "pull")
        same_files(tmp_path / name / "dataset", undisturbed)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["dataset"]


def test_what_a_kill_after_the_last_rename_leaves_is_cleared(tmp_path, monkeypatch):
    writer = LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY)
    writer.add_frame({"action": [0, 1]}, task="push")
    writer.end_episode()
    monkeypatch.setattr("manipulators.data.recording.kept.KeptEpisodes.remove", lambda self: None)
    writer.close()
    monkeypatch.undo()
    assert (tmp_path / "d.recording" / "episode-000000").is_dir()
    (tmp_path / "d").rename(tmp_path / "moved")
    with LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY) as writer:
        assert writer.num_episodes == 0  # that episode is in the finished dataset
        writer.add_frame({"action": [0, 1]}, task="push")
        writer.end_episode()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fps": 20}, "fps is 10 there and 20 here"),
        ({"robot_type": "aloha"}, "robot_type is absent there and aloha here"),
        (
            {"features": {"action": {"dtype": "float32", "shape": [3]}}},
            r"features action shape is \[2\] there and \[3\]",
        ),
        ({"codec": "av1"}, "codec is h264 there and av1"),
        ({"origin": {"environment": "line/left"}}, "origin environment is line/right there and line/left"),
    ],
)
def test_another_recording_does_not_go_on(tmp_path, changed, message):
    settings = {"fps": 10, "features": ACTION_ONLY, "origin": {"environment": "line/right"}}
    writer = LeRobotWriter(tmp_path / "d", **settings)
    writer.add_frame({"action": [0, 1]}, task="push")
    writer.end_episode()
    writer.stop()
    with pytest.raises(
        DifferentRecordingError, match=rf"d\.recording holds 1 finished episodes of .*{message}.*rm -r"
    ):
        LeRobotWriter(tmp_path / "d", **settings | changed)
    LeRobotWriter(tmp_path / "d", **settings).close()
    assert len(LeRobotDataset(tmp_path / "d")) == 1


def test_a_recording_without_a_finished_episode_may_be_another(tmp_path):
    LeRobotWriter(tmp_path / "d", 10, FEATURES).add_frame(frame(0), task="push")  # forgotten, as by a kill
    with LeRobotWriter(tmp_path / "d", 20, ACTION_ONLY) as writer:
        writer.add_frame({"action": [0, 1]}, task="push")
        writer.end_episode()
    assert LeRobotDataset(tmp_path / "d").fps == 20


def test_two_writers_do_not_share_a_folder(tmp_path):
    with LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY) as writer:
        with pytest.raises(FolderInUseError, match="d is in use by a recording"):
            LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY)
        writer.add_frame({"action": [0, 1]}, task="push")
        writer.end_episode()
    assert len(LeRobotDataset(tmp_path / "d")) == 1


def test_aborting_removes_finished_episodes_too(tmp_path):
    writer = LeRobotWriter(tmp_path / "d", 10, FEATURES)
    add(writer, range(2))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "d.recording").mkdir()
    (tmp_path / "d.recording" / "thesis.tex").write_text("")
    with pytest.raises(OutputExistsError):
        LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY)
    assert [path.name for path in tmp_path.iterdir()] == ["d.recording"]


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
    assert not list(tmp_path.iterdir())


def test_video_settings_are_checked_before_recording(tmp_path):
    camera = {"observation.images.top": {"dtype": "video", "shape": [63, 64, 3]}}
    with pytest.raises(VideoError, match="even sides"):
        LeRobotWriter(tmp_path / "d", 10, camera)
    with pytest.raises(VideoError, match="no codec"):
        LeRobotWriter(tmp_path / "d", 10, ACTION_ONLY, codec="vp9")
    with pytest.raises(DatasetFormatError, match="fps"):
        LeRobotWriter(tmp_path / "d", 0, ACTION_ONLY)


@pytest.mark.parametrize("place", ["frame", "episode", "record", "close", "publish"])
def test_a_full_disk_loses_only_the_episode_that_is_not_finished(tmp_path, monkeypatch, place):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    writer = LeRobotWriter(tmp_path / "d", 10, FEATURES)
    add(writer, range(1))
    writer.add_frame(frame(1), task="push")
    broken = {
        "frame": "recording.episode.Episode.add",
        "episode": "recording.kept.pq.write_table",
        "record": "recording.kept.replace_folder",
        "close": "layouts.writer._write_json",
        "publish": "recording.kept.replace_folder",
    }
    act = {"frame": lambda: writer.add_frame(frame(2), "push"), "episode": writer.end_episode}
    act |= {"record": writer.end_episode, "close": writer.close, "publish": writer.close}
    with monkeypatch.context() as patch:
        patch.setattr(f"manipulators.data.{broken[place]}", full)
        with pytest.raises(DiskFullError, match=r"mounted at /.* is full .*d could not .* 1 finished episode is kept"):
            act[place]()
    assert sorted(path.name for path in (tmp_path / "d.recording").iterdir() if path.name != "published") == [
        "episode-000000",
        "recording.json",
    ]
    add(writer, range(1, 3))  # there is space again
    writer.close()
    assert LeRobotDataset(tmp_path / "d").episode_lengths == [1, 2]


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "denied")

    with pytest.raises(PermissionError), LeRobotWriter(tmp_path / "d", 10, FEATURES) as writer:
        monkeypatch.setattr("manipulators.data.recording.episode.Episode.add", denied)
        writer.add_frame(frame(0), task="push")
