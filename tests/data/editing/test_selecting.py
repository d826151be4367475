import json
import logging

import pyarrow.parquet as pq
import pytest

from manipulators.data.dataset import LeRobotDataset
from manipulators.data.editing.selecting import select_from_dataset, split_dataset
from manipulators.errors import (
    DatasetFormatError,
    DatasetIndexError,
    OutputExistsError,
    UnknownDatasetFeatureError,
    VideoError,
)

from ..conftest import edit_rows
from .conftest import TOP, WRIST, assert_episodes_are, encode_in_long_groups, record_two_cameras


def test_episodes_are_kept_as_they_are(recorded, tmp_path, caplog):
    a, _ = recorded
    select_from_dataset(a, tmp_path / "c", episodes=[3, 1], progress=False)
    new = assert_episodes_are(tmp_path / "c", (a, 1), (a, 3))
    assert new.tasks == ["pull"]
    rows = pq.read_table(tmp_path / "c/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row[f"videos/{TOP}/{side}_timestamp"] for row in rows for side in ("from", "to")] == [0.0, 0.4, 0.4, 0.9]
    # Only the packets of the episodes are copied, and a removal keeps the others.
    assert (tmp_path / f"c/videos/{TOP}/chunk-000/file-000.mp4").stat().st_size < 0.75 * (
        a / f"videos/{TOP}/chunk-000/file-000.mp4"
    ).stat().st_size
    assert not caplog.records
    select_from_dataset(tmp_path / "c", tmp_path / "d", remove_episodes=[0], drop=[TOP, "action"], progress=False)
    assert_episodes_are(tmp_path / "d", (a, 3))
    assert list(LeRobotDataset(tmp_path / "d").recorded_features) == [WRIST, "observation.state"]
    assert not (tmp_path / "d/videos" / TOP).exists()


def test_long_groups_of_reordered_frames(tmp_path, caplog):
    """No episode but the first begins with a keyframe, and frames refer to some behind the end of an episode."""
    a = record_two_cameras(tmp_path / "a", (7, 8, 9, 10, 11, 12))
    for camera, height, width in ((TOP, 32, 48), (WRIST, 64, 64)):
        encode_in_long_groups(a / f"videos/{camera}/chunk-000/file-000.mp4", 57, height, width)
    with caplog.at_level(logging.WARNING):
        select_from_dataset(a, tmp_path / "c", episodes=[1, 2, 4, 5], progress=False)
    assert_episodes_are(tmp_path / "c", (a, 1), (a, 2), (a, 4), (a, 5))
    [top, _] = [record.getMessage() for record in caplog.records]
    assert top.startswith(f"{TOP}: 41 frames of episodes that are left out stay in the files")  # 7 + 34
    # The last episode holds a keyframe: cut again, what is in front of it goes.
    select_from_dataset(tmp_path / "c", tmp_path / "d", episodes=[0, 3], progress=False)
    assert_episodes_are(tmp_path / "d", (a, 1), (a, 5))
    select_from_dataset(a, tmp_path / "e", progress=False)
    assert_episodes_are(tmp_path / "e", *((a, n) for n in range(6)))


def test_deleted_numbers_and_new_names(recorded, tmp_path):
    a, _ = recorded
    select_from_dataset(a, tmp_path / "c", rename_map={"observation.state": "observation.joints"}, progress=False)
    old, new = LeRobotDataset(a), LeRobotDataset(tmp_path / "c")
    assert new[4]["observation.joints"].equal(old[4]["observation.state"])
    assert new.statistics["observation.joints"]["q10"].tolist() == old.statistics["observation.state"]["q10"].tolist()
    # Episode 1 is left out of the metadata and of the data, and numbers stay.
    root = record_two_cameras(tmp_path / "gap", (2, 2, 2), data_files_size_in_mb=1e-6)
    episodes = root / "meta/episodes/chunk-000/file-000.parquet"
    edit_rows(
        episodes,
        lambda rows: [
            row | {"dataset_from_index": 2 * i, "dataset_to_index": 2 * i + 2}
            for i, row in enumerate([rows[0], rows[2]])
        ],
    )
    (root / "data/chunk-000/file-001.parquet").unlink()
    info = json.loads((root / "meta/info.json").read_text()) | {"total_episodes": 2, "total_frames": 4}
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetIndexError, match=r"only episodes 0 … 2, 2 of them; there is no 1"):
        select_from_dataset(root, tmp_path / "d", episodes=[1], progress=False)
    select_from_dataset(root, tmp_path / "d", episodes=[2], progress=False)
    assert_episodes_are(tmp_path / "d", (root, 2))


