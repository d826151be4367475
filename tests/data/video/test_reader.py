import os
import resource

import numpy as np
import pytest

import manipulators.data.video.reader as reader_module
from manipulators.data.video.encoder import VideoEncoder
from manipulators.data.video.reader import VideoReader
from manipulators.errors import FrameNotFoundError, MissingVideoError, VideoError


def video(path, levels, **options):
    with VideoEncoder(path, fps=10, **options) as encoder:
        for level in levels:
            encoder.add(np.full((64, 64, 3), level, dtype=np.uint8))
    return path


def grey(frames):
    return [round(float(frame.float().mean())) for frame in frames]


@pytest.mark.parametrize("decoders", [1, 3])
@pytest.mark.parametrize("codec, interval", [("h264", 2), ("h264", 12), ("av1", 2)])
def test_any_order_gives_the_frames_asked_for(tmp_path, codec, interval, decoders):
    levels = list(range(0, 240, 20))
    path = video(tmp_path / "a.mp4", levels, codec=codec, keyframe_interval=interval)
    order = [7, 0, 11, 3, 4, 4, 10, 1]
    reader = VideoReader(decoders=decoders)
    frames = reader.frames(path, [index / 10 for index in order])
    assert frames.shape == (8, 3, 64, 64)
    one_by_one = [int(reader.frames(path, [index / 10]).float().mean().round()) for index in order]
    for found in (grey(frames), one_by_one):
        assert np.abs(np.subtract(found, [levels[index] for index in order])).max() <= 2


def test_the_nearest_frame_within_the_tolerance(tmp_path):
    path = video(tmp_path / "a.mp4", [0, 100, 200])
    assert np.abs(np.subtract(grey(VideoReader().frames(path, [0.14, 0.16], 0.05)), [100, 200])).max() <= 2
    with pytest.raises(FrameNotFoundError, match=r"0\.140000 s: the nearest frame is at 0\.100000 s"):
        VideoReader().frames(path, [0.14])
    with pytest.raises(FrameNotFoundError, match=r"nearest frame is at 0\.200000 s"):
        VideoReader().frames(path, [0.3])


def test_frames_that_lie_apart_are_shared_among_decoders(tmp_path):
    path = video(tmp_path / "a.mp4", range(0, 240, 10), keyframe_interval=2)
    reader = VideoReader(decoders=4)
    reader.frames(path, [0.3])
    assert len(reader._open[path]) == 1
    reader.frames(path, [0.1, 1.0, 2.0])
    assert len(reader._open[path]) == 3
    with pytest.raises(FrameNotFoundError, match=r"9\.000000 s"):
        reader.frames(path, [0.1, 1.0, 9.0])
    reader.close()
    assert reader.open_files == []


def test_frames_between_two_keyframes_are_left_to_one_decoder(tmp_path):
    path = video(tmp_path / "a.mp4", range(0, 240, 10), keyframe_interval=12)
    reader = VideoReader(decoders=4)
    reader.frames(path, [1.1])  # shows how far its keyframes lie apart
    reader.frames(path, [0.2, 0.3, 0.4, 0.5])
    assert len(reader._open[path]) == 1


def test_few_files_stay_open(tmp_path):
    paths = [video(tmp_path / f"{name}.mp4", [level]) for name, level in (("a", 0), ("b", 100), ("c", 200))]
    reader = VideoReader(max_open=2)
    for path in (*paths, paths[1]):
        reader.frames(path, [0.0])
    assert reader.open_files == [paths[2], paths[1]]
    reader.close()
    assert reader.open_files == []


def test_a_fork_opens_its_own_decoders(tmp_path, monkeypatch):
    path = video(tmp_path / "a.mp4", [0])
    reader = VideoReader()
    reader.frames(path, [0.0])
    parents = reader._open[path]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert reader.open_files == []
    reader.frames(path, [0.0])
    assert reader._open[path] is not parents


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(MissingVideoError, match="absent"):
        VideoReader().frames(tmp_path / "absent.mp4", [0.0])
    path = video(tmp_path / "a.mp4", [0, 100])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(VideoError, match="cut short"):
        VideoReader().frames(path, [0.0])


def test_a_video_of_another_frame_rate(tmp_path):
    path = video(tmp_path / "a.mp4", [0, 100])
    assert VideoReader(fps=10).frames(path, [0.1]).shape == (1, 3, 64, 64)
    with pytest.raises(VideoError, match="10 frames per second, its dataset 30"):
        VideoReader(fps=30).frames(path, [0.1])


def test_damaged_frames_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    with VideoEncoder(tmp_path / "a.mp4", fps=10) as encoder:
        for frame in noise:
            encoder.add(frame)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(VideoError, match="cannot be decoded"):
        VideoReader().frames(tmp_path / "a.mp4", np.arange(6) / 10)


def test_as_many_files_stay_open_as_the_process_may_open(tmp_path, monkeypatch):
    paths = [
        video(tmp_path / f"{level}.mp4", [level]) for level in range(0, 240, 12)
    ]  # 20, more than were kept before
    reader = VideoReader()
    for path in paths:
        reader.frames(path, [0.0])
    assert reader.open_files == paths
    monkeypatch.setattr(reader_module, "_MEMORY", 3 * (2**20 + 6 * 64 * 64))
    reader.frames(paths[0], [0.0])
    assert reader.open_files == [*paths[-2:], paths[0]]
    reader.close()
    monkeypatch.undo()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]  # the least numbers that are free
    for descriptor in free:
        os.close(descriptor)
    reader = VideoReader(max_open=100)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
        for path in paths[:7]:
            assert reader.frames(path, [0.0]).shape == (1, 3, 64, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert reader.open_files == paths[4:7]
