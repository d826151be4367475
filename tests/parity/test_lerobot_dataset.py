"""Samples and statistics equal those that LeRobot 0.6.1 read from the same folder."""

import json

import datasets
import numpy as np
import pytest

from manipulators.data.dataset import LeRobotDataset


@pytest.fixture
def reference(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    folder = shared / "data"
    request = json.loads((folder / "lerobot_v3_tiny_reference.json").read_text())
    return folder / "lerobot_v3_tiny", request, np.load(folder / "lerobot_v3_tiny_reference.npz")


@pytest.mark.parametrize("batched", [False, True])
def test_samples(reference, batched):
    root, request, expected = reference
    dataset = LeRobotDataset(root, delta_timestamps=request["delta_timestamps"])
    rows = request["indices"]
    samples = dataset.__getitems__(rows) if batched else [dataset[row] for row in rows]
    compared = {name.removesuffix("__u8") for name in expected.files if name != "indices"}
    assert set(samples[0]) == compared
    for name in expected.files:
        if name != "indices":
            found = np.stack([np.asarray(sample[name.removesuffix("__u8")]) for sample in samples])
            assert found.dtype == expected[name].dtype
            np.testing.assert_array_equal(found, expected[name])


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
