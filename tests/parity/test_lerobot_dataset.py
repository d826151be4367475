"""Samples and statistics equal those that LeRobot read from the same folder: 0.6.1 for v3.0, 0.3.3 for v2.1."""

import json

import datasets
import numpy as np
import pytest

from manipulators.data.convert import convert_dataset
from manipulators.data.dataset import LeRobotDataset

VERSIONS = ["v21", "v3"]


@pytest.fixture
def reference(request, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    name = f"lerobot_{request.param}_tiny"
    asked = json.loads((shared / f"data/{name}_reference.json").read_text())
    return shared / "data" / name, asked, np.load(shared / f"data/{name}_reference.npz")


@pytest.mark.parametrize("reference", VERSIONS, indirect=True)
@pytest.mark.parametrize("batched", [False, True])
def test_samples(reference, batched):
    root, asked, expected = reference
    assert_equal(LeRobotDataset(root, delta_timestamps=asked["delta_timestamps"]), asked, expected, batched)


@pytest.mark.parametrize("reference", ["v21"], indirect=True)
def test_samples_after_conversion(reference, tmp_path):
    root, asked, expected = reference
    convert_dataset(root, tmp_path / "v3", progress=False)
    assert_equal(LeRobotDataset(tmp_path / "v3", delta_timestamps=asked["delta_timestamps"]), asked, expected, True)


def assert_equal(dataset, asked, expected, batched):
    rows = asked["indices"]
    samples = dataset.__getitems__(rows) if batched else [dataset[row] for row in rows]
    compared = {name.removesuffix("__u8") for name in expected.files if name != "indices"}
    assert set(samples[0]) == compared
    for name in expected.files:
        if name != "indices":
            found = np.stack([np.asarray(sample[name.removesuffix("__u8")]) for sample in samples])
            assert found.dtype == expected[name].dtype
            np.testing.assert_array_equal(found, expected[name])


@pytest.mark.parametrize("reference", ["v3"], indirect=True)
def test_statistics(reference):
    root, _, _ = reference
    expected = json.loads((root / "meta/stats.json").read_text())
    found = LeRobotDataset(root).statistics
    assert found.keys() == expected.keys()
    for feature, statistics in expected.items():
        assert found[feature].keys() == statistics.keys()
        for name, value in statistics.items():
            assert found[feature][name].dtype == np.float32
            np.testing.assert_array_equal(found[feature][name], np.asarray(value, dtype=np.float32))


@pytest.mark.parametrize("reference", ["v21"], indirect=True)
def test_pooled_statistics(reference):
    """Those of three equally long episodes: their plain averages, and the spread of all rows."""
    root, _, _ = reference
    lines = (root / "meta/episodes_stats.jsonl").read_text().splitlines()
    found = LeRobotDataset(root).statistics
    for feature in ("observation.state", "observation.images.top", "index"):
        parts = [json.loads(line)["stats"][feature] for line in lines]
        means, stds = (np.asarray([part[name] for part in parts], dtype=np.float64) for name in ("mean", "std"))
        expected = {
            "min": np.min([part["min"] for part in parts], axis=0),
            "max": np.max([part["max"] for part in parts], axis=0),
            "mean": means.mean(axis=0),
            "std": np.sqrt((stds**2 + means**2).mean(axis=0) - means.mean(axis=0) ** 2),
            "count": [120],
        }
        assert found[feature].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[feature][name], value, rtol=1e-6, atol=1e-7)
