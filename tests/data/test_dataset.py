import json
import pickle

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from manipulators.data.convert import convert_dataset
from manipulators.data.dataset import LeRobotDataset
from manipulators.data.recording.writer import LeRobotWriter
from manipulators.errors import (
    DatasetFormatError,
    DatasetIndexError,
    DatasetNotFoundError,
    DatasetVersionError,
    MissingVideoError,
    TimeWindowError,
    UnknownDatasetFeatureError,
    VideoError,
)

from .conftest import edit_json, edit_rows, record, record_v2, write_lines


def test_sample_at_the_end_of_an_episode_repeats_its_last_action(tiny):
    sample = LeRobotDataset(tiny, action_horizon=4)[1]
    assert sample["action"].tolist() == [[10.0], [20.0], [20.0], [20.0]]
    assert sample["action_is_pad"].tolist() == [False, False, True, True]
    assert sample["observation.state"].tolist() == [1.0, -1.0]
    assert "observation.state_is_pad" not in sample


def test_history_starts_with_the_episode_and_actions_with_the_history(tiny):
    sample = LeRobotDataset(tiny, action_horizon=4, n_obs_steps=2)[3]
    assert sample["observation.state"].tolist() == [[3.0, -3.0], [3.0, -3.0]]
    assert sample["observation.state_is_pad"].tolist() == [True, False]
    assert sample["action"].tolist() == [[30.0], [30.0], [40.0], [50.0]]
    assert sample["action_is_pad"].tolist() == [True, False, False, False]
    assert sample["observation.images.top"].shape == (2, 3, 64, 64)
    assert sample["observation.images.top_is_pad"].tolist() == [True, False]


def test_delta_timestamps_replace_the_counts_for_their_features(tiny):
    windows = {"observation.state": [-0.2, 0.0, 0.1], "observation.images.top": [-0.1]}
    sample = LeRobotDataset(tiny, action_horizon=2, delta_timestamps=windows)[5]
    assert sample["observation.state"][:, 0].tolist() == [3.0, 5.0, 6.0]
    assert sample["action"].tolist() == [[50.0], [60.0]]
    assert sample["observation.images.top"].shape == (3, 64, 64)
    assert abs(float(sample["observation.images.top"].float().mean()) - 80) < 3


def test_last_frames_start_no_sample_but_belong_to_earlier_ones(tiny):
    dataset = LeRobotDataset(tiny, action_horizon=3, drop_n_last_frames=2)
    assert (len(dataset), dataset.num_frames) == (1 + 2, 3 + 4)
    assert [sample["index"].item() for sample in dataset] == [0, 3, 4]
    assert dataset[0]["action"].tolist() == [[0.0], [10.0], [20.0]]
    assert dataset[-1]["index"] == 4
    short = LeRobotDataset(tiny, drop_n_last_frames=3)  # the first episode has 3 frames
    assert [sample["index"].item() for sample in short] == [3]


@pytest.mark.parametrize("drop", [-1, 4])
def test_dropping_every_frame_is_refused(tiny, drop):
    with pytest.raises(DatasetIndexError, match=f"drop_n_last_frames={drop}.*longest episode has 4"):
        LeRobotDataset(tiny, drop_n_last_frames=drop)


def test_types_and_scalars(tiny):
    sample = LeRobotDataset(tiny)[-1]
    assert sample["task"] == "pull"
    assert sample["observation.images.top"].dtype == torch.uint8
    assert abs(float(sample["observation.images.top"].float().mean()) - 120) < 3
    assert sample["action"].dtype == torch.float32
    assert sample["next.reward"].shape == () and sample["next.reward"] == 0.5
    assert sample["timestamp"].shape == () and sample["timestamp"] == np.float32(0.3)
    numbers = [sample[name].item() for name in ("frame_index", "episode_index", "index", "task_index")]
    assert numbers == [3, 1, 6, 1]
    assert sample["index"].dtype == torch.int64


