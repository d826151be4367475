import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from manipulators.data.dataset import LeRobotDataset
from manipulators.data.video.frame_cache import FrameCache
from manipulators.errors import DiskFullError, VideoError

from ..conftest import assert_same_samples, edit_json


def grey(rows, height=2):
    return [torch.full((3, height, 4), int(row), dtype=torch.uint8) for row in rows]


def test_every_frame_is_decoded_once(tmp_path):
    decoded = []

    def read(cache, *rows):
        rows = np.asarray(rows)

        def decode(positions):
            decoded.extend(rows[positions].tolist())
            return grey(rows[positions])

        return cache.frames(rows, decode)[:, 0, 0, 0].tolist()

    cache = FrameCache(tmp_path, "top", [], 10, (2, 4))
    assert read(cache, 7, 3) == [7, 3]
    assert read(cache, 3, 9, 7) == [3, 9, 7]
    assert read(pickle.loads(pickle.dumps(cache)), 9) == [9]
    again = FrameCache(tmp_path, "top", [], 10, (2, 4))
    assert read(again, 3, 7) == [3, 7] and decoded == [7, 3, 9]
    again._pixels[7, 0, 0, 0] = 1  # a write that was lost
    assert read(again, 3, 7) == [3, 7] and decoded == [7, 3, 9, 7]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 10 * (3 * 2 * 4 + 4)


def test_another_video_or_size_has_other_files(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_text("a")
    for size, text in (((2, 4), "a"), ((4, 4), "a"), ((2, 4), "ab"), ((2, 4), "ab")):
        video.write_text(text)
        os.utime(video, ns=(1, 1))
        FrameCache(tmp_path / "cache", "top", [video], 5, size)
    assert len(list((tmp_path / "cache").glob("*.frames"))) == 3


def test_frames_of_another_size(tmp_path):
    cache = FrameCache(tmp_path, "top", [], 10, (2, 4))
    with pytest.raises(VideoError, match=r"frames of \(3, 4\); meta/info\.json says \(2, 4\)"):
        cache.frames(np.array([1]), lambda positions: grey([1], height=3))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DiskFullError, match="mounted at"):
        FrameCache(tmp_path, "top", [], 10, (2, 4))
    assert list(tmp_path.iterdir()) == []


def test_samples_are_the_same_and_videos_stay_closed(tiny, tmp_path):
    windows = {"action_horizon": 2, "n_obs_steps": 2}
    plain = LeRobotDataset(tiny, **windows)
    for _ in range(2):
        cached = LeRobotDataset(tiny, **windows, decoded_cache=tmp_path / "frames")
        assert_same_samples(plain, cached)
    assert cached._reader.open_files == []
    batches = list(DataLoader(cached, batch_size=4, num_workers=2, multiprocessing_context="fork"))
    images = torch.cat([batch["observation.images.top"] for batch in batches])
    assert torch.equal(images, torch.stack([sample["observation.images.top"] for sample in plain]))


def test_kept_episodes_share_the_files_of_the_whole(tiny, tmp_path):
    list(LeRobotDataset(tiny, decoded_cache=tmp_path / "frames"))
    part = LeRobotDataset(tiny, episodes=[1], decoded_cache=tmp_path / "frames")
    part[0]
    assert part._reader.open_files == [] and len(list((tmp_path / "frames").iterdir())) == 2
    edit_json(tiny / "meta/info.json", robot_type="other")
    assert LeRobotDataset(tiny, features=["action"], decoded_cache=tmp_path / "none")[0]["index"] == 0
    assert not (tmp_path / "none").exists()
