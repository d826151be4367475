"""Rows of data files: values that are absent, types that differ, files that are not there, and the Arrow copy."""

import json
import os
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from manipulators import LeRobotDataset, convert_dataset
from manipulators.data.table.fingerprint import fingerprint
from manipulators.data.table.frame_table import FrameTable
from manipulators.errors import (
    DatasetFormatError,
    DatasetNotFoundError,
    DiskFullError,
    MissingVideoError,
    ReadOnlyError,
)

from ..conftest import edit_rows, record, record_v2

DATA = "data/chunk-000/file-000.parquet"


def with_column(root, name, values, kind):
    """Add a column to a dataset of one data file, and to its declaration."""
    table = pq.read_table(root / DATA)
    pq.write_table(table.append_column(name, pa.array(values, kind)), root / DATA)
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    shape = [1] if not isinstance(values[0], list) else [len(values[0])]
    info["features"][name] = {
        "dtype": str(kind.value_type if pa.types.is_list(kind) else kind),
        "shape": shape,
        "names": None,
    }
    path.write_text(json.dumps(info))
    return root


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("next.done", [False, False, False, False, None, True, True], pa.bool_()),
        ("observation.environment_state", [[1, 2]] * 4 + [[1, None]] + [[3, 4]] * 2, pa.list_(pa.int64())),
        ("observation.environment_state", [[1, 2]] * 4 + [None] + [[3, 4]] * 2, pa.list_(pa.int32())),
        ("observation.flags", [[True, False]] * 4 + [[None, True]] + [[True, True]] * 2, pa.list_(pa.bool_())),
        ("subtask", ["a", "b", "c", "d", None, "f", "g"], pa.string()),
    ],
    ids=["bool", "int in a list", "list", "bool in a list", "text"],
)
def test_a_value_that_is_absent_is_named_and_never_a_number(tiny, name, values, kind):
    dataset = LeRobotDataset(with_column(tiny, name, values, kind))
    dataset[3], dataset[5]  # the others are read
    message = (
        rf"{name} has no value \(null\) in row 4 of .*file-000\.parquet\. .*--data\.features and --data\.episodes"
    )
    for read in (lambda: dataset[4], lambda: dataset[2:6], lambda: list(DataLoader(dataset, 7))):
        with pytest.raises(DatasetFormatError, match=message):
            read()
    assert len(list(LeRobotDataset(tiny, episodes=[0]))) == 3
    assert len(list(LeRobotDataset(tiny, features=["action"]))) == 7


def test_conversion_stops_at_an_absent_number_and_can_do_without(tiny, tmp_path):
    with_column(tiny, "observation.environment_state", [[1], [2], [3], [4], [None], [6], [7]], pa.list_(pa.int64()))
    with pytest.raises(DatasetFormatError, match=r"no value \(null\) in row 4 .*--features and --episodes"):
        convert_dataset(tiny, tmp_path / "new", progress=False)
    with_column(tiny, "next.done", [0, 1, 1, None, 1, 0, 0], pa.int64())
    with pytest.raises(DatasetFormatError, match=r"next\.done has no value \(null\) in row 3 "):
        convert_dataset(tiny, tmp_path / "new", progress=False, features=["action", "next.done"])
    with_column(tiny, "observation.force", [[0.0, 0.0]] * 5 + [None] * 2, pa.list_(pa.float32()))
    with pytest.raises(DatasetFormatError, match=r"observation\.force has NaN or infinity in frame 2 of episode 1"):
        convert_dataset(tiny, tmp_path / "new", progress=False, features=["action", "observation.force"])
    first = LeRobotDataset(convert_dataset(tiny, tmp_path / "first", progress=False, episodes=[0]))
    assert (len(first), first[2]["observation.environment_state"].item()) == (3, 3)
    names = ["observation.state", "action"]
    others = LeRobotDataset(convert_dataset(tiny, tmp_path / "others", progress=False, features=names))
    assert sorted(others.recorded_features) == ["action", "observation.state"] and len(others) == 7
    assert "observation.environment_state" not in pq.read_schema(others.root / DATA).names


def test_numbers_of_different_types_in_different_files_are_read_exactly(tmp_path):
    """The first file does not decide: half a metre is not 0 because another file holds whole ones."""
    root = record_v2(tmp_path / "old", "v2.1")
    values = {0: pa.array([1, 2, 3], pa.int64()), 1: pa.array([0.5, 1.5, 2.5, 3.5], pa.float64())}
    for number, column in values.items():
        file = root / f"data/chunk-000/episode_{number:06d}.parquet"
        table = pq.read_table(file).replace_schema_metadata(None)
        pq.write_table(table.set_column(table.column_names.index("action"), "action", column), file)
    assert LeRobotDataset(root)[:]["action"].ravel().tolist() == [1, 2, 3, 0.5, 1.5, 2.5, 3.5]
    first = root / "data/chunk-000/episode_000000.parquet"
    pq.write_table(pq.read_table(first).drop_columns(["next.reward"]), first)
    rewards = LeRobotDataset(root)[:]["next.reward"]
    assert rewards[:3].isnan().all() and rewards[3:].tolist() == [0.5] * 4


