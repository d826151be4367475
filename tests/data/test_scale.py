"""What a dataset of many episodes costs: counted in what is read, copied and pickled, not in seconds."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manipulators import LeRobotDataset, convert_dataset
from manipulators.data import convert
from manipulators.data.identity import identity_of
from manipulators.data.layouts import v2
from manipulators.data.statistics.computing import compute_statistics, statistics_of_blocks, statistics_of_episodes
from manipulators.data.table import arrow_cache, fingerprint
from manipulators.data.table import frame_table as table
from manipulators.errors import DatasetFormatError, DatasetIndexError

from .conftest import edit_json, edit_rows, record_v2

LENGTHS = (2, 3, 1, 4)  # again and again


def numeric(root, episodes, files=1):
    """Write a dataset of version 3.0 by hand, a row group per episode; action: the frame's number, halved."""
    lengths = np.resize(LENGTHS, episodes)
    ends = np.cumsum(lengths)
    file_of = np.arange(episodes) * files // episodes
    steps = np.concatenate([np.arange(length) for length in lengths])
    numbers = np.arange(ends[-1])
    frames = pa.table(
        {
            "action": pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(numbers / 2, 2), pa.float32()), 2),
            "next.done": np.isin(numbers, ends - 1),
            "timestamp": (steps / 10).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.repeat(np.arange(episodes), lengths),
            "index": numbers,
            "task_index": np.zeros_like(numbers),
        }
    )
    (root / "data/chunk-000").mkdir(parents=True)
    for file in range(files):
        rows = frames.filter(pa.array(np.repeat(file_of, lengths) == file))
        pq.write_table(rows, root / f"data/chunk-000/file-{file:03d}.parquet", row_group_size=3)
    places = {
        "episode_index": np.arange(episodes),
        "length": lengths,
        "dataset_from_index": ends - lengths,
        "dataset_to_index": ends,
        "data/chunk_index": np.zeros(episodes, np.int64),
        "data/file_index": file_of,
    }
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(places), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task": ["go"], "task_index": [0]}), root / "meta/tasks.parquet")
    features = {"action": {"dtype": "float32", "shape": [2]}, "next.done": {"dtype": "bool", "shape": [1]}}
    (root / "meta/info.json").write_text(json.dumps({"codebase_version": "v3.0", "fps": 10, "features": features}))
    statistics = {"action": compute_statistics(np.repeat(numbers / 2, 2).reshape(-1, 2))}
    plain = {name: {key: value.tolist() for key, value in values.items()} for name, values in statistics.items()}
    (root / "meta/stats.json").write_text(json.dumps(plain))
    return root


def copies():
    return sorted(path.name for path in datasets.config.HF_DATASETS_CACHE.rglob("*.arrow"))


def forbidden(*_, **__):
    raise AssertionError("this must not be called")


def test_many_episodes_make_one_record_batch_that_a_second_opening_does_not_read(tmp_path, monkeypatch):
    root = numeric(tmp_path / "set", 400)
    LeRobotDataset(root)
    assert pq.ParquetFile(root / "data/chunk-000/file-000.parquet").num_row_groups == 334
    monkeypatch.setattr(arrow_cache, "_make", forbidden)
    monkeypatch.setattr(table, "numbers_of", forbidden)
    monkeypatch.setattr(table.FrameTable, "_batch", forbidden)
    dataset = LeRobotDataset(root)
    assert (dataset.num_episodes, dataset.num_frames, len(dataset._table._copy_of)) == (400, 1000, 1)
    assert dataset.statistics["action"]["max"].tolist() == [499.5, 499.5]


