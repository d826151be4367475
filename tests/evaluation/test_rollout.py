import json
from pathlib import Path

import numpy as np
import pytest
import torch

from manipulators import __version__
from manipulators.errors import (
    CorruptFileError,
    DifferentEvaluationError,
    DiskFullError,
    FolderInUseError,
    InvalidActionError,
    InvalidEnvironmentError,
    InvalidEvaluationError,
)
from manipulators.evaluation import registry
from manipulators.evaluation.rollout import evaluate
from manipulators.evaluation.simulators.metaworld.environment import expert


class Pipeline:
    """Answer with `act(state)`, (b, s) → (b, a), and keep what it was given."""

    def __init__(self, act):
        self.act, self.resets, self.batches, self.tasks = act, 0, [], []

    def reset(self):
        self.resets += 1

    def __call__(self, observation, task):
        self.batches.append(len(observation["observation.state"]))
        self.tasks.append(task)
        return self.act(torch.from_numpy(observation["observation.state"]))


def always(value):
    return Pipeline(lambda state: torch.full_like(state, value))


def run(pipeline, name, seeds, **options):
    return evaluate(pipeline, name, seeds, progress=False, **options)


def test_statistics_by_hand(line):
    # Half a metre per step from 0 … 4 to 5 takes 10, 8, 6, 4, 2 steps; the horizon is 8.
    result = run(always(0.5), line, [0, 1, 2, 3, 4], num_envs=5)
    assert [episode["length"] for episode in result.per_episode] == [8, 8, 6, 4, 2]
    assert [episode["success"] for episode in result.per_episode] == [False, True, True, True, True]
    assert [episode["return"] for episode in result.per_episode] == [4, 4, 3, 2, 1]
    assert (result.episodes, result.successes, result.success_rate) == (5, 4, 0.8)
    assert result.mean_length == pytest.approx(28 / 5)
    assert result.mean_return == pytest.approx(14 / 5)
    assert result.interval == pytest.approx([0.375535, 0.963776], abs=1e-6)
    assert (result.environment, result.horizon, result.clipped_fraction) == (line, 8, 0)
    assert result.versions == {
        "manipulators": __version__,
        "torch": torch.__version__,
        "simulator": "line 1.0",
    }


def test_a_seed_gives_the_same_episode_in_every_group(line):
    seeds = [4, 0, 13, 7, 2, 11, 3]
    # The step depends on the position, so a wrong observation or a leaked episode would show.
    results = [
        run(Pipeline(lambda state: 0.3 + 0.1 * torch.sin(state)), line, order, num_envs=size, horizon=20)
        for order, size in [(seeds, 1), (seeds, 3), (seeds, 7), (seeds[::-1], 2), (seeds, 50)]
    ]
    episodes = [sorted(result.per_episode, key=lambda episode: episode["seed"]) for result in results]
    assert all(other == episodes[0] for other in episodes[1:])
    assert len({episode["length"] for episode in episodes[0]}) > 3


def test_metaworld_episodes_are_the_same_in_every_group():
    class Expert(Pipeline):
        def __call__(self, observation, task):
            rows = zip(*observation.values(), strict=True)
            return np.stack([self.act(dict(zip(observation, row, strict=True))) for row in rows])

    name, seeds = "metaworld/pick-place-v3", [5, 6, 7]
    act = expert("pick-place-v3")
    alone, together = (run(Expert(act), name, seeds, num_envs=size) for size in (1, 2))
    assert alone.per_episode == together.per_episode
    assert alone.successes == 3


def test_groups_reset_the_pipeline_and_keep_their_batch(line):
    pipeline = always(1.0)
    result = run(pipeline, line, [0, 4, 3], num_envs=2)
    assert pipeline.resets == 2
    assert pipeline.batches == [2] * 5 + [1] * 2  # seed 4 is over after one step, its row stays
    assert pipeline.tasks[0] == ["Go right."] * 2
    assert result.num_envs == 2
    assert result.milliseconds_per_action > 0


def test_clipped_steps_are_counted(line):
    # Position 3 asks for 2 and gets 1; position 4 asks for 1.
    result = run(Pipeline(lambda state: 5 - state), line, [3], num_envs=1)
    assert result.per_episode == [{"seed": 3, "success": True, "return": 2.0, "length": 2}]
    assert result.clipped_fraction == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_action_that_is_not_finite_raises(line, value):
    with pytest.raises(InvalidActionError, match="step 0 of seed 1"):
        run(always(value), line, [1])


def test_a_finished_episode_may_get_any_action(line):
    beyond = Pipeline(lambda state: torch.where(state >= 5, torch.nan, 1.0))
    assert run(beyond, line, [0, 4], num_envs=2).successes == 2


def test_a_wrong_shape_raises(line):
    with pytest.raises(InvalidActionError, match="velocity"):
        run(Pipeline(lambda state: torch.zeros(3)), line, [0])