def test_positions(tiny):
    dataset = LeRobotDataset(tiny)
    assert len(dataset) == 7
    assert dataset[-7]["index"] == 0
    assert [item["index"].item() for item in dataset.__getitems__([6, 0, 6])] == [6, 0, 6]
    for position in (7, -8):
        with pytest.raises(DatasetIndexError, match=r"0 … 6"):
            dataset[position]


def test_descriptions(tiny):
    dataset = LeRobotDataset(tiny)
    assert dataset.fps == 10 and dataset.robot_type == "tiny"
    assert dataset.tasks == ["push", "pull"]
    assert dataset.episode_lengths == [3, 4]
    assert (dataset.num_episodes, dataset.num_frames) == (2, 7)
    assert dataset.camera_names == ["observation.images.top"]
    assert dataset.dimension_names["observation.state"] == ["x", "y"]
    assert dataset.dimension_names["next.reward"] is None
    assert dataset.units["observation.state"] == ["m", "m"] and dataset.units["action"] is None
    assert dataset.statistics["observation.state"]["max"].tolist() == [6.0, 0.0]
    assert dataset.statistics["observation.images.top"]["mean"].shape == (3, 1, 1)


def test_grouped_dimension_names(tiny):
    info = json.loads((tiny / "meta/info.json").read_text())
    info["features"]["observation.state"]["names"] = {"motors": ["a", "b"]}
    info["features"]["action"]["names"] = {"grip": 0}
    (tiny / "meta/info.json").write_text(json.dumps(info))
    names = LeRobotDataset(tiny).dimension_names
    assert names["observation.state"] == ["a", "b"] and names["action"] == ["grip"]


def test_a_kept_episode_keeps_its_own_bounds(tiny):
    dataset = LeRobotDataset(tiny, episodes=[1], action_horizon=2, n_obs_steps=2)
    assert (len(dataset), dataset.episodes, dataset.episode_lengths) == (4, [1], [4])
    assert dataset[0]["index"] == 3 and dataset[0]["action"].tolist() == [[30.0], [30.0]]
    assert dataset[3]["action"].tolist() == [[50.0], [60.0]]
    with pytest.raises(DatasetIndexError, match="0 … 1"):
        LeRobotDataset(tiny, episodes=[2])


def test_cameras_that_are_not_kept_need_no_files(tiny):
    (tiny / "videos/observation.images.top/chunk-000/file-000.mp4").unlink()
    dataset = LeRobotDataset(tiny, features=["action"])
    assert sorted(dataset[0]) == [
        "action", "action_is_pad", "episode_index", "frame_index", "index", "task", "task_index", "timestamp",
    ]  # fmt: skip
    assert sorted(dataset.statistics) == [
        "action",
        "episode_index",
        "frame_index",
        "index",
        "task_index",
        "timestamp",
    ]
    with pytest.raises(MissingVideoError, match=r"file-000\.mp4"):
        LeRobotDataset(tiny)


def test_opening_maps_the_numbers_and_opens_no_video(tiny):
    dataset = LeRobotDataset(tiny, action_horizon=2)
    dataset._table.numbers("timestamp", np.array([0]), ())
    before = pa.total_allocated_bytes()
    dataset._table.numbers("observation.state", np.array([0]), (2,))
    view = dataset._table._views["observation.state", 0]
    assert pa.total_allocated_bytes() == before and not view.flags.owndata
    assert [path.suffix for path in dataset._table.cache_files] == [".arrow"]
    assert dataset._reader.open_files == []
    dataset[0]
    assert len(dataset._reader.open_files) == 1
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._reader.open_files == [] and copy[2]["action"].tolist() == [[20.0], [20.0]]


@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])
def test_loader_workers_read_what_the_dataset_reads(tiny, start, workers):
    dataset = LeRobotDataset(tiny, action_horizon=2)
    here = [dataset[index] for index in range(7)]  # leaves a decoder open that a fork must not share
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, multiprocessing_context=start)
    batches = list(loader)
    for name in ("observation.images.top", "action", "action_is_pad", "index"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), torch.stack([s[name] for s in here]))
    assert [task for batch in batches for task in batch["task"]] == ["push"] * 3 + ["pull"] * 4


