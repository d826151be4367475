"""A stream's samples are those of the dataset, each once, and it goes on anywhere."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from manipulators.data.dataset import LeRobotDataset
from manipulators.data.streaming.dataset import StreamingLeRobotDataset
from manipulators.errors import DatasetFormatError, DatasetNotFoundError, InvalidConfigError, StreamError, VideoError

from ..conftest import assert_same_samples, edit_rows, record, record_v2

LENGTHS = (3, 4, 5, 40)


def by_index(samples):
    return sorted(samples, key=lambda sample: int(sample["index"]))


def indices(samples):
    return [int(sample["index"]) for sample in samples]


def record_in_files(root, lengths=LENGTHS, **options):
    return record(root, lengths, data_files_size_in_mb=1e-6, video_files_size_in_mb=1e-6, **options)


WINDOWS = {
    "plain": {},
    "windows": {"action_horizon": 6, "n_obs_steps": 3, "drop_n_last_frames": 2},
    "times": {"delta_timestamps": {"action": [-0.1, 0.0, 0.3], "observation.images.top": [-0.2, 0.0]}},
    "part": {"episodes": [1, 3], "features": ["action", "observation.images.top"], "action_horizon": 4},
    "renamed": {"rename_map": {"observation.state": "observation.environment_state"}, "n_obs_steps": 2},
}


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_samples_are_those_of_the_dataset(tmp_path, options):
    root = record_in_files(tmp_path / "tiny")
    whole, stream = LeRobotDataset(root, **options), StreamingLeRobotDataset(root, shuffle_buffer=8, **options)
    found = list(stream)
    assert indices(found) != sorted(indices(found))
    assert_same_samples(by_index(found), by_index(whole[i] for i in range(len(whole))))


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "images"])
def test_other_layouts(tmp_path, version):
    root = tmp_path / "tiny"
    record(root, use_videos=False) if version == "images" else record_v2(root, version)
    whole, stream = LeRobotDataset(root, n_obs_steps=2), StreamingLeRobotDataset(root, n_obs_steps=2)
    assert_same_samples(by_index(stream), [whole[i] for i in range(7)])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Episodes of 3 to 40 frames, a file each, 52 samples."""
    return record_in_files(tmp_path_factory.mktemp("stream") / "many")


def test_a_pass_has_every_sample_once_in_another_order_than_the_last(many):
    stream = StreamingLeRobotDataset(many, shuffle_buffer=8, features=["action"])
    first, again = indices(stream), indices(stream)
    stream.set_epoch(1)
    second = indices(stream)
    assert first == again != second
    assert sorted(first) == sorted(second) == list(range(52))
    assert indices(itertools.islice(stream.repeat(), 104)) == second + indices(_at(stream, 2))
    assert indices(stream.seeded(1)) != second
    in_order = StreamingLeRobotDataset(many, shuffle_buffer=0, features=["action"])
    assert indices(in_order) == list(range(52))


def _at(stream, epoch):
    stream.set_epoch(epoch)
    return stream


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_share_a_pass(many, processes, workers):
    if workers and processes == 3:
        return
    stream = StreamingLeRobotDataset(many, shuffle_buffer=8, features=["action"])
    shares = []
    for rank in range(processes):
        loader = DataLoader(stream.split(rank, processes), batch_size=4, num_workers=workers)
        shares.append(torch.cat([batch["index"] for batch in loader]).tolist())
    assert sorted(itertools.chain(*shares)) == list(range(52))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("taken", [5, 16, 37, 52])
def test_going_on_in_the_middle_of_a_pass_reads_only_what_is_left(many, taken, monkeypatch):
    options = {"shuffle_buffer": 16, "features": ["action"], "seed": 3}
    stream = StreamingLeRobotDataset(many, **options)
    _at(stream, 2)
    whole = indices(stream)
    samples = iter(stream)
    assert indices(itertools.islice(samples, taken)) == whole[:taken]
    state = stream.state_dict()
    assert state == {"epoch": 2, "samples": taken, "seed": 3}

    other, read = StreamingLeRobotDataset(many, **options), []
    at = other.samples_at
    monkeypatch.setattr(other, "samples_at", lambda positions: read.extend(positions) or at(positions))
    other.load_state_dict(state)
    assert indices(other) == whole[taken:] and len(read) == 52 - taken
    assert indices(other) == whole  # the next pass of the loop begins at its beginning
    with pytest.raises(InvalidConfigError, match="seed is 0, and that of the state is 3"):
        StreamingLeRobotDataset(many).load_state_dict(state)


def test_what_a_stream_does_not_have(many):
    stream = StreamingLeRobotDataset(many, features=["action"])
    for ask in (len, lambda stream: stream[3], lambda stream: stream.__getitems__([3])):
        with pytest.raises(StreamError, match="LeRobotDataset"):
            ask(stream)
    assert stream.num_samples == 52 and "52 frames" in repr(stream)
    assert stream.statistics["action"]["max"].tolist() == [510]
    for wrong in ({"shuffle_buffer": -1}, {"cache_gb": 0}, {"decoded_cache": "x"}):
        with pytest.raises(InvalidConfigError, match=next(iter(wrong))):
            StreamingLeRobotDataset(many, **wrong)
    with pytest.raises(InvalidConfigError, match=r"split\(2, 2\)"):
        stream.split(2, 2)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_that_stay_read_the_pass_that_is_set(many, start):
    stream = StreamingLeRobotDataset(many, shuffle_buffer=8, features=["action"], episodes=[0, 1])
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": start}
    loader = DataLoader(stream, batch_size=None, **workers)
    passes = []
    for epoch in (0, 3):
        stream.set_epoch(epoch)
        passes.append(indices(loader))
    assert passes == [indices(_at(stream, 0)), indices(_at(stream, 3))] and passes[0] != passes[1]


class _AtOnce:
    """A thread that has done its work when it has been started."""

    def __init__(self, target, args, **_):
        self.start = lambda: target(*args)


def test_a_cache_that_is_too_small_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("manipulators.data.streaming.files_on_demand.Thread", _AtOnce)
    stream = StreamingLeRobotDataset(record_in_files(tmp_path / "tiny"), features=["action"], cache_gb=5e-6)
    assert sorted(indices(stream)) == list(range(52))
    assert "cache_gb is too small for the files of shuffle_buffer samples" in caplog.text
    assert stream._cache.size() <= 5000


def test_files_that_are_gone_or_broken_are_named(tmp_path):
    root = record_in_files(tmp_path / "tiny", LENGTHS)
    samples = iter(StreamingLeRobotDataset(root, shuffle_buffer=0))
    assert indices(itertools.islice(samples, 16)) == list(range(16))
    root.rename(tmp_path / "moved")
    with pytest.raises(DatasetNotFoundError, match=r"file-003\.mp4 is not there any more.*--resume"):
        next(samples)
    (tmp_path / "moved").rename(root)

    video = root / "videos/observation.images.top/chunk-000/file-001.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"file-001\.mp4 cannot be decoded.*cut short"):
        list(StreamingLeRobotDataset(root, shuffle_buffer=0))
    video.write_bytes(whole)

    edit_rows(root / "data/chunk-000/file-002.parquet", lambda rows: rows[:-1])
    with pytest.raises(DatasetFormatError, match=r"file-002\.parquet has 4 rows, and its episodes 5"):
        list(StreamingLeRobotDataset(root, shuffle_buffer=0, features=["action"]))
    (root / "data/chunk-000/file-002.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetFormatError, match=r"file-002\.parquet cannot be read as a parquet file"):
        list(StreamingLeRobotDataset(root, shuffle_buffer=0, features=["action"]))