def test_an_environment_that_hides_success_is_refused(line, monkeypatch):
    step = registry._FAMILIES["line"].factory.step
    monkeypatch.setattr(registry._FAMILIES["line"].factory, "step", lambda self, action: (*step(self, action)[:4], {}))
    with pytest.raises(InvalidEnvironmentError, match="success"):
        run(always(1.0), line, [0])


@pytest.mark.parametrize(
    "arguments", [{"seeds": []}, {"seeds": [1, 1]}, {"seeds": [-1]}, {"seeds": [1], "num_envs": 0}]
)
def test_bad_arguments_raise(line, arguments):
    with pytest.raises(InvalidEvaluationError):
        evaluate(always(1.0), line, progress=False, **arguments)


def test_noise_is_seeded_and_the_random_state_given_back(line):
    noisy = Pipeline(lambda state: torch.rand_like(state))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = run(noisy, line, [0, 1, 2])
    assert torch.equal(torch.rand(1), expected)
    assert run(noisy, line, [0, 1, 2]).per_episode == first.per_episode


def test_results_are_saved_whole(line, tmp_path):
    result = run(always(1.0), line, range(3))
    path = tmp_path / "results" / "line.json"
    result.save(path)
    assert json.loads(path.read_text()) == result.to_dict()
    assert [entry.name for entry in path.parent.iterdir()] == ["line.json"]


def test_another_instruction_reaches_the_pipeline(line):
    own, other = always(1.0), always(1.0)
    assert run(own, line, [4], num_envs=1).task == "Go right."
    assert own.tasks[0] == ["Go right."]
    assert run(other, line, [4], num_envs=1, task="Go left.").task == "Go left."
    assert other.tasks[0] == ["Go left."]


# --- environments that raise, and evaluations that are stopped -------------------------------------------------------


def disturb(monkeypatch, seed, step, change):
    """Replace the result of one step of one seed (step 0: of its reset); return the environments built since."""
    built = []

    class Disturbed(registry._FAMILIES["line"].factory):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            built.append(self)

        def reset(self, *, seed=None, options=None):
            self.seed = seed
            return self.disturbed(super().reset(seed=seed, options=options), 0)

        def step(self, action):
            assert self.seed != "broken", "a broken environment was used again"
            return self.disturbed(super().step(action), self.steps)

        def disturbed(self, result, steps):
            if (self.seed, steps) == (seed, step):
                self.seed = "broken"
                return change(result)
            return result

    monkeypatch.setitem(registry._FAMILIES, "line", registry.Family(Disturbed, tasks=("right",)))
    return built


def crash(result):
    raise RuntimeError("the physics exploded")


def interrupt(result):
    raise KeyboardInterrupt


def observing(value):
    return lambda result: ({"observation.state": np.asarray(value, np.float32)}, *result[1:])


@pytest.mark.parametrize(
    ("step", "change", "error"),
    [
        (2, crash, "RuntimeError: the physics exploded"),
        (0, crash, "RuntimeError: the physics exploded"),
        (2, observing([np.nan]), "ValueError: observation.state is not finite: [nan]"),
        (0, observing([1.0, 2.0]), "ValueError: observation.state has shape (2,), not (1,)"),
        (2, lambda result: (result[0], np.inf, *result[2:]), "ValueError: the reward is inf"),
        (2, lambda result: None, "TypeError: cannot unpack non-iterable NoneType object"),
    ],
)
def test_an_environment_that_raises_ends_its_own_episode_alone(line, monkeypatch, caplog, step, change, error):
    expected = run(always(0.5), line, [1, 2, 3, 4, 6], num_envs=2, horizon=20).per_episode
    built = disturb(monkeypatch, 2, step, change)
    result = run(always(0.5), line, [1, 2, 3, 4, 6], num_envs=2, horizon=20)
    [broken] = [episode for episode in result.per_episode if "error" in episode]
    length = max(step - 1, 0)
    assert broken == {"seed": 2, "success": False, "return": length * 0.5, "length": length, "error": error}
    assert [episode for episode in result.per_episode if episode["seed"] != 2] == [
        episode for episode in expected if episode["seed"] != 2
    ]
    assert (result.episodes, result.successes, result.errors, result.success_rate) == (5, 4, 1, 0.8)
    assert result.error_note == "1 of 5 episodes ended in an error of the environment and count as failed."
    assert f"seed 2 in line/right ended in an error and counts as failed: {error}" in caplog.text
    assert len(built) == 3  # the broken one is replaced