def test_numbers_across_several_files(tmp_path):
    dataset = LeRobotDataset(record(tmp_path / "many", (2, 2, 2), data_files_size_in_mb=1e-6), action_horizon=2)
    assert len(list(dataset.root.glob("data/*/*.parquet"))) == 3
    items = dataset.__getitems__([5, 0, 3])
    assert [item["observation.state"][0].item() for item in items] == [5.0, 0.0, 3.0]
    assert items[1]["action"].tolist() == [[0.0], [10.0]]


def test_images_in_parquet(tmp_path):
    dataset = LeRobotDataset(record(tmp_path / "png", use_videos=False), n_obs_steps=2)
    images = dataset[4]["observation.images.top"]
    assert images.shape == (2, 3, 64, 64)
    assert images[:, 0, 5, 7].tolist() == [60, 80]


def test_missing_folders_and_files(tiny, tmp_path):
    with pytest.raises(DatasetNotFoundError, match="Hub id"):
        LeRobotDataset(tmp_path / "absent")
    with pytest.raises(DatasetNotFoundError, match=r"no meta/info\.json"):
        LeRobotDataset(tmp_path)
    (tiny / "data/chunk-000/file-000.parquet").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"file-000\.parquet"):
        LeRobotDataset(tiny)


def test_hub_dataset_that_cannot_be_reached(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network.")

    monkeypatch.setattr("manipulators.data.source.snapshot_download", unreachable)
    with pytest.raises(DatasetNotFoundError, match=r"org/name.*revision 'v3\.0'.*no network"):
        LeRobotDataset("org/name", revision="v3.0")


def test_hub_dataset_fetches_only_what_is_needed_from_one_commit(tiny, monkeypatch):
    calls = []

    def download(repo, *, repo_type, revision, allow_patterns):
        calls.append((repo, repo_type, revision, allow_patterns))
        return str(tiny)

    hidden = tiny / "data/chunk-000/file-000.parquet"
    monkeypatch.setattr("manipulators.data.source.snapshot_download", download)
    hidden.rename(tiny / "kept")
    with pytest.raises(DatasetNotFoundError):
        LeRobotDataset("org/name", revision="main", features=["action"])
    assert calls == [
        ("org/name", "dataset", "main", ["meta/**"]),
        ("org/name", "dataset", "tiny", ["data/chunk-000/file-000.parquet"]),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"codebase_version": "v3.0", "fps": 10}'])
def test_broken_info(tiny, text):
    (tiny / "meta/info.json").write_text(text)
    with pytest.raises(DatasetFormatError, match=r"info\.json"):
        LeRobotDataset(tiny)


def test_other_version(tiny):
    info = json.loads((tiny / "meta/info.json").read_text()) | {"codebase_version": "v1.6"}
    (tiny / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetVersionError, match=r"v1\.6.*v2\.1.*v3\.0"):
        LeRobotDataset(tiny)


def test_truncated_files(tiny):
    video = tiny / "videos/observation.images.top/chunk-000/file-000.mp4"
    video.write_bytes(video.read_bytes()[:400])
    with pytest.raises(VideoError, match=r"file-000\.mp4"):
        LeRobotDataset(tiny)[0]
    data = tiny / "data/chunk-000/file-000.parquet"
    data.write_bytes(data.read_bytes()[:400])
    with pytest.raises(DatasetFormatError, match="cannot be read"):
        LeRobotDataset(tiny)


def test_unknown_features_and_bad_windows(tiny):
    with pytest.raises(UnknownDatasetFeatureError, match=r"Did you mean 'observation\.state'"):
        LeRobotDataset(tiny, features=["observation.stat"])
    with pytest.raises(UnknownDatasetFeatureError, match=r"delta_timestamps names 'actions'.*'action'"):
        LeRobotDataset(tiny, delta_timestamps={"actions": [0.0]})
    with pytest.raises(TimeWindowError, match=r"\[0\.05\].*\[0\.0, 0\.0\]"):
        LeRobotDataset(tiny, delta_timestamps={"action": [0.0, 0.05]})
    with pytest.raises(TimeWindowError, match="action_horizon"):
        LeRobotDataset(tiny, action_horizon=0)


def test_a_slice_or_a_list_is_a_batch(tiny):
    dataset = LeRobotDataset(tiny, action_horizon=2)
    batch = next(iter(DataLoader(dataset, 3)))
    for chosen in (dataset[0:3], dataset[-7:-4], dataset[[0, 1, 2]], dataset[np.array([0, 1, -5])]):
        assert chosen.keys() == batch.keys() and chosen["task"] == ["push"] * 3
        assert all(torch.equal(value, batch[name]) for name, value in chosen.items() if name != "task")
    assert dataset[::3]["index"].tolist() == [0, 3, 6] and dataset[5:99]["index"].tolist() == [5, 6]
    empty = dataset[7:]
    assert empty["task"] == [] and empty["action"].shape == (0, 2, 1)


def test_one_sample_by_any_whole_number(tiny):
    dataset = LeRobotDataset(tiny)
    for number in (np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), -2):
        assert dataset[number]["index"].shape == () and dataset[number]["index"] == 5
    for wrong in (1.5, "1", None, [True, False], np.array([0.0])):
        with pytest.raises(DatasetIndexError, match="a whole number, several by a slice or a list"):
            dataset[wrong]
    for outside in ([0, 7], np.int64(-8)):
        with pytest.raises(DatasetIndexError, match=r"0 … 6"):
            dataset[outside]