def test_rows_are_the_same_over_any_number_of_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_cache, "_READ_ROWS", 3)
    monkeypatch.setattr(arrow_cache, "_BATCH_ROWS", 6)
    monkeypatch.setattr(table, "_KEPT", 0)  # pages are given back all the time
    monkeypatch.setattr(table, "_ROWS", 0)
    dataset = LeRobotDataset(numeric(tmp_path / "set", 8), action_horizon=2)
    assert len(dataset._table._copy_of) == 4
    rows = np.array([[19, 0, 7], [7, 13, 5]])
    assert dataset.numbers("action", rows)[..., 1].tolist() == (rows / 2).tolist()
    assert dataset.numbers("next.done", rows).tolist() == [[True, False, False], [False, False, True]]
    assert [sample["action"][:, 0].tolist() for sample in dataset.__getitems__([5, 19])] == [[2.5, 2.5], [9.5, 9.5]]
    assert dataset._table.rows(4, 14)["index"].to_pylist() == list(range(4, 14))
    assert [block.tolist() for block in dataset.row_blocks(9)] == [[*range(9)], [*range(9, 18)], [18, 19]]


def test_an_episode_that_is_not_where_it_should_be_is_found_without_reading_rows(tmp_path, monkeypatch):
    root = numeric(tmp_path / "set", 8)
    edit_rows(root / "data/chunk-000/file-000.parquet", lambda rows: [*rows[:-1], rows[-1] | {"timestamp": 5.0}])
    monkeypatch.setattr(table.FrameTable, "numbers", forbidden)
    with pytest.raises(DatasetFormatError, match=r"Episode 7 of .* lasts 5 s by its timestamps, and 0\.3 s by its 4"):
        LeRobotDataset(root)


def test_values_that_are_not_finite_are_found_where_the_outline_says_there_are_some(tmp_path):
    root = numeric(tmp_path / "set", 8)

    def spoil(rows):
        rows[14]["action"] = [np.inf, 0.0]
        return rows

    edit_rows(root / "data/chunk-000/file-000.parquet", spoil)
    dataset = LeRobotDataset(root)
    assert dataset._table.not_finite("action", (2,)).tolist() == [14]
    assert dataset._table.not_finite("timestamp", ()).tolist() == []


def test_episodes_read_only_the_files_they_are_in(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_cache, "_FILES_BYTES", 1)
    root = numeric(tmp_path / "set", 8, files=4)
    dataset = LeRobotDataset(root, episodes=[2])
    assert len(copies()) == 1 and dataset[0]["action"].tolist() == [[2.5, 2.5]]
    assert dataset.numbers("index", np.arange(5, 10)).tolist() == [5, 6, 7, 8, 9]  # of the same file
    with pytest.raises(DatasetIndexError, match="Row 10 is not in the files of the episodes that are read"):
        dataset.numbers("index", np.array([6, 10]))
    assert len(LeRobotDataset(root)) == 20 and len(copies()) == 4  # the first one is used again
    assert LeRobotDataset(root, episodes=[3, 6])[4]["index"] == 15


def test_files_of_other_types_are_joined_exactly_when_they_have_copies_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_cache, "_FILES_BYTES", 1)
    root = numeric(tmp_path / "set", 8, files=2)
    first = root / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(first)
    whole = pa.FixedSizeListArray.from_arrays(pa.array(range(20), pa.int64()), 2)
    pq.write_table(rows.set_column(0, "action", whole).drop_columns(["next.done"]), first)
    dataset = LeRobotDataset(root)
    assert dataset.numbers("action", np.array([1, 11]))[:, 0].tolist() == [2.0, 5.5]
    assert dataset.numbers("next.done", np.array([11, 14])).tolist() == [True, True]
    with pytest.raises(DatasetFormatError, match=r"next\.done has no value \(null\) in row 1 of .*file-000"):
        dataset.numbers("next.done", np.array([11, 1]))


def test_a_pickled_dataset_has_few_bytes_per_episode(tmp_path):
    small, large = (len(pickle.dumps(LeRobotDataset(numeric(tmp_path / f"{n}", n)))) for n in (100, 1100))
    assert large - small < 48 * 1000
    dataset = pickle.loads(pickle.dumps(LeRobotDataset(tmp_path / "100")))
    assert dataset[-1]["action"].tolist() == [[124.5, 124.5]] and dataset.statistics["action"]["count"] == 250


