"""Tiny datasets, and a cache folder of their own so that tests leave nothing behind."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from manipulators.data.recording.writer import LeRobotWriter

FEATURES = {
    "observation.images.top": {"dtype": "video", "shape": [64, 64, 3]},
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"], "units": ["m", "m"]},
    "action": {"dtype": "float32", "shape": [1], "names": ["x"]},
    "next.reward": {"dtype": "float32", "shape": [1]},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def frame(number: int) -> dict:
    """A frame whose state, action and grey level tell its number."""
    return {
        "observation.images.top": np.full((64, 64, 3), 20 * number % 256, dtype=np.uint8),
        "observation.state": np.array([number, -number], dtype=np.float32),
        "action": np.array([10 * number], dtype=np.float32),
        "next.reward": 0.5,
    }


def record(root, lengths=(3, 4), **options):
    """Write a dataset whose frames are numbered on through its episodes, at 10 frames per second."""
    with LeRobotWriter(root, 10, FEATURES, robot_type="tiny", **options) as writer:
        number = 0
        for episode, length in enumerate(lengths):
            for _ in range(length):
                writer.add_frame(frame(number), task=("push", "pull")[episode % 2])
                number += 1
            writer.end_episode()
    return root


@pytest.fixture
def tiny(tmp_path):
    """Episodes of 3 and 4 frames, rows 0 … 6."""
    return record(tmp_path / "tiny")


def record_v2(root, version, lengths=(3, 4), **options):
    """Write the same dataset in the layout of version 2.0 or 2.1: a data file and a video per episode."""
    record(root, lengths, data_files_size_in_mb=1e-6, video_files_size_in_mb=1e-6, **options)
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    info, statistics = (json.loads((root / f"meta/{name}.json").read_text()) for name in ("info", "stats"))
    camera = "observation.images.top"
    if (root / "videos").is_dir():
        (root / "videos/chunk-000").mkdir()
        (root / "videos" / camera / "chunk-000").rename(root / "videos/chunk-000" / camera)
    for file in [*root.rglob("*/file-*.parquet"), *root.rglob("*/file-*.mp4")]:
        number = int(file.stem.removeprefix("file-"))
        file.rename(file.with_name(f"episode_{number:06d}{file.suffix}"))
    shutil.rmtree(root / "meta")
    (root / "meta").mkdir()

    info = {key: value for key, value in info.items() if not key.endswith("_size_in_mb")} | {
        "codebase_version": version,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    write_lines(
        root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(("push", "pull"))]
    )
    named = [{key: row[key] for key in ("episode_index", "tasks", "length")} for row in episodes]
    write_lines(root / "meta/episodes.jsonl", named)
    kept = ("min", "max", "mean", "std", "count")
    if version == "v2.0":
        statistics = {name: {key: values[key] for key in kept} for name, values in statistics.items()}
        (root / "meta/stats.json").write_text(json.dumps(statistics))
    else:
        stats = [{name: {key: row[f"stats/{name}/{key}"] for key in kept} for name in statistics} for row in episodes]
        write_lines(
            root / "meta/episodes_stats.jsonl", [{"episode_index": i, "stats": row} for i, row in enumerate(stats)]
        )
    return root


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_json(path, **changes):
    """Change the object in a JSON file; None removes a key."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def edit_rows(path, change):
    """Rewrite a parquet file with `change` applied to its rows, keeping its schema."""
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path)


def assert_same_samples(one, other):
    assert len(one) == len(other)
    for sample, twin in zip(one, other, strict=True):
        assert sample.keys() == twin.keys()
        for name, value in sample.items():
            assert value == twin[name] if isinstance(value, str) else torch.equal(value, twin[name])