def test_a_dataset_shows_what_it_holds(tiny):
    lines = repr(LeRobotDataset(tiny, drop_n_last_frames=1)).splitlines()
    assert lines[:2] == [f"LeRobotDataset('{tiny}')", "  2 episodes, 7 frames, 5 samples at 10 Hz, robot tiny"]
    assert "    observation.state       float32  (2,)         x, y" in lines
    assert lines[-1] == "  tasks: 'push', 'pull'"
    page = LeRobotDataset(tiny)._repr_html_()
    assert "<td style='text-align: left'>observation.state</td>" in page and "7 frames" in page
    assert "<script>" not in LeRobotDataset(tiny, rename_map={"next.reward": "<script>"})._repr_html_()


def test_one_step_of_pictures_in_parquet_has_a_time_dimension_as_in_lerobot(tmp_path):
    root = record(tmp_path / "png", use_videos=False)
    dataset = LeRobotDataset(root, delta_timestamps={"observation.images.top": [-0.1]})
    assert dataset[5]["observation.images.top"].shape == (1, 3, 64, 64)
    assert dataset[5]["observation.images.top"].unique().tolist() == [80]


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_episodes_keep_their_numbers_where_others_were_deleted(tmp_path, version):
    root, numbers = tmp_path / "gaps", {0: 1, 1: 4, 2: 1005}
    record(root, (3, 4, 2)) if version == "v3.0" else record_v2(root, version, (3, 4, 2))
    renumber(root, version, numbers)
    dataset = LeRobotDataset(root, action_horizon=2)
    assert (dataset.episodes, dataset.episode_lengths) == ([1, 4, 1005], [3, 4, 2])
    assert [s["episode_index"].item() for s in dataset] == [1] * 3 + [4] * 4 + [1005] * 2
    last = LeRobotDataset(root, episodes=[1005])[1]
    assert last["observation.state"].tolist() == [8, -8] and last["task"] == "push"
    assert abs(float(last["observation.images.top"].float().mean()) - 160) < 3
    with pytest.raises(DatasetIndexError, match=r"only episodes 1 … 1005, 3 of them; there is no 2\."):
        LeRobotDataset(root, episodes=[2])
    new = LeRobotDataset(convert_dataset(root, tmp_path / "new", progress=False))
    assert new.episodes == [0, 1, 2] and new[8]["episode_index"] == 2 and new[8]["index"] == 8
    assert new.statistics["episode_index"]["max"] == 2


