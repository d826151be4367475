import json
import re
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from manipulators import LeRobotDataset
from manipulators.data.recording.place import count_kept_episodes
from manipulators.errors import (
    DifferentRecordingError,
    InvalidEnvironmentError,
    InvalidEvaluationError,
    MissingExpertError,
    OutputExistsError,
    UnreliableExpertError,
)
from manipulators.evaluation import registry
from manipulators.evaluation.demonstrations import record_demonstrations
from manipulators.evaluation.environments import make_expert
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
def test_an_expert_that_always_gives_bad_actions_raises(line, tmp_path, action):
    message = r"failed 0 of 2 episodes .* 2 more ended in an error, .* InvalidActionError: .* step 0 of seed 1"
    with pytest.raises(UnreliableExpertError, match=message):
        record_demonstrations(line, 1, tmp_path / "line", expert=lambda observation: action, progress=False)
    assert not list(tmp_path.iterdir())


def disturbed(line, monkeypatch, seed, step, disturb):
    """Disturb the environment at one step of one seed; return the number of environments built since."""
    built = []

    class Disturbed(registry._FAMILIES["line"].factory):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            built.append(self)
            self.seed = None

        def reset(self, *, seed=None, options=None):
            self.seed = seed
            return super().reset(seed=seed, options=options)

        def step(self, action):
            assert self.seed != "broken", "a broken environment was used again"
            if (self.seed, self.steps) == (seed, step):
                self.seed = "broken"
                return disturb(super().step(action))
            return super().step(action)

    register_environment("line", Disturbed, tasks=["right"], expert=lambda task: lambda observation: np.array([1.0]))
    return built


def crash(result):
    raise RuntimeError("the physics exploded")


def interrupt(result):
    raise KeyboardInterrupt


def nan(result):
    return ({"observation.state": np.array([np.nan], np.float32)}, *result[1:])


def wide(result):
    return ({"observation.state": np.zeros(2, np.float32)}, *result[1:])


@pytest.mark.parametrize(
    ("disturb", "problem"),
    [
        (crash, "RuntimeError: the physics exploded"),
        (nan, "InvalidFrameError: observation.state is not finite"),
        (wide, r"InvalidFrameError: observation.state has shape \(2,\)"),
    ],
)
def test_a_broken_episode_is_left_out_alone(line, tmp_path, monkeypatch, caplog, disturb, problem):
    built = disturbed(line, monkeypatch, seed=2, step=1, disturb=disturb)
    result = record_demonstrations(line, 3, tmp_path / "line", progress=False)
    assert (result.seeds, result.broken_seeds, result.failed_seeds, result.failures) == ([0, 1, 3], [2], [], 0)
    assert re.search(f"The episode of seed 2 in line/right is left out: {problem}", caplog.text)
    assert len(built) == 2  # another one after the error
    assert rows(tmp_path / "line")["observation.state"] == [0, 1, 2, 3, 4, 1, 2, 3, 4, 3, 4]


def test_a_stopped_recording_goes_on_where_it_was(line, tmp_path, monkeypatch):
    """Two environments, failures and an error before and after the interrupt: the same files as in one run."""
    names, options = [line, line], {"seed": 3, "progress": False}
    expert = make_expert(line)  # fails from position 0: seeds 5 and 10
    with monkeypatch.context() as patch:
        disturbed(line, patch, 4, 0, crash)
        whole = record_demonstrations(names, 4, tmp_path / "whole", expert=expert, **options)
        environment = registry._FAMILIES["line"].factory
        step, steps = environment.step, []

        def counted(self, action):
            steps.append(action)
            if len(steps) == 24:  # in the second environment
                raise KeyboardInterrupt
            return step(self, action)

        patch.setattr(environment, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            record_demonstrations(names, 4, tmp_path / "line", expert=expert, **options)
        assert count_kept_episodes(tmp_path / "line") == 5
        with pytest.raises(DifferentRecordingError, match="episodes is 4, 1 there and 3 here"):
            record_demonstrations(names, 3, tmp_path / "line", expert=expert, **options)
        with pytest.raises(DifferentRecordingError, match="episodes is 4, 1 there and 5 here"):
            record_demonstrations(names, 5, tmp_path / "line", expert=expert, **options)
        for changed in ({"seed": 2}, {"horizon": 7}):
            with pytest.raises(DifferentRecordingError, match=f"origin {next(iter(changed))}"):
                record_demonstrations(names, 4, tmp_path / "line", expert=expert, **options | changed)
        again = record_demonstrations(names, 4, tmp_path / "line", expert=expert, **options)
    assert (again.resumed, whole.resumed) == (5, 0)
    assert whole.seeds == [3, 6, 7, 8] * 2 and whole.broken_seeds == [4, 4] and whole.failed_seeds == [5, 5]
    ignored = {"output": "", "seconds": 0, "resumed": 0}
    assert replace(again, **ignored) == replace(whole, **ignored)
    one, other = (
        {p.relative_to(r): p.read_bytes() for p in r.rglob("*.*")} for r in (tmp_path / "whole", tmp_path / "line")
    )
    assert one == other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line", "whole"]


def test_fewer_or_more_episodes_of_one_environment_may_be_asked_for(line, tmp_path, monkeypatch):
    disturbed(line, monkeypatch, 3, 0, interrupt)
    with pytest.raises(KeyboardInterrupt):
        record_demonstrations(line, 50, tmp_path / "line", progress=False)
    result = record_demonstrations(line, 3, tmp_path / "line", progress=False)
    assert (result.episodes, result.resumed, result.seeds) == (3, 3, [0, 1, 2])


@pytest.mark.parametrize("success", ["False", float("nan"), None, 0.5])
def test_a_success_that_is_neither_true_nor_false_is_refused(line, tmp_path, monkeypatch, success):
    disturbed(line, monkeypatch, 1, 0, lambda result: (*result[:4], {"success": success}))
    with pytest.raises(InvalidEnvironmentError, match=r"line/right reports success = .*neither true nor false"):
        record_demonstrations(line, 2, tmp_path / "line", progress=False)
    assert count_kept_episodes(tmp_path / "line") == 1


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
