import json

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from manipulators import LeRobotDataset
from manipulators.errors import (
    InvalidActionError,
    InvalidEvaluationError,
    MissingExpertError,
    OutputExistsError,
    UnreliableExpertError,
)
from manipulators.evaluation.demonstrations import record_demonstrations
from manipulators.evaluation.registry import register_environment
from manipulators.evaluation.simulators.metaworld.environment import MetaWorldEnvironment, expert


def rows(root):
    """All frames of a dataset, as lists by column."""
    tables = [parquet.read_table(path) for path in sorted((root / "data").rglob("*.parquet"))]
    return pyarrow.concat_tables(tables).to_pydict()


def test_two_episodes_replay_bit_by_bit(tmp_path):
    root = tmp_path / "pick-place"
    result = record_demonstrations("metaworld/pick-place-v3", 2, root, seed=3, progress=False)
    assert (result.episodes, result.failures, result.seeds, result.failed_seeds) == (2, 0, [3, 4], [])
    assert result.seconds > 0

    frames = rows(root)
    assert len(frames["action"]) == result.frames
    environment, act = MetaWorldEnvironment("pick-place-v3"), expert("pick-place-v3")
    row = 0
    for index, seed in enumerate(result.seeds):
        observation, _ = environment.reset(seed=seed)
        terminated = False
        while not terminated:
            assert frames["episode_index"][row] == index
            for name, value in observation.items():
                np.testing.assert_array_equal(np.float32(frames[name][row]), value)
            action = np.float32(frames["action"][row])
            np.testing.assert_array_equal(action, act(observation))
            observation, _, terminated, _, _ = environment.step(action)
            row += 1
    assert row == result.frames

    metadata = json.loads((root / "meta" / "info.json").read_text())
    assert (metadata["fps"], metadata["robot_type"], metadata["total_episodes"]) == (80, "sawyer", 2)
    assert metadata["features"]["action"]["shape"] == [4]


def test_failures_are_left_out_and_further_seeds_tried(line, tmp_path):
    root = tmp_path / "line"
    result = record_demonstrations(line, 5, root, progress=False)
    assert (result.episodes, result.failures) == (5, 2)
    assert (result.seeds, result.failed_seeds) == ([1, 2, 3, 4, 6], [0, 5])
    assert result.frames == 4 + 3 + 2 + 1 + 4
    frames = rows(root)
    assert frames["episode_index"] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4]
    np.testing.assert_array_equal(np.ravel(frames["action"]), 1)  # the expert asked for 4


def test_an_expert_that_mostly_fails_raises(line, tmp_path):
    with pytest.raises(UnreliableExpertError, match="failed 3 of 3"):
        record_demonstrations(line, 2, tmp_path / "line", expert=lambda observation: np.array([-1.0]), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_not_overwritten(line, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExistsError):
        record_demonstrations(line, 1, tmp_path / "taken", seed=4, progress=False)


@pytest.mark.parametrize("action", [np.array([np.nan]), np.zeros(2)])
def test_a_bad_action_of_the_expert_raises(line, tmp_path, action):
    with pytest.raises(InvalidActionError, match="step 0 of seed 0"):
        record_demonstrations(line, 1, tmp_path / "line", expert=lambda observation: action, progress=False)


def test_no_episodes_is_refused(line, tmp_path):
    with pytest.raises(InvalidEvaluationError, match="episodes = 0"):
        record_demonstrations(line, 0, tmp_path / "line", progress=False)


def test_a_negative_seed_is_refused(line, tmp_path):
    with pytest.raises(InvalidEvaluationError, match="seed -1 is negative"):
        record_demonstrations(line, 1, tmp_path / "line", seed=-1, progress=False)


def test_several_environments_make_a_dataset_of_several_instructions(tmp_path):
    root = tmp_path / "faucet"
    names = [f"metaworld/faucet-{word}-v3?goal=hidden" for word in ("open", "close")]
    result = record_demonstrations(names, 2, root, progress=False)
    assert (result.episodes, result.seeds) == (4, [0, 1, 0, 1])
    dataset = LeRobotDataset(root, action_horizon=1)
    assert sorted(dataset.tasks) == ["Close the faucet.", "Open the faucet."]
    instructions = {
        int(sample["episode_index"]): sample["task"] for sample in dataset.__getitems__(range(len(dataset)))
    }
    assert instructions == {
        0: "Open the faucet.",
        1: "Open the faucet.",
        2: "Close the faucet.",
        3: "Close the faucet.",
    }


def test_environments_with_other_features_do_not_share_a_dataset(line, tmp_path):
    with pytest.raises(InvalidEvaluationError, match="cannot share a dataset"):
        record_demonstrations([line, "metaworld/reach-v3"], 1, tmp_path / "both", progress=False)
    assert not (tmp_path / "both").exists()


def test_a_missing_expert_is_missed_before_anything_is_written(line, tmp_path):
    register_environment("silent", lambda task, horizon: None)
    with pytest.raises(MissingExpertError, match="'silent/any' has no scripted expert"):
        record_demonstrations([line, "silent/any"], 1, tmp_path / "both", progress=False)
    assert not (tmp_path / "both").exists()