def renumber(root, version, numbers):
    """Give the episodes of a dataset other numbers, in metadata, columns and file names."""

    def change(rows):
        return [row | {"episode_index": numbers[row["episode_index"]]} for row in rows]

    for file in root.glob("data/*/*.parquet"):
        edit_rows(file, change)
    if version == "v3.0":
        edit_rows(root / "meta/episodes/chunk-000/file-000.parquet", change)
        return
    for name in ("episodes", "episodes_stats"):
        path = root / f"meta/{name}.jsonl"
        if path.is_file():
            write_lines(path, change([json.loads(line) for line in path.read_text().splitlines()]))
    for file in [*root.glob("data/*/*"), *root.rglob("*.mp4")]:
        number = numbers[int(file.stem.removeprefix("episode_"))]
        folder = file.parent.parent.parent if file.suffix == ".mp4" else file.parent.parent
        rest = file.parent.relative_to(folder).parts[1:]
        new = folder.joinpath(f"chunk-{number // 1000:03d}", *rest, f"episode_{number:06d}{file.suffix}")
        new.parent.mkdir(parents=True, exist_ok=True)
        file.rename(new)


def test_every_frame_of_an_episode_of_more_than_34_minutes_is_exact(tmp_path, monkeypatch):
    """float32 tells times apart by 0.5 ms there, the tolerance is 0.1 ms."""
    frames, fps = 1500, 0.3  # 83 minutes
    with monkeypatch.context() as patch:
        patch.setattr("manipulators.data.statistics.computing.MAX_SIDE", 8)
        root = long_episode(tmp_path / "long", frames, fps)
    dataset = LeRobotDataset(root, features=["observation.images.top"])
    rows = list(range(620, frames, 7))
    grey = dataset[rows]["observation.images.top"].float().mean(dim=(1, 2, 3))
    assert (grey - torch.tensor([row % 12 * 20 for row in rows])).abs().max() < 5
    new = LeRobotDataset(convert_dataset(root, tmp_path / "new", progress=False), features=["observation.images.top"])
    assert new[rows]["observation.images.top"].float().mean(dim=(1, 2, 3)).equal(grey)


def long_episode(root, frames, fps):
    """Record an episode of 16 × 16 pixels whose grey levels tell the frame's number, then slow it down."""
    features = {"observation.images.top": {"dtype": "video", "shape": [16, 16, 3]}}
    with LeRobotWriter(root, 3, features) as writer:
        for number in range(frames):
            picture = np.full((16, 16, 3), number % 12 * 20, dtype=np.uint8)
            writer.add_frame({"observation.images.top": picture}, task="wait")
        writer.end_episode()
    edit_json(root / "meta/info.json", fps=fps)
    edit_rows(
        root / "data/chunk-000/file-000.parquet",
        lambda rows: [row | {"timestamp": float(np.float32(row["frame_index"] / fps))} for row in rows],
    )
    video = root / "videos/observation.images.top/chunk-000/file-000.mp4"
    with av.open(str(video)) as old, av.open(str(tmp := video.with_suffix(".slow.mp4")), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.duration = packet.pts * 10, packet.dts * 10, packet.duration * 10
                packet.stream = stream
                new.mux(packet)
    tmp.replace(video)
    return root


def test_times_in_a_shared_video_are_exact_where_they_were_rounded(tiny):
    """Another writer's float32 is coarser than the tolerance from 34 minutes on; float64 is taken as it is."""
    path = tiny / "meta/episodes/chunk-000/file-000.parquet"
    name = "videos/observation.images.top/from_timestamp"
    table = pq.read_table(path)
    for kind, expected in ((pa.float32(), 2400.7), (pa.float64(), float(np.float32(2400.7)))):
        column = pa.array([float(np.float32(2400.7))] * 2, pa.float64()).cast(kind)
        pq.write_table(table.set_column(table.column_names.index(name), name, column), path)
        places = LeRobotDataset(tiny)._metadata.videos["observation.images.top"]
        assert places.from_timestamp.tolist() == [expected] * 2
