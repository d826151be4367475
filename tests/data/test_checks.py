import logging

import numpy as np
import pytest

from manipulators.data.dataset import LeRobotDataset
from manipulators.errors import DatasetFormatError, DatasetNotFoundError

from .conftest import edit_json, edit_rows, record_v2, write_lines

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture
def old(tmp_path):
    return record_v2(tmp_path / "old", "v2.1")


def renumbered(first):
    """Return a change that gives the last row another episode."""
    return lambda rows: [*rows[:-1], rows[-1] | {"episode_index": first}]


def with_nan(number, name, value):
    def change(rows):
        rows[number][name] = value
        return rows

    return change


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: [*rows, rows[-1]]], ids=["fewer", "more"])
def test_rows_that_were_not_announced(tiny, old, change):
    edit_rows(tiny / DATA, change)
    with pytest.raises(DatasetFormatError, match=r"file-000\.parquet has [68] for episode\(s\) 0 … 1, expected 7"):
        LeRobotDataset(tiny)
    edit_rows(old / "data/chunk-000/episode_000001.parquet", change)
    with pytest.raises(DatasetFormatError, match=r"episode_000001\.parquet has [35] for episode\(s\) 1, expected 4"):
        LeRobotDataset(old)


def test_an_episode_without_data(tiny, old):
    edit_rows(tiny / DATA, renumbered(2))
    with pytest.raises(DatasetFormatError, match=r"Episode 1 .* has episode_index 1 … 2 there"):
        LeRobotDataset(tiny)
    (old / "data/chunk-000/episode_000001.parquet").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"episode_000001\.parquet"):
        LeRobotDataset(old)


def test_lengths_that_only_fit_in_sum(old):
    lengths = [{"episode_index": 0, "length": 4}, {"episode_index": 1, "length": 3}]
    write_lines(old / "meta/episodes.jsonl", lengths)
    with pytest.raises(DatasetFormatError, match=r"Episode 0 .* is not where its metadata says"):
        LeRobotDataset(old)


def test_empty_episodes(old):
    write_lines(old / "meta/episodes.jsonl", [{"episode_index": i, "length": n} for i, n in enumerate((3, 4, 0))])
    with pytest.raises(DatasetFormatError, match=r"Episode 2 of .* has length 0"):
        LeRobotDataset(old)


def test_episodes_that_overlap(tiny):
    edit_rows(tiny / EPISODES, with_nan(1, "dataset_from_index", 2))
    with pytest.raises(DatasetFormatError, match=r"Episode 1 in .* does not follow"):
        LeRobotDataset(tiny)


@pytest.mark.parametrize("name, wrong", [("total_episodes", 3), ("total_frames", 70)])
def test_totals_that_contradict_the_files(tiny, old, name, wrong):
    for root in (tiny, old):
        edit_json(root / "meta/info.json", **{name: wrong})
        with pytest.raises(DatasetFormatError, match=rf"info\.json says {name} = {wrong}, but"):
            LeRobotDataset(root)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fps": None}, "lacks fps"),
        ({"features": None}, "lacks features"),
        ({"fps": 0}, "fps 0"),
        ({"features": []}, r"features \[\]"),
        ({"features": {"action": {"dtype": "float32"}}}, "without dtype or shape"),
    ],
)
def test_info_that_lacks_fields(tiny, change, message):
    edit_json(tiny / "meta/info.json", **change)
    with pytest.raises(DatasetFormatError, match=message):
        LeRobotDataset(tiny)


def test_a_wrong_frame_rate(tiny):
    edit_json(tiny / "meta/info.json", fps=30)
    with pytest.raises(DatasetFormatError, match=r"Episode 0 .* lasts 0\.2 s .* 0\.0666667 s by its 3 frames at 30"):
        LeRobotDataset(tiny)
    assert len(LeRobotDataset(tiny, tolerance_s=1.0)) == 7


def test_timestamps_that_are_not_numbers(tiny):
    edit_rows(tiny / DATA, with_nan(6, "timestamp", float("nan")))
    with pytest.raises(DatasetFormatError, match=r"Episode 1 .* lasts nan s"):
        LeRobotDataset(tiny)


def test_an_unlisted_instruction(tiny):
    edit_rows(tiny / DATA, with_nan(4, "task_index", 7))
    dataset = LeRobotDataset(tiny)
    assert dataset[3]["task"] == "pull"
    with pytest.raises(DatasetFormatError, match=r"Episode 1 .*file-000\.parquet\) has task_index 7.*it has 0, 1"):
        dataset[4]


def test_values_that_are_not_finite(tiny):
    edit_rows(tiny / DATA, with_nan(4, "observation.state", [0.0, float("nan")]))
    dataset = LeRobotDataset(tiny)
    dataset[3]
    with pytest.raises(DatasetFormatError, match=r"observation\.state has NaN or infinity in frame 1 of episode 1"):
        dataset.__getitems__([0, 5, 4])
    assert len(list(LeRobotDataset(tiny, episodes=[0]))) == 3
    assert len(list(LeRobotDataset(tiny, features=["action"]))) == 7


def test_statistics_that_are_not_finite(tiny):
    edit_json(tiny / "meta/stats.json", action={"mean": [float("nan")], "std": [1.0]})
    with pytest.raises(DatasetFormatError, match=r"statistics of action .*: mean is not finite\. .*convert-dataset"):
        LeRobotDataset(tiny).statistics
    edit_rows(tiny / DATA, with_nan(5, "action", np.inf))
    with pytest.raises(DatasetFormatError, match="action has NaN or infinity in frame 2 of episode 1"):
        LeRobotDataset(tiny).statistics


def test_files_that_nothing_refers_to_are_reported(old, caplog):
    edit_json(old / "meta/info.json", total_episodes=1, total_frames=3)
    write_lines(old / "meta/episodes.jsonl", [{"episode_index": 0, "length": 3}])
    with caplog.at_level(logging.WARNING):
        assert len(LeRobotDataset(old)) == 3
    assert "episode_000001.parquet" in caplog.text
