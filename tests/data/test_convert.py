import json

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from manipulators.cli import main
from manipulators.data.convert import convert_dataset
from manipulators.data.dataset import LeRobotDataset
from manipulators.errors import DatasetFormatError, DiskFullError, OutputExistsError, VideoError

from .conftest import assert_same_samples, edit_json, edit_rows, record_v2

CAMERA = "observation.images.top"


def encode(path, levels, fps=10, **options):
    """Write a video whose frames are reordered, as most encoders do by default."""
    noise = np.random.default_rng(0).integers(0, 40, (64, 64, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": "12", "bf": "2", **options})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for level in levels:
            picture = np.roll(level + noise, level, axis=1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def videos_of(root):
    return [root / f"videos/chunk-000/{CAMERA}/episode_{number:06d}.mp4" for number in range(2)]


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_samples_stay_what_they_are(tmp_path, tiny, version):
    old = record_v2(tmp_path / "old", version)
    assert convert_dataset(old, tmp_path / "new", progress=False) == tmp_path / "new"
    windows = {"action_horizon": 4, "n_obs_steps": 2}
    new = LeRobotDataset(tmp_path / "new", **windows)
    assert_same_samples(LeRobotDataset(old, **windows), new)
    assert len(list(new.root.rglob("*.mp4"))) == 1 and len(list(new.root.glob("data/*/*"))) == 1

    statistics, recorded = new.statistics, LeRobotDataset(tiny).statistics
    assert statistics["action"]["q90"] == recorded["action"]["q90"]
    for name, values in statistics.items():
        assert values.keys() == recorded[name].keys()
        if name != CAMERA:
            assert all(np.array_equal(value, recorded[name][key]) for key, value in values.items())
    # Those of a camera are of the frames as they are decoded, after lossy encoding.
    frames = np.stack([sample[CAMERA] for sample in LeRobotDataset(old)]) / 255
    np.testing.assert_allclose(statistics[CAMERA]["mean"].ravel(), frames.mean(axis=(0, 2, 3)), atol=1e-6)
    expected = np.quantile(frames, 0.9, axis=(0, 2, 3))
    np.testing.assert_allclose(statistics[CAMERA]["q90"].ravel(), expected, atol=1e-6)


def test_layout(tmp_path):
    convert_dataset(record_v2(tmp_path / "old", "v2.1"), tmp_path / "new", progress=False)
    info = json.loads((tmp_path / "new/meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["robot_type"] == "tiny" and info["fps"] == 10
    assert [info[f"total_{name}"] for name in ("episodes", "frames", "tasks")] == [2, 7, 2]
    rows = pq.read_table(tmp_path / "new/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert rows[1]["tasks"] == ["pull"] and rows[1]["stats/action/q50"] == [45.0]
    assert [rows[1][f"videos/{CAMERA}/{key}_timestamp"] for key in ("from", "to")] == [0.3, 0.7]


def test_version_3_without_quantiles(tiny, tmp_path):
    statistics = json.loads((tiny / "meta/stats.json").read_text())
    kept = {name: {"mean": values["mean"], "std": values["std"]} for name, values in statistics.items()}
    (tiny / "meta/stats.json").write_text(json.dumps(kept))
    convert_dataset(tiny, tmp_path / "new", progress=False)
    assert_same_samples(LeRobotDataset(tiny), LeRobotDataset(tmp_path / "new"))
    assert LeRobotDataset(tmp_path / "new").statistics["action"]["q50"].tolist() == [30.0]


def test_reordered_frames_and_longer_videos(tmp_path):
    """Videos hold 5 frames for episodes of 3 and 4."""
    old = record_v2(tmp_path / "old", "v2.1")
    for video, level in zip(videos_of(old), (10, 60), strict=True):
        encode(video, range(level, level + 50, 10))
    convert_dataset(old, tmp_path / "new", progress=False)
    assert_same_samples(LeRobotDataset(old), LeRobotDataset(tmp_path / "new"))
    assert len(list((tmp_path / "new").rglob("*.mp4"))) == 1


def test_videos_with_other_settings_begin_a_new_file(tmp_path):
    old = record_v2(tmp_path / "old", "v2.1")
    encode(videos_of(old)[1], range(20, 60, 10), bf="0", profile="baseline")
    convert_dataset(old, tmp_path / "new", progress=False)
    assert_same_samples(LeRobotDataset(old), LeRobotDataset(tmp_path / "new"))
    assert sorted(path.name for path in (tmp_path / "new").rglob("*.mp4")) == ["file-000.mp4", "file-001.mp4"]


def test_images_in_parquet(tmp_path):
    old = record_v2(tmp_path / "old", "v2.1", use_videos=False)
    convert_dataset(old, tmp_path / "new", progress=False)
    new = LeRobotDataset(tmp_path / "new")
    assert_same_samples(LeRobotDataset(old), new)
    assert new.statistics[CAMERA]["max"].ravel().tolist() == [np.float32(120 / 255)] * 3


def test_an_existing_output_is_left_alone(tmp_path, tiny):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/kept").write_text("")
    with pytest.raises(OutputExistsError):
        convert_dataset(tiny, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


def test_damaged_sources_leave_nothing(tmp_path):
    old = record_v2(tmp_path / "old", "v2.1")
    encode(videos_of(old)[1], (10, 20))
    with pytest.raises(VideoError, match=r"episode_000001\.mp4 holds 2 frames; its episodes need 4"):
        convert_dataset(old, tmp_path / "new", progress=False)
    videos_of(old)[1].write_bytes(videos_of(old)[1].read_bytes()[:300])
    with pytest.raises(VideoError, match=r"episode_000001\.mp4 cannot be copied"):
        convert_dataset(old, tmp_path / "new", progress=False)

    def broken(rows):
        rows[2]["action"] = float("nan")
        return rows

    edit_rows(old / "data/chunk-000/episode_000001.parquet", broken)
    with pytest.raises(DatasetFormatError, match="action has NaN or infinity in frame 2 of episode 1"):
        convert_dataset(old, tmp_path / "new", progress=False)
    assert not list(tmp_path.glob("new*"))


def test_a_full_disk_leaves_nothing(tmp_path, tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manipulators.data.layouts.writer._write_json", full)
    with pytest.raises(DiskFullError, match=r"mounted at / .*new could not be written|mounted at /.*new could not"):
        convert_dataset(tiny, tmp_path / "new", progress=False)
    assert not list(tmp_path.glob("new*"))


def test_command(tmp_path, capsys):
    old = record_v2(tmp_path / "old", "v2.0")
    assert main(["convert-dataset", str(old), str(tmp_path / "new")]) == 0
    assert f"{old} written to {tmp_path / 'new'}" in capsys.readouterr().out
    assert len(LeRobotDataset(tmp_path / "new")) == 7
    assert main(["convert-dataset", str(old), str(tmp_path / "new")]) == 1
    assert "OutputExistsError" in capsys.readouterr().err
    edit_json(old / "meta/info.json", total_frames=1)
    assert main(["convert-dataset", str(old), str(tmp_path / "other")]) == 1


def test_the_remedies_of_errors_on_the_command_line(tmp_path, capsys):
    old = record_v2(tmp_path / "old", "v2.1")
    edit_rows(
        old / "data/chunk-000/episode_000001.parquet",
        lambda rows: [row | {"timestamp": row["timestamp"] + 0.02 * (row["frame_index"] == 2)} for row in rows],
    )
    command = ["convert-dataset", str(old), str(tmp_path / "new")]
    assert main(command) == 1 and not (tmp_path / "new").exists()
    assert "convert-dataset: --tolerance-s" in capsys.readouterr().err
    assert main([*command, "--episodes", "0", "--features", CAMERA, "action", "--rename-map", f"{CAMERA}=front"]) == 1
    assert "features names 'observation.images.top'" in capsys.readouterr().err  # by its new name
    chosen = ["--episodes", "0", "--features", "observation.images.front", "action"]
    assert main([*command, *chosen, "--rename-map", f"{CAMERA}=observation.images.front"]) == 0
    new = LeRobotDataset(tmp_path / "new")
    assert (list(new.recorded_features), new.num_episodes) == (["observation.images.front", "action"], 1)
    assert main(["convert-dataset", str(old), str(tmp_path / "drifted"), "--tolerance-s", "0.05"]) == 0
    assert len(LeRobotDataset(tmp_path / "drifted", tolerance_s=0.05)[:][CAMERA]) == 7
    assert main([*command, "--rename-map", "front"]) == 1
    assert "write old_name=new_name" in capsys.readouterr().err
