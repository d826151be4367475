"""Tiny datasets, and a cache folder of their own so that tests leave nothing behind."""

import datasets
import numpy as np
import pytest

from manipulators.data.writer import LeRobotWriter

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
        "observation.images.top": np.full((64, 64, 3), 20 * number, dtype=np.uint8),
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
