"""MixtureDataset: shares, order, statistics, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from manipulators import ACTConfig, GR00TN1_5Config, LeRobotDataset, MixtureDataset
from manipulators.data.identity import identity_of
from manipulators.data.mixture import slots_of
from manipulators.data.recording.writer import LeRobotWriter
from manipulators.errors import DatasetIndexError, MixtureError

STATE, ACTION = "observation.state", "action"


def record(root, lengths=(3, 4), width=2, fps=10, cameras=(), first=0.0, names=None):
    """Write a dataset whose states and actions count on from `first`, `width` wide."""
    features = {
        STATE: {"dtype": "float32", "shape": [width], "names": names or [f"j{i}" for i in range(width)]},
        ACTION: {"dtype": "float32", "shape": [width], "names": names or [f"j{i}" for i in range(width)]},
        **{f"observation.images.{name}": {"dtype": "video", "shape": [64, 64, 3]} for name in cameras},
    }
    with LeRobotWriter(root, fps, features) as writer:
        number = first
        for length in lengths:
            for _ in range(length):
                frame = {name: np.full((64, 64, 3), 100, np.uint8) for name in features if "images" in name}
                values = number + np.arange(width, dtype=np.float32)
                writer.add_frame(frame | {STATE: values, ACTION: -values}, task=f"task of {root.name}")
                number += 1
            writer.end_episode()
    return root


@pytest.fixture
def two(tmp_path):
    """Seven samples of width 2 and three of width 3, two actions each."""
    roots = record(tmp_path / "wide", (3, 4)), record(tmp_path / "narrow", (3,), width=3, first=100.0)
    return [LeRobotDataset(root, action_horizon=2) for root in roots]


# --- shares and order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "weights", "by", "slots"),
    [
        ([7, 3], [1, 1], "frames", [7, 3]),  # every sample once
        ([7, 3], [1, 2], "frames", [7, 6]),
        ([7, 3], [1, 1], "dataset", [7, 7]),
        ([70, 5], [0.7, 0.3], "dataset", [70, 30]),  # decimals as they are written: not 71
        ([10, 10, 10], [1, 1, 1], "dataset", [10, 10, 10]),
        ([5, 1, 1], [1, 1, 1], "dataset", [5, 5, 5]),
        ([3, 3, 2], [3, 3, 1.1], "dataset", [6, 5, 2]),  # 5.49, 5.49 and 2.01 of 13: the first is rounded up
        ([100, 1], [99, 1], "dataset", [101, 1]),  # 102 · 0.99 = 100.98
    ],
)
def test_every_dataset_has_its_share_and_is_seen_whole(lengths, weights, by, slots):
    found = slots_of(lengths, weights, by)
    shares = np.array(weights, float) * (np.array(lengths) if by == "frames" else 1)
    shares /= shares.sum()
    assert (found >= lengths).all()
    assert np.abs(found - shares * found.sum()).max() < 1
    assert found.tolist() == slots


def test_a_slot_reads_its_sample_and_every_sample_is_read_equally_often(two):
    mixture = MixtureDataset(two, weights_by="dataset", names=["a", "b"])
    assert (len(mixture), mixture.slots, mixture.shares) == (14, [7, 7], [0.5, 0.5])
    owners, positions = mixture.locate(range(14))
    assert owners.tolist() == [0] * 7 + [1] * 7
    assert positions.tolist() == [*range(7), 0, 0, 0, 1, 1, 2, 2]
    assert mixture[-1][STATE].tolist() == [102.0, 103.0, 104.0]
    samples = mixture.__getitems__([9, 0, 8, 1])
    assert [sample["dataset_index"].item() for sample in samples] == [1, 0, 1, 0]
    assert [sample[STATE][0].item() for sample in samples] == [100.0, 0.0, 100.0, 1.0]
    assert [sample["task"] for sample in samples] == ["task of narrow", "task of wide"] * 2
    assert all("embodiment" not in sample for sample in samples)
    with pytest.raises(DatasetIndexError, match=r"no sample 14: the mixture has samples 0 … 13\."):
        mixture[14]


def test_each_dataset_reads_its_samples_of_a_batch_with_one_call(two, monkeypatch):
    calls = []
    plain = LeRobotDataset.__getitems__
    monkeypatch.setattr(LeRobotDataset, "__getitems__", lambda d, i: calls.append(list(i)) or plain(d, i))
    MixtureDataset(two).__getitems__([8, 0, 9, 3, 7])
    assert calls == [[0, 3], [1, 2, 0]]


def test_any_sampler_honours_the_weights_and_workers_give_the_same_order(two):
    mixture = pickle.loads(pickle.dumps(MixtureDataset(two, [1, 3], names=["a", "b"], embodiments=["x", "y"])))

    def order(**options):
        loader = DataLoader(
            mixture,
            4,
            shuffle=True,
            collate_fn=lambda samples: [(s["embodiment"], s[STATE][0].item()) for s in samples],
            generator=torch.Generator().manual_seed(3),
            **options,
        )
        return [entry for batch in loader for entry in batch]

    once = order()
    assert sorted(once) == sorted([("x", float(i)) for i in range(7)] + [("y", 100.0 + i // 3) for i in range(9)])
    assert order(num_workers=2) == once


# --- what it is to a policy ------------------------------------------------------------------------------------------


def test_cameras_are_those_of_all_and_vectors_the_widest(tmp_path):
    first = LeRobotDataset(record(tmp_path / "a", (2,), cameras=["top"]))
    second = LeRobotDataset(record(tmp_path / "b", (2,), width=3, cameras=["wrist", "top"]))
    mixture = MixtureDataset([first, second], embodiments=["x", "y"])
    inputs, outputs = mixture.policy_features
    assert {name: feature.shape for name, feature in inputs.items()} == {
        STATE: (3,),
        "observation.images.top": (3, 64, 64),
        "observation.images.wrist": (3, 64, 64),
    }
    assert outputs[ACTION].shape == (3,)
    config = GR00TN1_5Config.for_dataset(mixture)
    assert config.optional_cameras == ("observation.images.wrist",)
    assert (config.embodiment_tag, config.embodiment_ids["x"], config.embodiment_ids["y"]) == ("x", 0, 1)
    with pytest.raises(MixtureError, match=r"action has 2 dimensions in a, 3 in b.*ACT has one width"):
        ACTConfig.for_dataset(mixture, inputs=["observation.images.top"])
    alone = ACTConfig.for_dataset(MixtureDataset([first]), chunk_size=1)
    assert alone.optional_cameras == ()


def test_joint_statistics_are_those_of_all_frames(tmp_path):
    roots = record(tmp_path / "a", (3, 4)), record(tmp_path / "b", (5,), first=100.0)
    mixture = MixtureDataset([LeRobotDataset(root) for root in roots], [1, 7])
    values = np.concatenate([np.arange(7), np.arange(100, 105)])[:, None] + np.arange(2)
    found = mixture.statistics[STATE]
    assert found["count"].tolist() == [12]
    expected = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    expected |= {"q01": np.quantile(values, 0.01, axis=0), "q90": np.quantile(values, 0.9, axis=0)}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_each_robot_has_the_statistics_of_its_datasets(tmp_path, two):
    third = LeRobotDataset(record(tmp_path / "more", (1,), first=20.0), action_horizon=2)
    mixture = MixtureDataset([*two, third], embodiments=["x", "y", "x"])
    assert mixture.robots == {"x": ["wide", "more"], "y": ["narrow"]}
    assert mixture.embodiment_statistics["x"][STATE]["max"].tolist() == [20.0, 21.0]
    assert mixture.embodiment_statistics["y"][STATE]["max"].tolist() == [102.0, 103.0, 104.0]
    with pytest.raises(MixtureError, match=r"different widths in wide, narrow, more.*processor_fields"):
        _ = mixture.statistics


def test_another_share_is_another_identity(two):
    plain, again = identity_of(MixtureDataset(two)), identity_of(MixtureDataset(two))
    weighted = identity_of(MixtureDataset(two, [1, 2]))
    assert plain == again
    assert plain["mixture"]["narrow"]["samples_of_epoch"] == 3
    assert weighted["mixture"]["narrow"]["samples_of_epoch"] == 6
    assert identity_of(MixtureDataset(two[::-1]))["order"] != plain["order"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2", None, True])
def test_a_weight_is_a_number_above_0(two, weight):
    with pytest.raises(MixtureError, match=rf"The weight of narrow is {weight!r}; a weight is a number above 0"):
        MixtureDataset(two, [1, weight])


def test_what_is_no_mixture(two, tmp_path):
    cases = {
        r"no datasets": {"datasets": []},
        r"made of LeRobotDatasets; got list": {"datasets": [[1, 2]]},
        r"twice, with episode 0 in both": {"datasets": [two[0], LeRobotDataset(two[0].root, action_horizon=2)]},
        r"2 datasets and 1 weights: \[1\]": {"datasets": two, "weights": [1]},
        r"Two datasets have one name: a, a": {"datasets": two, "names": ["a", "a"]},
        r"weights_by='steps' is unknown": {"datasets": two, "weights_by": "steps"},
        r"wide has samples of 2 actions, other of 3": {
            "datasets": [two[0], LeRobotDataset(record(tmp_path / "other"), action_horizon=3)]
        },
        r"control rates: wide 10 Hz, fast 30 Hz\. .*such as 10": {
            "datasets": [two[0], LeRobotDataset(record(tmp_path / "fast", fps=30), action_horizon=2)]
        },
    }
    for message, arguments in cases.items():
        with pytest.raises(MixtureError, match=message):
            MixtureDataset(**arguments)


def test_two_halves_of_one_dataset_are_no_duplicates(two):
    halves = [LeRobotDataset(two[0].root, episodes=[i]) for i in (0, 1)]
    assert len(MixtureDataset(halves, [1, 2])) == 3 + 8


def test_datasets_of_another_rate_are_read_at_a_common_one(tmp_path):
    slow = LeRobotDataset(record(tmp_path / "slow", (4,)), action_horizon=2)
    fast = LeRobotDataset(
        record(tmp_path / "fast", (7,), fps=30), delta_timestamps={ACTION: [0.0, 0.1]}, drop_n_last_frames=3
    )
    mixture = MixtureDataset([slow, fast])
    assert mixture.fps == 10
    assert mixture[1][ACTION][:, 0].tolist() == [-1.0, -2.0]
    assert mixture[5][ACTION][:, 0].tolist() == [-1.0, -4.0]  # every third frame


def test_dimensions_in_another_order_are_no_joint_statistics(tmp_path):
    roots = record(tmp_path / "a", names=["x", "y"]), record(tmp_path / "b", names=["y", "x"], first=9.0)
    mixture = MixtureDataset([LeRobotDataset(root) for root in roots])
    with pytest.raises(MixtureError, match=r"names \['x', 'y'\] in a and \['y', 'x'\] in b"):
        ACTConfig.for_dataset(mixture, chunk_size=1)
    named = MixtureDataset(mixture.datasets, embodiments=["x", "y"])
    with pytest.raises(MixtureError, match=r"names \['x', 'y'\] in a and"):  # ACT does not tell robots apart
        ACTConfig.for_dataset(named, chunk_size=1)


def test_a_state_that_some_lack(tmp_path):
    one, other = (LeRobotDataset(record(tmp_path / name)) for name in "ab")
    without = LeRobotDataset(other.root, features=[ACTION])
    with pytest.raises(MixtureError, match=r"b lacks observation\.state, which a has: only cameras"):
        _ = MixtureDataset([one, without]).policy_features
