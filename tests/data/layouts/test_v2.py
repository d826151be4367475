import json

import numpy as np
import pytest

from manipulators.configuration.normalization import Part
from manipulators.data.dataset import LeRobotDataset
from manipulators.errors import DatasetFormatError, DatasetNotFoundError, MissingStatisticsError, MissingVideoError
from manipulators.processing.normalization import Normalizer

from ..conftest import assert_same_samples, edit_json, record, record_v2, write_lines

VERSIONS = ["v2.0", "v2.1"]


@pytest.mark.parametrize("version", VERSIONS)
def test_samples_are_those_of_version_3(tmp_path, tiny, version):
    windows = {"action_horizon": 4, "n_obs_steps": 2}
    old = LeRobotDataset(record_v2(tmp_path / "old", version), **windows)
    assert_same_samples(old, LeRobotDataset(tiny, **windows))
    assert old.tasks == ["push", "pull"] and old.episode_lengths == [3, 4] and old.robot_type == "tiny"
    assert len(LeRobotDataset(old.root, episodes=[1], features=["action"])) == 4


@pytest.mark.parametrize("version", VERSIONS)
def test_statistics_have_no_quantiles(tmp_path, tiny, version):
    found = LeRobotDataset(record_v2(tmp_path / "old", version)).statistics
    exact = LeRobotDataset(tiny).statistics
    assert found.keys() == exact.keys()
    for name, values in found.items():
        assert sorted(values) == ["count", "max", "mean", "min", "std"]
        for key, value in values.items():
            assert value.dtype == np.float32 and value.shape == exact[name][key].shape
            np.testing.assert_allclose(value, exact[name][key], rtol=2e-6, atol=1e-7)
    with pytest.raises(MissingStatisticsError, match="q01 and q99"):
        Normalizer("action", [Part("action", 1, "QUANTILES")], found["action"])


def test_chunks_hold_as_many_episodes_as_info_says(tmp_path):
    root = record_v2(tmp_path / "old", "v2.1")
    edit_json(root / "meta/info.json", chunks_size=1)
    for folder, file in (("data", "episode_000001.parquet"), ("videos", "observation.images.top/episode_000001.mp4")):
        target = root / folder / "chunk-001" / file
        target.parent.mkdir(parents=True)
        (root / folder / "chunk-000" / file).rename(target)
    assert LeRobotDataset(root)[6]["action"].tolist() == [[60.0]]


def test_instructions_may_hold_any_line_separator(tmp_path):
    root = record_v2(tmp_path / "old", "v2.1")
    lines = [{"task_index": 0, "task": "push\u2028it"}, {"task_index": 1, "task": "pull"}]
    (root / "meta/tasks.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert LeRobotDataset(root)[0]["task"] == "push\u2028it"


def test_many_files_stay_mapped(tmp_path):
    dataset = LeRobotDataset(record_v2(tmp_path / "old", "v2.0", lengths=(2,) * 9), features=["action"])
    assert [item["action"].item() for item in dataset] == [10.0 * number for number in range(18)]
    assert all(path.suffix == ".arrow" for path in dataset._table.cache_files)


@pytest.mark.parametrize("name", ["tasks.jsonl", "episodes.jsonl"])
def test_missing_files(tmp_path, name):
    root = record_v2(tmp_path / "old", "v2.1")
    (root / "meta" / name).unlink()
    with pytest.raises(DatasetNotFoundError, match=name):
        LeRobotDataset(root)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tasks.jsonl", '{"task_index": 0', "Line 1 of .*tasks.jsonl: it is not valid JSON"),
        ("tasks.jsonl", '{"task_index": 0}', "must be an object with task_index, task"),
        ("episodes.jsonl", '{"episode_index": 0, "length": "3"}', "its length has another type"),
        ("episodes.jsonl", '{"episode_index": 1, "length": 3}', "total_episodes = 2, but"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 3}\n' * 2, "2 lines for 1 episodes"),
        ("episodes.jsonl", '{"episode_index": 0, "length": -3}', "not negative; it has {'episode_index': 0"),
        ("episodes.jsonl", "", "it has 0 lines"),
    ],
)
def test_broken_lines(tmp_path, name, text, message):
    root = record_v2(tmp_path / "old", "v2.1")
    (root / "meta" / name).write_text(text)
    with pytest.raises(DatasetFormatError, match=message):
        LeRobotDataset(root)


def test_broken_statistics(tmp_path):
    root = record_v2(tmp_path / "old", "v2.1")
    path = root / "meta/episodes_stats.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [rows[0], rows[1] | {"stats": {}}])
    with pytest.raises(DatasetFormatError, match=r"statistics of .*: some episodes have none.*convert-dataset"):
        LeRobotDataset(root).statistics
    write_lines(path, rows[1:])
    with pytest.raises(DatasetFormatError, match=r"episodes_stats\.jsonl lacks 1 episode\(s\), the first of them 0\."):
        LeRobotDataset(root).statistics
    rows[1]["stats"]["action"]["mean"] = [[1.0, 2.0]]
    write_lines(path, rows)
    with pytest.raises(DatasetFormatError, match="statistics of action of another shape"):
        LeRobotDataset(root).statistics


def test_a_path_that_cannot_be_filled_in(tmp_path):
    root = record_v2(tmp_path / "old", "v2.1")
    edit_json(root / "meta/info.json", data_path="data/{chunk}.parquet")
    with pytest.raises(
        DatasetFormatError,
        match=r"data_path 'data/{chunk}\.parquet', in which {chunk} cannot be filled in. Known: {ep",
    ):
        LeRobotDataset(root)


def test_names_of_version_3_need_no_paths_in_info(tmp_path):
    root = record(tmp_path / "new")
    edit_json(root / "meta/info.json", data_path=None, video_path=None)
    assert len(LeRobotDataset(root)) == 7


def test_whole_folders_are_fetched_from_the_hub_and_of_some_episodes_only_their_files(tmp_path, monkeypatch):
    root, calls = record_v2(tmp_path / "old", "v2.1"), []

    def download(*_, revision, allow_patterns, **__):
        calls.append((revision, allow_patterns))
        return str(root)

    monkeypatch.setattr("manipulators.data.source.snapshot_download", download)
    for episodes in (None, [1]):
        kept = root / "videos/chunk-000/observation.images.top/episode_000001.mp4"
        kept.rename(tmp_path / "hidden")
        with pytest.raises(MissingVideoError, match=r"episode_000001\.mp4"):
            LeRobotDataset("org/name", episodes=episodes)
        (tmp_path / "hidden").rename(kept)
    top = "videos/chunk-000/observation.images.top"
    assert calls[1] == ("old", ["data/chunk-000/*", f"{top}/*"])
    assert calls[3] == ("old", ["data/chunk-000/episode_000001.parquet", f"{top}/episode_000001.mp4"])