def test_reading_imports_neither_pandas_nor_transformers():
    heavy = "{'pandas', 'datasets', 'transformers'}"
    code = f"import sys, manipulators.data.dataset; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_has_not_changed_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_TICK", 0)
    root = numeric(tmp_path / "set", 8)
    path = root / "data/chunk-000/file-000.parquet"
    LeRobotDataset(root)
    with monkeypatch.context() as context:
        context.setattr(fingerprint, "fingerprint", forbidden)
        LeRobotDataset(root)
    before = path.stat()
    edit_rows(path, lambda rows: [row | {"action": [1.0, 1.0]} for row in rows])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert LeRobotDataset(root)[9]["action"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("suffix", [".arrow", ".npz"])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_copy_that_a_power_cut_has_left_is_made_again(tmp_path, suffix, kept):
    root = numeric(tmp_path / "set", 8)
    LeRobotDataset(root)
    (file,) = (datasets.config.HF_DATASETS_CACHE / "manipulators").glob(f"*{suffix}")
    file.write_bytes(file.read_bytes()[:kept])
    assert LeRobotDataset(root)[9]["action"].tolist() == [[4.5, 4.5]]


def test_few_rows_with_pictures_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_cache, "_BATCH_BYTES", 1000)
    root = numeric(tmp_path / "set", 8)
    path = root / "data/chunk-000/file-000.parquet"
    pictures = pa.array([os.urandom(300) for _ in range(20)])
    pq.write_table(pq.read_table(path).append_column("picture", pictures), path)
    read = []
    monkeypatch.setattr(arrow_cache, "cast_to", lambda table, schema: read.append(len(table)) or table)
    assert LeRobotDataset(root).num_frames == sum(read) == 20 and max(read) <= 3


def open_with_others(root, barrier, found):
    barrier.wait()
    found.put(LeRobotDataset(root)[7]["index"].item())


def test_two_processes_open_a_dataset_at_the_same_time(tmp_path):
    root, context = numeric(tmp_path / "set", 8), multiprocessing.get_context("fork")
    barrier, found = context.Barrier(2), context.Queue()
    processes = [context.Process(target=open_with_others, args=(root, barrier, found)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [found.get(timeout=60) for _ in processes] == [7, 7]
    for process in processes:
        process.join()
    left = sorted(path.suffix for path in (datasets.config.HF_DATASETS_CACHE / "manipulators").iterdir())
    assert left == [".arrow", ".npz"]


def test_a_cache_that_may_only_be_read_serves_what_it_holds(tmp_path, monkeypatch):
    root = numeric(tmp_path / "set", 8)
    LeRobotDataset(root)
    monkeypatch.setattr(arrow_cache, "WeakFileLock", forbidden)
    monkeypatch.setattr("pathlib.Path.mkdir", forbidden)
    monkeypatch.setattr("pathlib.Path.write_text", forbidden)
    assert len(LeRobotDataset(root)) == 20


@pytest.mark.parametrize("loaded", [True, False], ids=["datasets is imported", "it is not"])
def test_the_cache_is_that_of_datasets(tmp_path, monkeypatch, loaded):
    if not loaded:
        monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "other"))
    assert arrow_cache.cache_folder() == tmp_path / ("cache" if loaded else "other")
    monkeypatch.delenv("HF_DATASETS_CACHE")
    monkeypatch.setattr(arrow_cache.constants, "HF_HOME", "/home/of/hf")
    assert loaded or str(arrow_cache.cache_folder()) == "/home/of/hf/datasets"


# --- statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "int64", "uint64", "bool"])
def test_statistics_in_blocks_of_seven_rows_are_those_of_the_whole(kind):
    values = (np.random.default_rng(0).normal(0, 40, (50, 3)) + (100 if kind == "uint64" else 0)).astype(kind)
    values[:, 1] = values[0, 1]
    whole = compute_statistics(values)
    blocks = statistics_of_blocks(lambda: (values[i : i + 7] for i in range(0, 50, 7)))
    assert blocks.keys() == whole.keys()
    for name in whole:
        if name in ("mean", "std"):
            np.testing.assert_allclose(blocks[name], whole[name], rtol=1e-6)
        else:
            assert np.array_equal(blocks[name], whole[name]), name
    assert blocks["std"][1] == 0


