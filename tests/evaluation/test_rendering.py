import subprocess
import sys

import numpy as np
import pytest

from manipulators.errors import InvalidEvaluationError
from manipulators.evaluation import rendering
from manipulators.evaluation.demonstrations import record_demonstrations
from manipulators.evaluation.environments import describe_environment, make_environment
from manipulators.evaluation.simulators.metaworld.environment import MetaWorldEnvironment

NAME = "metaworld/pick-place-v3?camera=corner2,topview&size=48"
CORNER2 = "observation.images.corner2"


@pytest.fixture
def environment(renderer):
    """Pick-place with two small cameras."""
    environment = make_environment(NAME)
    yield environment
    environment.close()


def red(picture):
    """Where the arm is: (rows, columns) of strongly red pixels."""
    r, g, b = np.moveaxis(picture.astype(int), -1, 0)
    return np.nonzero((r > 120) & (g < 70) & (b < 70))


def test_a_camera_is_a_feature_and_an_observation(environment):
    observation, _ = environment.reset(seed=0)
    assert environment.observation_space.contains(observation)
    assert {name: value.shape for name, value in observation.items()} == {
        "observation.state": (4,),
        "observation.environment_state": (35,),
        CORNER2: (48, 48, 3),
        "observation.images.topview": (48, 48, 3),
    }
    assert environment.environment_spec.name == NAME
    assert environment.environment_spec.features[CORNER2] == {
        "dtype": "video",
        "shape": [48, 48, 3],
        "names": ["height", "width", "channel"],
    }
    assert environment.step(np.zeros(4))[0][CORNER2].std() > 20  # something is seen


def test_without_a_size_pictures_have_96_pixels(renderer):
    spec = describe_environment("metaworld/reach-v3?camera=corner2")
    assert spec.features[CORNER2]["shape"] == [96, 96, 3]
    assert spec.name == "metaworld/reach-v3?camera=corner2&size=96"


def test_the_picture_stands_upright(environment):
    """The arm stands on the floor: when the hand rises, it moves up in the picture."""
    before = environment.reset(seed=0)[0][CORNER2]
    for _ in range(25):
        after = environment.step(np.array([0, 0, 1, 0], np.float32))[0][CORNER2]
    moved = np.abs(before.astype(int) - after).sum(-1) > 60
    assert moved.any()
    assert red(after)[0].mean() < red(before)[0].mean()
    assert before[:8].mean() < 60 < before[-8:].mean()  # the dark above, the floor below


def test_a_seed_fixes_every_pixel_whoever_draws(environment):
    first = environment.reset(seed=3)[0][CORNER2]
    other = make_environment(NAME)
    environment.reset(seed=4)
    np.testing.assert_array_equal(other.reset(seed=3)[0][CORNER2], first)
    np.testing.assert_array_equal(environment.reset(seed=3)[0][CORNER2], first)
    assert not np.array_equal(environment.reset(seed=4)[0][CORNER2], first)
    other.close()


def test_cameras_change_no_number(environment):
    plain = MetaWorldEnvironment("pick-place-v3")
    action = np.array([0.3, -0.2, 0.1, 1], np.float32)
    plain.reset(seed=1), environment.reset(seed=1)
    for _ in range(5):
        expected, seen = plain.step(action)[0], environment.step(action)[0]
        for name, value in expected.items():
            np.testing.assert_array_equal(seen[name], value)


def test_environments_of_a_task_share_one_context_and_the_last_closes_it(environment):
    other = make_environment("metaworld/pick-place-v3?camera=corner2&size=64")
    assert other._drawing() is environment._drawing()
    shared = other._drawing()
    users = shared.users
    other.close()
    other.close()
    assert shared.users == users - 1
    while shared.users:
        rendering.release(shared)
    assert shared not in rendering._SHARED.values()
    environment._renderer = None
    assert environment.render().shape == (240, 240, 3)  # a new one is made


def test_a_size_that_cannot_be_drawn_is_refused(renderer):
    for size in (0, 47, 4000):
        with pytest.raises(InvalidEvaluationError, match=f"size = {size} pixels"):
            make_environment(f"metaworld/reach-v3?camera=corner2&size={size}")


def test_state_policies_load_no_opengl():
    code = (
        "import os, sys\n"
        "from manipulators.evaluation.environments import make_environment\n"
        "make_environment('metaworld/reach-v3').reset(seed=0)\n"
        "assert 'OpenGL' not in sys.modules and 'MUJOCO_GL' not in os.environ\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_renderer_the_last_line_says_what_to_install():
    code = (
        "import sys\n"
        "from manipulators.errors import MissingRendererError\n"
        "from manipulators.evaluation import rendering\n"
        "from manipulators.evaluation.environments import make_environment\n"
        "rendering.HEADLESS_PLATFORMS = ('glfw.nothing', 'osmesa.nothing')\n"
        "try: make_environment('metaworld/reach-v3?camera=corner2')\n"
        "except MissingRendererError as error: sys.stdout.write(str(error))\n"
    )
    env = {"PATH": "", "MUJOCO_GL": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert "osmesa.nothing: " in lines[0], done.stderr
    assert lines[-1].startswith("On Debian or Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri")


def test_demonstrations_hold_what_the_camera_saw(renderer, tmp_path):
    from manipulators.data.dataset import LeRobotDataset

    root = tmp_path / "reach"
    result = record_demonstrations("metaworld/reach-v3?camera=corner2&size=48", 1, root, progress=False)
    dataset = LeRobotDataset(root, features=[CORNER2, "observation.state", "action"])
    assert len(dataset) == result.frames
    environment = make_environment("metaworld/reach-v3?camera=corner2&size=48")
    seen = environment.reset(seed=0)[0][CORNER2]
    environment.close()
    kept = dataset[0][CORNER2].permute(1, 2, 0).numpy()
    assert np.abs(kept.astype(int) - seen).mean() < 10  # the video is lossy
    assert np.corrcoef(kept.ravel(), seen.ravel())[0, 1] > 0.95
