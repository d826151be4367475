"""Datasets of two cameras to edit, and what their samples must still be afterwards."""

import av
import numpy as np
import pytest
import torch

from manipulators.data.dataset import LeRobotDataset
from manipulators.data.recording.writer import LeRobotWriter

TOP, WRIST = "observation.images.top", "observation.images.wrist"
FEATURES = {
    TOP: {"dtype": "video", "shape": [32, 48, 3]},
    WRIST: {"dtype": "video", "shape": [64, 64, 3]},
    "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
    "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
}
RENUMBERED = {"episode_index", "index", "task_index"}


def record_two_cameras(root, lengths, seed=0, tasks=("push", "pull"), features=FEATURES, fps=10, **options):
    """Write a dataset of random numbers and noisy pictures."""
    generator = np.random.default_rng(seed)
    options = {"robot_type": "tiny"} | options
    with LeRobotWriter(root, fps, features, **options) as writer:
        for episode, length in enumerate(lengths):
            for _ in range(length):
                frame = {
                    name: generator.integers(0, 256, f["shape"], dtype=np.uint8)
                    if f["dtype"] in ("video", "image")
                    else generator.normal(size=f["shape"]).astype(f["dtype"])
                    for name, f in features.items()
                }
                writer.add_frame(frame, task=tasks[episode % len(tasks)])
            writer.end_episode()
    return root


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """The folders of two datasets: episodes of 3, 4, 2 and 5 frames; of 2 and 3 frames."""
    folder = tmp_path_factory.mktemp("recorded")
    return (
        record_two_cameras(folder / "a", (3, 4, 2, 5)),
        record_two_cameras(folder / "b", (2, 3), seed=1, tasks=("pull", "lift")),
    )


def encode_in_long_groups(path, num_frames, height, width, fps=10):
    """Write a video with a keyframe every 50 frames and reordered frames between."""
    generator = np.random.default_rng(2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": "50", "bf": "2", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for _ in range(num_frames):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def assert_episodes_are(new, *expected, renumbered=RENUMBERED):
    """Compare every frame of the dataset `new` with those of episodes of others: pairs of a folder and a number."""
    new = LeRobotDataset(new)
    assert new.episodes == list(range(len(expected)))
    first = 0
    for episode, (root, number) in enumerate(expected):
        old = LeRobotDataset(root, episodes=[number])
        assert new.episode_lengths[episode] == len(old)
        for i in range(len(old)):
            sample, twin = new[first + i], old[i]
            assert int(sample["episode_index"]) == episode and int(sample["index"]) == first + i
            for name, value in sample.items():
                if name not in renumbered:
                    same = value == twin[name] if isinstance(value, str) else torch.equal(value, twin[name])
                    assert same, f"{name} in frame {i} of episode {episode}"
        first += len(old)
    assert len(new) == first
    return new
