import json

import numpy as np
import pytest
import torch

from manipulators import __version__
from manipulators.errors import InvalidActionError, InvalidEnvironmentError, InvalidEvaluationError
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