def test_an_environment_that_always_raises_is_no_result(line, monkeypatch, tmp_path):
    monkeypatch.setattr(registry._FAMILIES["line"].factory, "step", lambda self, action: crash(None))
    with pytest.raises(
        InvalidEnvironmentError, match=r"Every episode of line/right ended in .* seed 1 in RuntimeError"
    ):
        run(always(1.0), line, [1, 2, 3], num_envs=2, output=tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("success", ["False", float("nan"), None, 2, [True, False], np.array("yes")])
def test_a_success_that_is_neither_true_nor_false_is_refused(line, monkeypatch, success):
    disturb(monkeypatch, 1, 1, lambda result: (*result[:4], {"success": success}))
    with pytest.raises(InvalidEnvironmentError, match=r"reports success = .* neither true nor false"):
        run(always(1.0), line, [1])


@pytest.mark.parametrize("success", [True, 1, 1.0, np.True_, np.float32(1), np.array([1]), torch.tensor(True)])
def test_a_success_may_be_any_number_that_is_true(line, monkeypatch, success):
    disturb(monkeypatch, 1, 1, lambda result: (*result[:2], True, False, {"success": success}))
    assert run(always(0.0), line, [0, 1]).successes == 1


def noisy():
    return Pipeline(lambda state: 0.3 + 0.2 * torch.rand_like(state))


def without_times(result):
    return {name: value for name, value in result.items() if name not in ("date", "milliseconds_per_action")}


@pytest.mark.parametrize(("seed", "step", "kept", "groups"), [(7, 6, 5, 2), (8, 2, 6, 1)])
def test_a_stopped_evaluation_goes_on_to_the_same_result(line, monkeypatch, tmp_path, seed, step, kept, groups):
    """Seed 9 is solved early: in the group that is cut off at seed 7, it is finished."""
    seeds, output = [3, 4, 1, 2, 7, 9, 8, 6], tmp_path / "deep" / "result.json"
    options = {"num_envs": 2, "horizon": 20, "output": output}
    whole = run(noisy(), line, seeds, **options | {"output": None})
    with monkeypatch.context() as patch:
        disturb(patch, seed, step, interrupt)
        with pytest.raises(KeyboardInterrupt) as stop:
            run(noisy(), line, seeds, **options)
    partial = output.with_name("result.partial.json")
    [note] = stop.value.__notes__
    assert note == f"{kept} of 8 episodes are finished and kept in {partial}: the same evaluation goes on after them."
    record = json.loads(partial.read_text())
    assert (record["episodes"], record["requested_episodes"], len(record["per_episode"])) == (kept, 8, kept)
    with pytest.raises(DifferentEvaluationError, match=r"num_envs is 2 there and 4 here.*rm .*result\.partial"):
        run(noisy(), line, seeds, **options | {"num_envs": 4})
    with pytest.raises(DifferentEvaluationError, match=r"horizon is 20 there and 8 here"):
        run(noisy(), line, seeds, **options | {"horizon": None})
    pipeline = noisy()
    again = run(pipeline, line, seeds, **options)
    assert pipeline.resets == groups  # the groups that were finished are not run again
    assert without_times(again.to_dict()) == without_times(whole.to_dict())
    assert json.loads(output.read_text()) == again.to_dict()
    assert [path.name for path in output.parent.iterdir()] == ["result.json"]


def test_an_error_of_the_pipeline_keeps_finished_episodes(line, tmp_path):
    broken = Pipeline(lambda state: torch.where(state == 3, torch.nan, 1.0))
    with pytest.raises(InvalidActionError) as caught:
        run(broken, line, [4, 3], num_envs=1, output=tmp_path / "result.json")
    assert caught.value.__notes__[0].startswith("1 of 2 episodes are finished and kept")


def test_two_evaluations_do_not_write_one_result(line, monkeypatch, tmp_path):
    def again(result):
        run(always(1.0), line, [1], output=tmp_path / "result.json")

    monkeypatch.setattr("manipulators.evaluation.rollout._settings", lambda *_: again(None))
    with pytest.raises(FolderInUseError, match=r"result\.json is in use by an evaluation"):
        again(None)


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_keeps_what_was_written(line, monkeypatch, tmp_path, after):
    written = []

    def full(path, text):
        written.append(path)
        if len(written) > after:
            raise OSError(28, "No space left on device", str(path))
        Path(path).write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr("manipulators._files.os.replace", lambda source, target: full(target, Path(source).read_text()))
        with pytest.raises(DiskFullError, match=r"result.partial.json could not be written") as caught:
            run(always(1.0), line, [3, 4], num_envs=1, output=tmp_path / "result.json")
    assert len(getattr(caught.value, "__notes__", ())) == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.partial.json"][:after]
    assert run(always(1.0), line, [3, 4], num_envs=1, output=tmp_path / "result.json").successes == 2


def test_what_waits_and_cannot_be_read_is_refused(line, tmp_path):
    for content in ("{", "{}", '{"resume": {"settings": {}, "episodes": [{"seeds": 1}]}}'):
        (tmp_path / "result.partial.json").write_text(content)
        with pytest.raises(CorruptFileError, match=r"result\.partial\.json is not a readable"):
            run(always(1.0), line, [1], output=tmp_path / "result.json")
