import numpy as np
import pytest
from metaworld.env_dict import ENV_CLS_MAP

from manipulators.errors import InvalidActionError, InvalidEvaluationError, UnknownEnvironmentError
from manipulators.evaluation.environments import make_environment
from manipulators.evaluation.simulators.metaworld.environment import MetaWorldEnvironment, expert
from manipulators.evaluation.simulators.metaworld.tasks import INSTRUCTIONS


def bits(observation):
    return np.concatenate([observation["observation.state"], observation["observation.environment_state"]])


def trajectory(environment, seed, steps=30):
    """Observations (steps + 1, 39) under random actions that depend on nothing but this function."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 4)).astype(np.float32)
    observations = [bits(environment.reset(seed=seed)[0])]
    observations += [bits(environment.step(action)[0]) for action in actions]
    return np.stack(observations)


def run_expert(task, seed, horizon=200):
    environment, act = MetaWorldEnvironment(task, horizon=horizon), expert(task)
    observation, _ = environment.reset(seed=seed)
    length, terminated, truncated = 0, False, False
    while not (terminated or truncated):
        observation, _, terminated, truncated, info = environment.step(act(observation))
        length += 1
    return length, terminated, truncated, info


@pytest.mark.parametrize("task", ["pick-place-v3", "drawer-open-v3"])
def test_a_seed_fixes_every_bit(task):
    first = trajectory(MetaWorldEnvironment(task), seed=3)
    used = MetaWorldEnvironment(task)
    other = trajectory(used, seed=4)
    np.testing.assert_array_equal(trajectory(MetaWorldEnvironment(task), seed=3), first)
    np.testing.assert_array_equal(trajectory(used, seed=3), first, err_msg="the past of the object shows")
    assert not np.array_equal(other[0], first[0])


def test_without_a_seed_episodes_differ_and_tell_theirs():
    environment = MetaWorldEnvironment("pick-place-v3")
    environment.reset(seed=0)
    first, info = environment.reset()
    second, _ = environment.reset()
    assert not np.array_equal(bits(first), bits(second))
    np.testing.assert_array_equal(bits(environment.reset(seed=info["seed"])[0]), bits(first))


def test_the_goal_is_visible_and_stays():
    environment = MetaWorldEnvironment("pick-place-v3")
    observations = trajectory(environment, seed=0)
    assert observations[0, -3:].all()
    assert (observations[:, -3:] == observations[0, -3:]).all()


def test_dimensions_and_names_match():
    environment = MetaWorldEnvironment("pick-place-v3")
    spec = environment.environment_spec
    observation, _ = environment.reset(seed=0)
    assert environment.observation_space.contains(observation)
    assert {name: value.shape for name, value in observation.items()} == {
        "observation.state": (4,),
        "observation.environment_state": (35,),
    }
    for feature in spec.features.values():
        assert feature["shape"] == [len(feature["names"])] == [len(feature["units"])]
        assert len(set(feature["names"])) == len(feature["names"])
    assert (spec.fps, spec.horizon, spec.robot_type) == (80, 200, "sawyer")

    numbers = dict(
        zip(spec.features["observation.state"]["names"], observation["observation.state"], strict=True)
    ) | dict(
        zip(
            spec.features["observation.environment_state"]["names"],
            observation["observation.environment_state"],
            strict=True,
        )
    )
    simulator = environment.simulator
    for name, value in {
        "hand": simulator.get_endeff_pos(),
        "object_1": simulator.get_body_com("obj"),
        "goal": simulator._target_pos,
        "previous_hand": simulator.get_endeff_pos(),
    }.items():
        assert [numbers[f"{name}_{axis}"] for axis in "xyz"] == pytest.approx(value, abs=2e-3), name
    assert not any(value for name, value in numbers.items() if name.startswith("object_2"))


def test_the_previous_frame_is_the_previous_frame():
    observations = trajectory(MetaWorldEnvironment("drawer-open-v3"), seed=1)
    np.testing.assert_array_equal(observations[1:, 18:36], observations[:-1, :18])


def test_an_action_of_one_moves_the_hand_s_target_a_centimetre():
    environment = MetaWorldEnvironment("reach-v3")
    environment.reset(seed=0)
    before = environment.simulator.data.mocap_pos[0].copy()
    environment.step(np.array([1, 0.5, 0, 0], np.float32))
    assert environment.simulator.data.mocap_pos[0] - before == pytest.approx([0.01, 0.005, 0])


@pytest.mark.parametrize("task", ["pick-place-v3", "drawer-open-v3"])
@pytest.mark.parametrize("seed", [0, 1, 10_000])
def test_the_expert_succeeds_and_success_ends_the_episode(task, seed):
    length, terminated, truncated, info = run_expert(task, seed)
    assert info["success"] is True
    assert terminated
    assert not truncated
    assert length < 120


def test_the_expert_stays_in_the_action_space():
    environment, act = MetaWorldEnvironment("pick-place-v3"), expert("pick-place-v3")
    action = act(environment.reset(seed=0)[0])
    assert action.dtype == np.float32
    assert environment.action_space.contains(action)


def test_the_horizon_truncates():
    length, terminated, truncated, info = run_expert("pick-place-v3", seed=0, horizon=5)
    assert (length, terminated, truncated, info["success"]) == (5, False, True, False)


@pytest.mark.parametrize("action", [[np.nan, 0, 0, 0], [0, 0, np.inf, 0], [0, 0, 0]])
def test_a_bad_action_raises(action):
    environment = MetaWorldEnvironment("drawer-open-v3")
    environment.reset(seed=0)
    with pytest.raises(InvalidActionError, match="4 finite numbers"):
        environment.step(np.array(action, np.float32))


def test_every_task_has_an_instruction():
    assert set(INSTRUCTIONS) == set(ENV_CLS_MAP)


def test_bad_arguments_raise():
    with pytest.raises(UnknownEnvironmentError, match="pick-place-v3"):
        MetaWorldEnvironment("pick-plaice-v3")
    with pytest.raises(UnknownEnvironmentError, match="drawer-open-v3"):
        expert("drawer-open")
    with pytest.raises(InvalidEvaluationError, match="horizon = 0"):
        MetaWorldEnvironment("pick-place-v3", horizon=0)


def test_a_hidden_goal_leaves_the_instruction_to_say_what_to_do():
    opening, closing = (make_environment(f"metaworld/faucet-{word}-v3?goal=hidden") for word in ("open", "close"))
    assert opening.environment_spec.name == "metaworld/faucet-open-v3?goal=hidden"
    assert opening.reset(seed=0)[0]["observation.environment_state"][-3:].tolist() == [0, 0, 0]
    assert closing.reset(seed=0)[0]["observation.environment_state"][-3:].tolist() == [0, 0, 0]
    assert [each.environment_spec.task for each in (opening, closing)] == ["Open the faucet.", "Close the faucet."]
    with pytest.raises(InvalidEvaluationError, match="goal=seen"):
        make_environment("metaworld/faucet-open-v3?goal=seen")


def test_a_robot_without_a_gripper_is_steered_by_three_numbers():
    environment = make_environment("metaworld/button-press-topdown-v3?gripper=none")
    spec, act = environment.environment_spec, expert("button-press-topdown-v3")
    assert spec.name == "metaworld/button-press-topdown-v3?gripper=none"
    assert spec.action_feature["names"] == ["hand_delta_x", "hand_delta_y", "hand_delta_z"]
    observation, _ = environment.reset(seed=3)
    assert observation["observation.state"].shape == (3,)
    for _ in range(100):
        observation, _, solved, _, _ = environment.step(act(observation))
        if solved:
            break
    assert solved
    with pytest.raises(InvalidActionError, match="expected 3 finite numbers"):
        environment.step(np.zeros(4))
    with pytest.raises(InvalidEvaluationError, match="gripper=closed is neither"):
        make_environment("metaworld/button-press-topdown-v3?gripper=closed")