def test_refused(recorded, tmp_path):
    a, _ = recorded
    with pytest.raises(DatasetIndexError, match="only episodes 0 … 3; there is no 4"):
        select_from_dataset(a, tmp_path / "c", episodes=[1, 4])
    with pytest.raises(DatasetIndexError, match=r"No episode of .* is left: .* It has 0-3"):
        select_from_dataset(a, tmp_path / "c", episodes=[1], remove_episodes=[1, 2])
    with pytest.raises(DatasetIndexError, match="at least one episode"):
        select_from_dataset(a, tmp_path / "c", episodes=[])
    with pytest.raises(UnknownDatasetFeatureError, match="Did you mean 'action'"):
        select_from_dataset(a, tmp_path / "c", features=["actions"])
    with pytest.raises(UnknownDatasetFeatureError, match="No feature of"):
        select_from_dataset(a, tmp_path / "c", features=["index"])
    with pytest.raises(OutputExistsError, match="the source itself"):
        select_from_dataset(a, a, episodes=[0])
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite(tmp_path):
    a = record_two_cameras(tmp_path / "a", (2, 3))

    def broken(rows):
        rows[3]["action"] = [float("nan"), 0.0]
        return rows

    edit_rows(a / "data/chunk-000/file-000.parquet", broken)
    with pytest.raises(DatasetFormatError, match="action has NaN or infinity in frame 1 of episode 1"):
        select_from_dataset(a, tmp_path / "c", progress=False)
    select_from_dataset(a, tmp_path / "c", episodes=[0], progress=False)
    select_from_dataset(a, tmp_path / "d", drop=["action"], progress=False)
    assert_episodes_are(tmp_path / "c", (a, 0))
    # A frame that only looks as if it were there.
    (a / f"videos/{TOP}/chunk-000/file-000.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="cannot be copied"):
        select_from_dataset(a, tmp_path / "e", episodes=[0], progress=False)
    assert not (tmp_path / "e").exists()


def test_split_by_fractions_and_by_numbers(recorded, tmp_path):
    a, _ = recorded
    folders = split_dataset(a, tmp_path / "s", fractions={"train": 0.7, "val": 0.3}, seed=3, progress=False)
    assert folders == {name: tmp_path / "s" / name for name in ("train", "val")}
    listed = {
        name: json.loads((folder / "meta/origin.json").read_text())["sources"][0]["episodes"]
        for name, folder in folders.items()
    }
    assert listed == {"train": "1-3", "val": "0"}
    assert_episodes_are(folders["train"], (a, 1), (a, 2), (a, 3))
    assert_episodes_are(folders["val"], (a, 0))
    again = split_dataset(a, tmp_path / "again", fractions={"train": 0.7, "val": 0.3}, seed=3, progress=False)
    files = {path.relative_to(tmp_path / "s"): path.read_bytes() for path in (tmp_path / "s").rglob("*.parquet")}
    assert files and all((tmp_path / "again" / name).read_bytes() == content for name, content in files.items())
    assert again.keys() == folders.keys()
    split_dataset(a, tmp_path / "n", episodes={"train": [2, 0], "test": [3]}, progress=False)
    assert_episodes_are(tmp_path / "n/train", (a, 0), (a, 2))
    assert_episodes_are(tmp_path / "n/test", (a, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either fractions"),
        ({"fractions": {"a": 1.0}, "episodes": {"a": [0]}}, "either fractions"),
        ({"fractions": {"a": 0.9, "b": 0.2}}, "1 in sum; got a=0.9, b=0.2, in sum 1.1"),
        ({"fractions": {"a": 1.2, "b": -0.2}}, "must be positive"),
        ({"fractions": {"train": 0.95, "val": 0.05}}, "leaves val without an episode: there are 4"),
        ({"fractions": {"a/b": 1.0}}, "cannot be called 'a/b'"),
        ({"episodes": {"a": [0, 1], "b": [1]}}, "Episode 1 is in a and in b"),
        ({"episodes": {"a": [0], "b": []}}, "at least one episode"),
        ({"episodes": {"a": [9]}}, "only episodes 0 … 3; there is no 9"),
    ],
)
def test_splits_that_are_refused(recorded, tmp_path, arguments, message):
    with pytest.raises(DatasetIndexError, match=message):
        split_dataset(recorded[0], tmp_path / "s", progress=False, **arguments)
    assert not (tmp_path / "s").exists()