def test_wide_and_extreme_numbers_have_exact_quantiles():
    wide = np.random.default_rng(1).normal(size=(20, 40)).astype(np.float32)
    extreme = np.array([[-(2**62)], [2**62], [5], [-3], [0]])
    for values in (wide, extreme, np.array([[0], [2**64 - 1], [2**63]], np.uint64)):
        whole, blocks = compute_statistics(values), statistics_of_blocks(lambda values=values: iter([values]))
        assert all(np.array_equal(blocks[name], whole[name]) for name in whole)


def test_a_large_array_is_taken_in_blocks(monkeypatch):
    values = np.arange(60.0).reshape(20, 3)
    whole = compute_statistics(values)
    monkeypatch.setattr("manipulators.data.statistics.computing._TOGETHER", 10)
    monkeypatch.setattr("manipulators.data.statistics.computing._ROWS", 6)
    blocks = compute_statistics(values)
    assert all(np.array_equal(blocks[name], whole[name]) for name in whole)
    values[13, 1] = np.nan
    with pytest.raises(DatasetFormatError, match="Row 13 has values that are not finite"):
        compute_statistics(values)


def test_statistics_of_many_episodes_at_once_are_those_of_each():
    lengths = np.array([3, 1, 40, 4, 2, 4])
    values = np.random.default_rng(2).normal(size=(54, 2, 2)).astype(np.float32)
    found = statistics_of_episodes(values, lengths)
    for i, part in enumerate(np.split(values, np.cumsum(lengths)[:-1])):
        for name, value in compute_statistics(part).items():
            assert found[name][i].shape == value.shape
            np.testing.assert_allclose(found[name][i], value, rtol=1e-6, atol=1e-7)


def test_statistics_of_episodes_are_pooled_in_blocks(tmp_path, monkeypatch):
    root = record_v2(tmp_path / "old", "v2.1", (3, 4, 2))
    whole = LeRobotDataset(root).statistics
    monkeypatch.setattr(v2, "_POOLED_TOGETHER", 2)
    blocks = LeRobotDataset(root).statistics
    for name, values in whole.items():
        for key, value in values.items():
            np.testing.assert_allclose(blocks[name][key], value, rtol=1e-6, atol=1e-7)


def test_a_conversion_in_blocks_writes_what_one_at_once_does(tmp_path, monkeypatch):
    root = numeric(tmp_path / "set", 8, files=2)
    once = convert_dataset(root, tmp_path / "once", progress=False)
    monkeypatch.setattr(convert, "ROWS_AT_ONCE", 5)
    edit_json(root / "meta/info.json", data_files_size_in_mb=1e-6)
    blocks = convert_dataset(root, tmp_path / "blocks", progress=False)
    assert (once / "meta/stats.json").read_text() == (blocks / "meta/stats.json").read_text()
    files = sorted(blocks.glob("meta/episodes/*/*.parquet"))
    assert len(files) == 5 and files[-1].name == "file-004.parquet"
    found = pa.concat_tables(pq.read_table(path) for path in files)
    expected = pq.read_table(once / "meta/episodes/chunk-000/file-000.parquet")
    places = {"data/file_index", "meta/episodes/file_index"}
    for name in set(expected.column_names) - places:
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    assert found["meta/episodes/file_index"].to_pylist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert LeRobotDataset(blocks)[:]["action"].equal(LeRobotDataset(root)[:]["action"])


def test_the_digest_of_a_training_has_stayed(tmp_path):
    root = numeric(tmp_path / "set", 8)
    assert identity_of(LeRobotDataset(root))["values"] == "934d8e4bf7e6364d"
    assert identity_of(LeRobotDataset(root, episodes=[0, 3]))["values"] == "7d3069f0e27d4371"