def test_a_column_of_another_kind_than_declared_is_refused(tiny):
    def as_text(table):
        return table.set_column(table.column_names.index("action"), "action", pa.array(["1"] * 7))

    pq.write_table(as_text(pq.read_table(tiny / DATA)).replace_schema_metadata(None), tiny / DATA)
    with pytest.raises(DatasetFormatError, match=r"gives action the dtype 'float32', but the data files hold text"):
        LeRobotDataset(tiny)


def test_lists_that_fit_only_in_sum_are_refused(tiny):
    """Read one after another, they would give every later row the numbers of others."""
    table = pq.read_table(tiny / DATA).replace_schema_metadata(None)
    states = pa.array([[0.0, 0.0], [1.0], [2.0, 2.0, 2.0], *[[3.0, 3.0]] * 4], pa.list_(pa.float32()))
    position = table.column_names.index("observation.state")
    pq.write_table(table.set_column(position, "observation.state", states), tiny / DATA)
    with pytest.raises(DatasetFormatError, match=r"'observation\.state' does not hold .*lists of 1 to 3 are in it"):
        LeRobotDataset(tiny)[0]


# --- a part of a dataset ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_episodes_are_read_without_the_files_of_others(tmp_path, version):
    root, lengths = tmp_path / "part", (3, 4, 2, 5)
    split = {"data_files_size_in_mb": 1e-6, "video_files_size_in_mb": 1e-6}
    record(root, lengths, **split) if version == "v3.0" else record_v2(root, version, lengths)
    whole = LeRobotDataset(root, episodes=[1, 3], action_horizon=2)[:]
    for file in [*root.glob("data/*/*.parquet"), *root.rglob("*.mp4")]:
        if int(file.stem[-6:].removeprefix("le-")) not in (1, 3):
            file.unlink()
    dataset = LeRobotDataset(root, episodes=[1, 3], action_horizon=2, decoded_cache=tmp_path / "frames")
    assert dataset.episodes == [1, 3] and dataset[4]["index"] == 9  # numbers of the whole dataset
    for name, value in dataset[:].items():
        assert value == whole[name] if name == "task" else value.equal(whole[name])
    new = LeRobotDataset(convert_dataset(root, tmp_path / "new", progress=False, episodes=[1, 3]))
    assert (new.episodes, new.episode_lengths, new[4]["index"].item()) == ([0, 1], [4, 5], 4)
    with pytest.raises((DatasetNotFoundError, MissingVideoError), match=r"episodes=\[…\]"):
        LeRobotDataset(root)
    edit_rows(sorted(root.glob("data/*/*.parquet"))[1], lambda rows: rows[:-1])
    with pytest.raises(DatasetFormatError, match=r"has 4 for episode\(s\) 3, expected 5"):
        LeRobotDataset(root, episodes=[3])


# --- the Arrow copy ---------------------------------------------------------------------------------------


def copies():
    return sorted(path.name for path in datasets.config.HF_DATASETS_CACHE.rglob("*.arrow"))


def test_a_file_is_known_by_what_it_holds_and_not_by_its_time(tiny, tmp_path):
    assert LeRobotDataset(tiny)[1]["action"].tolist() == [[10.0]]
    before = (tiny / DATA).stat()
    edit_rows(tiny / DATA, lambda rows: [row | {"action": row["action"] + 1} for row in rows])
    os.utime(tiny / DATA, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert LeRobotDataset(tiny)[1]["action"].tolist() == [[11.0]]
    assert len(copies()) == 2
    os.utime(tiny / DATA)
    shutil.copytree(tiny, tmp_path / "[copy]")
    assert LeRobotDataset(tiny)[1]["action"] == LeRobotDataset(tmp_path / "[copy]")[1]["action"] == 11.0
    assert len(copies()) == 2  # touched or copied, it is the same


def test_large_files_are_told_apart_by_their_parts(tmp_path, monkeypatch):
    """By the footer of a parquet file, or a part of any other: of both only some bytes are read."""
    monkeypatch.setattr("manipulators.data.table.fingerprint._WHOLE", 0)
    monkeypatch.setattr("manipulators.data.table.fingerprint._PART", 8)
    path, found = tmp_path / "file.parquet", []
    for second in (1, 5001):  # neither at the beginning nor at the end of the file, but the column's largest value
        values = np.arange(5000)
        values[2] = second
        pq.write_table(pa.table({"x": values}), path, compression="none", use_dictionary=False)
        os.utime(path, (0, 0))
        found.append(FrameTable([path]).numbers("x", np.array([2]), ()).item())
    assert found == [1, 5001]
    path.write_bytes(b"a" * 100)
    before = fingerprint([path])
    path.write_bytes(b"a" * 99 + b"b")
    assert fingerprint([path]) != before != fingerprint([path, path])


def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
    with pytest.raises(ReadOnlyError, match=r"file/cache.* may not be written: .*HF_DATASETS_CACHE=<folder>"):
        LeRobotDataset(tiny)
    with pytest.raises(ReadOnlyError, match=r"file/frames.* may not be written: .*decoded_cache="):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        LeRobotDataset(tiny, decoded_cache=tmp_path / "file/frames")


def test_a_full_cache(tiny, monkeypatch):
    def write(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manipulators.data.table.arrow_cache._large", write)
    with pytest.raises(DiskFullError, match=r"The disk mounted at .* is full.*another folder: HF_DATASETS_CACHE="):
        LeRobotDataset(tiny)
