import subprocess
import sys

import numpy as np
import pytest
from gymnasium import Env
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode

from manipulators import errors
from manipulators.evaluation import simulators
from manipulators.evaluation.environments import (
    available_environments,
    describe_environment,
    make_environment,
    make_environments,
    make_expert,
)
from manipulators.evaluation.registry import register_environment


def test_names_are_known_without_the_simulator():
    code = (
        "import sys; sys.modules['metaworld'] = None\n"
        "from manipulators.evaluation.environments import available_environments, make_environment\n"
        "from manipulators.errors import MissingSimulatorError\n"
        "names = [name for name in available_environments() if name.startswith('metaworld/')]\n"
        "assert len(names) == 50 and 'gymnasium' not in sys.modules\n"
        "try: make_environment('metaworld/pick-place-v3')\n"
        "except MissingSimulatorError as error: sys.stdout.write(str(error))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == 'pip install "manipulators[sim]"'


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("metaworld/pick-place", "metaworld/pick-place-v3"),
        ("metawurld/drawer-open-v3", "metaworld/drawer-open-v3"),
        ("drawer-open-v3", "metaworld/drawer-open-v3"),
        ("metaworld/", "<family>/<task>"),
    ],
)
def test_an_unknown_name_raises_with_the_nearest(name, suggestion):
    with pytest.raises(errors.UnknownEnvironmentError, match=suggestion):
        make_environments(name, 2)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("metaworld/pick-place-v3?camra=corner2", r"no option 'camra'.*camera="),
        ("metaworld/pick-place-v3?camera=", "needs one value"),
        ("metaworld/pick-place-v3?camera=corner&camera=corner2", "needs one value"),
        ("line/right?size=96", "no option 'size'"),
    ],
)
def test_an_option_that_is_not_understood_raises(line, name, problem):
    with pytest.raises(errors.UnknownEnvironmentError, match=problem):
        make_environment(name)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("camera=korner2", "Did you mean 'corner2'"),
        ("camera=corner2,corner2", "named twice"),
        ("camera=corner2&size=big", "size=big"),
        ("size=96", r"camera=corner2&size=96"),
    ],
)
def test_a_camera_that_cannot_be_drawn_raises(options, problem):
    with pytest.raises(errors.InvalidEvaluationError, match=problem):
        make_environment(f"metaworld/pick-place-v3?{options}")


def test_options_reach_the_factory_as_text(line):
    given = {}

    def factory(task, horizon, **options):
        given.update(options)
        return make_environment(line)

    register_environment("optional", factory, options=["speed", "colour"], expert=lambda task: task)
    make_environment("optional/any?speed=2&colour=dark%20red")
    assert given == {"speed": "2", "colour": "dark red"}
    assert make_expert("optional/any?speed=2") == "any"


def test_a_registered_family_is_made_described_and_listed(line):
    assert line in available_environments()
    vector = make_environments(line, num_envs=3)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    observation, _ = vector.reset(seed=[1, 2, 13])
    np.testing.assert_array_equal(observation["observation.state"], [[1], [2], [3]])
    spec = describe_environment(line, horizon=3)
    assert (spec.horizon, spec.fps, spec.task) == (3, 10, "Go right.")
    assert list(spec.observation_features) == ["observation.state"]
    assert spec.action_feature["names"] == ["velocity"]


def test_a_family_without_expert_says_what_to_do(line):
    register_environment("silent", lambda task, horizon: None)
    with pytest.raises(errors.MissingExpertError, match="expert="):
        make_expert("silent/any")


@pytest.mark.parametrize(("num_envs", "horizon"), [(0, None), (1, 0)])
def test_impossible_counts_raise(line, num_envs, horizon):
    with pytest.raises(errors.InvalidEvaluationError, match="at least 1"):
        make_environments(line, num_envs, horizon)


def test_an_environment_without_our_names_is_refused(line):
    class Bare(Env):
        observation_space = action_space = Box(-1, 1, (1,))

    register_environment("bare", lambda task, horizon: Bare())
    with pytest.raises(errors.InvalidEnvironmentError, match="environment_spec"):
        make_environment("bare/any")

    class Unnamed(Bare):
        environment_spec = describe_environment(line)

    register_environment("unnamed", lambda task, horizon: Unnamed())
    with pytest.raises(errors.InvalidEnvironmentError, match=r"spaces\.Dict"):
        make_environment("unnamed/any")


def test_a_simulator_is_one_new_file(line, tmp_path, monkeypatch):
    (tmp_path / "dropped.py").write_text(
        "from ..registry import register_environment\n"
        "register_environment('dropped', lambda task, horizon: None, tasks=['in'], horizon=3)\n"
    )
    monkeypatch.setattr(simulators, "__path__", [*simulators.__path__, str(tmp_path)])
    assert "dropped/in" in available_environments()
    assert len([name for name in available_environments() if name.startswith("metaworld/")]) == 50


@pytest.mark.parametrize("horizon", [0, -1])
def test_a_familys_impossible_horizon_is_refused(line, horizon):
    with pytest.raises(errors.InvalidEnvironmentError, match=f"horizon of 'short' is {horizon}"):
        register_environment("short", print, horizon=horizon)


@pytest.mark.parametrize(("family", "factory"), [("a/b", print), ("", print), ("a", None)])
def test_a_bad_registration_is_refused(family, factory):
    with pytest.raises(errors.InvalidEnvironmentError):
        register_environment(family, factory)
