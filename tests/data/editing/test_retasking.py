import json
import os
import shutil

import pyarrow.parquet as pq
import pytest

from manipulators._lock import locked
from manipulators.data.dataset import LeRobotDataset
from manipulators.data.editing.retasking import retask_dataset
from manipulators.errors import DatasetIndexError, DiskFullError, FolderInUseError, OutputExistsError, UnknownTaskError

from ..conftest import edit_rows
from .conftest import RENUMBERED, TOP, assert_episodes_are, record_two_cameras


@pytest.fixture
def copied(recorded, tmp_path):
    """A copy of the first dataset, which may be changed."""
    return shutil.copytree(recorded[0], tmp_path / "copied")


def content_of(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def tasks_of(root):
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    return [row["tasks"] for row in rows], [row["stats/task_index/mean"] for row in rows]


def test_in_place(recorded, copied):
    a, _ = recorded
    (copied / "notes.txt").write_text("mine")
    before = content_of(copied)
    video = copied / f"videos/{TOP}/chunk-000/file-000.mp4"
    place = video.stat().st_ino
    assert retask_dataset(copied, task="lift the cube", episodes=[1, 2], progress=False) == copied
    new = assert_episodes_are(copied, *((a, n) for n in range(4)), renumbered={*RENUMBERED, "task"})
    assert new.tasks == ["push", "lift the cube", "pull"]
    assert tasks_of(copied) == (
        [["push"], ["lift the cube"], ["lift the cube"], ["pull"]],
        [[0.0], [1.0], [1.0], [2.0]],
    )
    assert [new[row]["task"] for row in (0, 3, 8, 9)] == ["push", "lift the cube", "lift the cube", "pull"]
    assert json.loads((copied / "meta/info.json").read_text())["total_tasks"] == 3
    assert new.statistics["task_index"]["max"] == [2.0]
    after = content_of(copied)
    changed = {str(path) for path in after if after[path] != before[path]}
    assert changed == {
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
    }
    assert video.stat().st_ino == place  # not even copied
    # Back again: the same dataset, but for the order of the tasks.
    retask_dataset(copied, tasks={"lift the cube": "pull"}, episodes=[1], progress=False)
    retask_dataset(copied, tasks={"lift the cube": "push"}, progress=False)
    assert_episodes_are(copied, *((a, n) for n in range(4)))
    assert LeRobotDataset(copied).tasks == ["push", "pull"]


def test_into_a_copy(recorded, tmp_path):
    a, _ = recorded
    before = content_of(a)
    retask_dataset(a, tmp_path / "c", tasks={"push": "pull", "pull": "push"}, progress=False)
    new = assert_episodes_are(tmp_path / "c", *((a, n) for n in range(4)), renumbered={*RENUMBERED, "task"})
    assert [new[row]["task"] for row in (0, 3, 7)] == ["pull", "push", "pull"] and content_of(a) == before
    video = tmp_path / f"c/videos/{TOP}/chunk-000/file-000.mp4"
    assert video.stat().st_nlink == 1  # a change of one dataset must not reach the other
    assert json.loads((tmp_path / "c/meta/origin.json").read_text())["sources"][0]["source"] == "a"
    with pytest.raises(OutputExistsError):
        retask_dataset(a, tmp_path / "c", task="push")


def test_several_instructions_in_an_episode(tmp_path):
    a = record_two_cameras(tmp_path / "a", (3, 2))
    path = a / "data/chunk-000/file-000.parquet"
    edit_rows(path, lambda rows: [row | {"task_index": int(i in (1, 2, 3))} for i, row in enumerate(rows)])
    retask_dataset(a, tasks={"pull": "drop"}, episodes=[0], progress=False)
    assert [sample["task"] for sample in LeRobotDataset(a)] == ["push", "drop", "drop", "pull", "push"]
    tasks, means = tasks_of(a)
    assert tasks == [["push", "drop"], ["pull", "push"]]
    assert [mean[0] for mean in means] == pytest.approx([2 / 3, 1.0])


def test_refused(copied, tmp_path):
    for arguments in ({}, {"task": "a", "tasks": {"push": "b"}}):
        with pytest.raises(DatasetIndexError, match="one new instruction"):
            retask_dataset(copied, **arguments)
    with pytest.raises(UnknownTaskError, match=r"'pus'\. Did you mean 'push'"):
        retask_dataset(copied, tasks={"pus": "b"}, progress=False)
    with pytest.raises(UnknownTaskError, match="No frame of the chosen episodes has the instruction 'pull'"):
        retask_dataset(copied, tasks={"pull": "b"}, episodes=[0], progress=False)
    with pytest.raises(UnknownTaskError, match="not empty"):
        retask_dataset(copied, task=" ", progress=False)
    with pytest.raises(DatasetIndexError, match="only episodes 0 … 3; there is no 7"):
        retask_dataset(copied, task="a", episodes=[7])
    with locked(copied, "a test"), pytest.raises(FolderInUseError, match="in use by a test"):
        retask_dataset(copied, task="a", progress=False)
    with pytest.raises(OutputExistsError, match="the source itself"):
        retask_dataset(copied, copied, task="a", progress=False)


def test_an_interrupted_run_changes_nothing(copied, tmp_path, monkeypatch):
    before = content_of(copied)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manipulators.data.editing.retasking._write_json", full)
    with pytest.raises(DiskFullError, match="copied could not be written"):
        retask_dataset(copied, task="a", progress=False)
    assert content_of(copied) == before and os.listdir(tmp_path) == ["copied"]
