"""What is downloaded of a dataset: the files of the episodes and cameras that are read, and of a stream those whose
turn has come.
"""

import numpy as np
import pytest

from manipulators.data.recording.writer import LeRobotWriter

from ..data.conftest import record_v2

FEATURES = {
    "observation.images.left": {"dtype": "video", "shape": [32, 32, 3]},
    "observation.images.right": {"dtype": "video", "shape": [32, 32, 3]},
    "observation.state": {"dtype": "float32", "shape": [2]},
    "action": {"dtype": "float32", "shape": [2]},
}
EPISODES, FRAMES = 12, 10


def write(root):
    """Write episodes of ten frames, a data file and two videos each."""
    sizes = {"data_files_size_in_mb": 1e-6, "video_files_size_in_mb": 1e-6}
    noise = np.random.default_rng(0)
    with LeRobotWriter(root, 10, FEATURES, **sizes) as writer:
        for _ in range(EPISODES):
            for _ in range(FRAMES):
                frame = {"observation.state": noise.random(2, np.float32), "action": noise.random(2, np.float32)}
                for camera in ("left", "right"):
                    frame[f"observation.images.{camera}"] = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                writer.add_frame(frame, task="push")
            writer.end_episode()
    return root


BEGIN = """
import itertools, os, tempfile
import torch
from torch.utils.data import DataLoader
from manipulators import LeRobotDataset, StreamingLeRobotDataset
from manipulators.errors import DatasetNotFoundError
tempfile.tempdir = os.getcwd()
options = {"features": ["action", "observation.images.right"], "action_horizon": 3}
"""
PART = """
dataset = LeRobotDataset("someone/part", episodes=[2, 5], features=["action", "observation.images.left"])
report([sample["episode_index"].item() for sample in (dataset[0], dataset[19])])
"""
PART_V2 = """
dataset = LeRobotDataset("someone/old", episodes=[1], features=["action"])
report([dataset[0]["episode_index"].item(), len(dataset)])
"""
BEGUN = """
stream = StreamingLeRobotDataset("hf://datasets/someone/begun", shuffle_buffer=20, **options)
loader = iter(DataLoader(stream, batch_size=4, num_workers=2))
report([next(loader)["index"].tolist() for _ in range(3)])
del loader
"""
WHOLE = """
stream = StreamingLeRobotDataset("someone/whole", shuffle_buffer=20, cache_gb=60e-6, **options)
sizes, samples = [], []
for sample in stream:
    samples.append(sample)
    sizes.append(stream._cache.size())
    folder = stream._cache.folder
open_files = len(stream._reader.open_files)
kept = [str(path) for path in folder.rglob("*") if path.suffix in (".mp4", ".arrow")]
whole = LeRobotDataset("someone/whole", **options)
samples.sort(key=lambda sample: sample["index"].item())
equal = all(
    torch.equal(value, twin[name]) if isinstance(value, torch.Tensor) else value == twin[name]
    for sample, twin in zip(samples, (whole[i] for i in range(len(whole))), strict=True)
    for name, value in sample.items()
)
report({"equal": equal, "largest": max(sizes), "open": open_files, "kept": len(kept)})
"""
ABSENT = """
said = []
for name in ("someone/nothing", "hf://datasets/someone/nothing", "hf://datasets/someone/begun@v9"):
    try:
        StreamingLeRobotDataset(name)
    except DatasetNotFoundError as error:
        said.append(str(error))
report(said)
"""


def fetched(hub, name):
    """Return the data and video files that were downloaded, in the order of the requests."""
    begin = f"GET /datasets/someone/{name}/resolve/{hub.head(f'datasets/someone/{name}')}/"
    files = [request.removeprefix(begin) for request in hub.requests if request.startswith(begin)]
    return [path for path in files if not path.startswith("meta/")]


@pytest.fixture(scope="module")
def said(hub, client, tmp_path_factory):
    """What a process was told that read a part, began a stream and read one whole."""
    folder = tmp_path_factory.mktemp("partial")
    root = write(folder / "many")
    for name in ("part", "begun", "whole"):
        hub.put_folder(f"datasets/someone/{name}", root)
    hub.put_folder("datasets/someone/old", record_v2(folder / "old", "v2.1"))
    return client(BEGIN, part=PART, old=PART_V2, begun=BEGUN, whole=WHOLE, absent=ABSENT)


def test_episodes_and_features_choose_the_files(hub, said):
    assert said["part"] == [2, 5] and said["old"] == [1, 4]
    left = "videos/observation.images.left/chunk-000/file-00{}.mp4"
    expected = [name.format(episode) for name in ("data/chunk-000/file-00{}.parquet", left) for episode in (2, 5)]
    assert sorted(fetched(hub, "part")) == expected
    assert fetched(hub, "old") == ["data/chunk-000/episode_000001.parquet"]


def test_a_stream_downloads_what_it_reads_once_for_all_workers(hub, said):
    batches = said["begun"]
    assert len({index for batch in batches for index in batch}) == 12
    files = fetched(hub, "begun")
    # Of 120 samples 12 were read: the files of their block of 20, and of the next.
    assert len(files) == len(set(files)) <= 8 and not any("left" in path for path in files)
    assert {path.rpartition("-")[2].partition(".")[0] for path in files} >= {f"{i // 10:03d}" for i in batches[0]}


def test_a_pass_needs_no_more_disk_than_it_may_take(hub, said):
    whole = said["whole"]
    assert whole["equal"]
    assert whole["largest"] <= 60_000 and whole["kept"] < 16  # of 24 files
    assert whole["open"] <= 8  # a file that has left the cache is closed, so that the disk gets its space back
    streamed = fetched(hub, "whole")[: 2 * EPISODES]
    assert sorted(streamed) == sorted(
        name.format(episode)
        for name in ("data/chunk-000/file-{:03d}.parquet", "videos/observation.images.right/chunk-000/file-{:03d}.mp4")
        for episode in range(EPISODES)
    )


def test_what_cannot_be_streamed(said):
    nothing, by_url, revision = said["absent"]
    assert "'someone/nothing' is neither a local folder nor" in nothing and "hf auth login" in nothing
    assert nothing == by_url.replace("hf://datasets/", "") and "at revision 'v9'" in revision
