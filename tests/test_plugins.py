"""Plugins: what a user adds works wherever a policy or a simulator is named, from the command line too.

test_external_package.py does the same with a package that is installed by pip.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pytest

from manipulators import AutoPolicy, LeRobotDataset, plugins
from manipulators.cli import main
from manipulators.errors import PluginError, UnknownEnvironmentError, UnknownPolicyError
from manipulators.evaluation import registry as environment_registry
from manipulators.evaluation.environments import available_environments, make_environment
from manipulators.modeling import registry
from manipulators.training.runs.recipe import load_recipe

SOURCE = Path(__file__).with_name("toy_plugin.py")
SIMULATOR = Path(__file__).parent / "external" / "toy-robot" / "toy_line.py"
RECIPE = """
policy: linear_policy
plugins: [toy_line, toy_plugin]
data:
  dataset: demonstrations
  record: {environment: toy_line/right, episodes: 2}
config: {chunk_size: 2}
training: {max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, use_cpu: true, disable_tqdm: true}
evaluation: {environment: toy_line/right, episodes: 2, seed: 100}
output: trained
"""


@pytest.fixture
def own_registries(monkeypatch):
    """Everything a plugin of one test registers is forgotten afterwards."""
    available_environments()
    monkeypatch.setattr(environment_registry, "_FAMILIES", dict(environment_registry._FAMILIES))
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    monkeypatch.setattr(plugins, "_loaded", set(plugins._loaded))
    monkeypatch.setattr(plugins, "_complete_for", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


@pytest.fixture
def install(tmp_path, monkeypatch, own_registries):
    """Put a package with an entry point on the path, as pip would: its module's text, and what the entry names."""

    def install(module, text, entry=None, package="my-robot"):
        site = tmp_path / "site"
        metadata = site / f"{package.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[manipulators.plugins]\n{module} = {entry or module}\n")
        (site / f"{module}.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(site)
        return site / f"{module}.py"

    return install


# --- installed packages -----------------------------------------------------------------------------------

REGISTERING = """
    from manipulators import register_environment
    loads.append(1) if "loads" in globals() else globals().update(loads=[1])
    register_environment("installed", print, tasks=["one"])
"""


def test_an_installed_plugin_is_loaded_once_before_a_name_is_looked_up(install):
    install("installed_robot", REGISTERING)
    assert "installed/one" in available_environments()
    assert "installed/one" in available_environments()
    assert sys.modules["installed_robot"].loads == [1]


def test_an_entry_point_may_name_a_callable(install):
    install("called_robot", "calls = []\ndef register():\n    calls.append(1)\n", entry="called_robot:register")
    for _ in range(2):
        with pytest.raises(UnknownPolicyError):
            registry.policy_class("no_such_policy")
    assert sys.modules["called_robot"].calls == [1]


def test_a_plugin_may_look_up_types_while_it_is_loaded(install):
    install(
        "looking_robot",
        "from manipulators import ACTPolicy\n"
        "from manipulators.modeling.registry import policy_class\n"
        "assert policy_class('act_policy') is ACTPolicy\n",
    )
    plugins.load_plugins()
    assert "looking_robot" in sys.modules


def test_a_plugin_inside_a_package_that_is_imported_by_hand(install):
    path = install("packed", "", entry="packed.plugin:register")
    path.unlink()
    package = path.with_suffix("")
    package.mkdir()
    (package / "__init__.py").write_text("from manipulators import ACTPolicy, plugins\nplugins.load_entry_points()\n")
    (package / "plugin.py").write_text(
        "from packed import ACTPolicy, plugins\ndone = []\ndef register(): done.append(1)\n"
    )
    import packed.plugin

    plugins.load_entry_points()
    assert packed.plugin.done == [1]


def test_a_plugin_that_is_imported_by_hand_is_not_loaded_from_within(install):
    install(
        "own_robot",
        "from manipulators import plugins\nplugins.load_entry_points()\ndone = []\ndef register(): done.append(1)\n",
        entry="own_robot:register",
    )
    import own_robot  # looks something up itself, before `register` is defined

    assert own_robot.done == []
    plugins.load_entry_points()
    assert own_robot.done == [1]


def test_a_broken_plugin_is_named_with_its_cause_each_time(install):
    path = install(
        "broken_robot", "from manipulators import ACTPolicy\nimport no_such_library\n", package="broken-robot-package"
    )
    for look_up in (available_environments, lambda: registry.policy_class("act_policy")):
        with pytest.raises(PluginError) as caught:
            look_up()
        assert str(caught.value) == (
            "The plugin 'broken_robot' of the installed package 'broken-robot-package' cannot be loaded from "
            "'broken_robot' (ModuleNotFoundError: No module named 'no_such_library'). "
            "Repair the package, or remove it: pip uninstall broken-robot-package"
        )
    path.write_text("")
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
    assert available_environments()


def test_a_simulator_of_the_users_own_stays(own_registries, monkeypatch):
    """Registered before anything is looked up, under the name of one that comes with the library."""
    monkeypatch.setattr(environment_registry, "_FAMILIES", {})
    environment_registry.register_environment("metaworld", print, tasks=["mine"])
    assert [name for name in available_environments() if name.startswith("metaworld/")] == ["metaworld/mine"]


def test_cameras_reach_the_factory_as_names_and_pixels(own_registries):
    given = []

    def factory(task, horizon, **options):
        given.append((task, horizon, options))
        raise UnknownEnvironmentError("x", "enough.", [])

    environment_registry.register_environment(
        "seen", factory, cameras=["front", "wrist"], options=["light"], horizon=7
    )
    for name, horizon in (("seen/a", None), ("seen/a?camera=wrist,front&size=64&light=dim", 3)):
        with pytest.raises(UnknownEnvironmentError, match="enough"):
            make_environment(name, horizon)
    assert given == [("a", 7, {}), ("a", 3, {"cameras": ("wrist", "front"), "size": 64, "light": "dim"})]


# --- the command line -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the plugins and a recipe, where the recipe has been run by the command."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copy(SOURCE, folder)
    shutil.copy(SIMULATOR, folder)
    (folder / "toy.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(sys, "path", list(sys.path))
        assert main(["train", "toy.yaml"]) == 0
        yield folder


def test_train(workplace):
    assert json.loads((workplace / "trained/config.json").read_text())["model_type"] == "linear_policy"
    result = json.loads((workplace / "trained/evaluation.json").read_text())
    assert (result["environment"], result["episodes"], result["horizon"]) == ("toy_line/right", 2, 12)
    assert json.loads((workplace / "trained/training.json").read_text())["recipe"]["plugins"] == [
        "toy_line",
        "toy_plugin",
    ]
    assert type(AutoPolicy.from_pretrained(workplace / "trained")).__name__ == "LinearPolicy"


TEMPLATE = """
from dataclasses import dataclass
from torch import nn
from manipulators import BasePolicyModel


@dataclass
class PushConfig:
    action_horizon: int = 3


@BasePolicyModel.register("push_template_policy")
class PushPolicy(BasePolicyModel):
    def __init__(self, config: PushConfig):
        super().__init__()
        self.layer = nn.Linear(1, config.action_horizon)

    def forward(self, batch, train=True, **kwargs):
        return self.layer(batch["observation.state"])[..., None]

    def calc_loss(self, batch):
        return nn.functional.mse_loss(self.forward(batch), batch["action"])

    def inference(self, batch):
        return {"action_pred": self.forward(batch)}
"""


def test_a_policy_after_the_template_from_recipe_to_card(workplace, own_registries, capsys):
    """Its own config says what it does not: nothing, and one field."""
    (workplace / "push_template.py").write_text(TEMPLATE)
    recipe = RECIPE.replace("linear_policy", "push_template_policy").replace("toy_plugin", "push_template")
    (workplace / "push.yaml").write_text(recipe.replace("config: {chunk_size: 2}\n", ""))
    assert main(["train", "push.yaml", "--output", "pushed"]) == 0
    assert json.loads((workplace / "pushed" / "config.json").read_text())["custom"] == {"action_horizon": 3}
    assert main(["train", "push.yaml", "--config.action_horizon", "2", "--evaluation", "null", "--output", "two"]) == 0
    assert AutoPolicy.from_pretrained("two").config.action_horizon == 2
    assert main(["train", "push.yaml", "--config.action_horizn", "2", "--output", "none"]) == 1
    assert "Did you mean 'action_horizon'?" in capsys.readouterr().err
    assert main(["card", "pushed"]) == main(["card", "pushed", "--check"]) == 0
    command = re.search(
        r"To repeat the evaluation:\n\n```bash\nmanipulators (.+)\n```", Path("pushed/README.md").read_text()
    )
    again = shlex.split(command[1].replace("path/to/this/folder", "pushed"))
    done = subprocess.run([sys.executable, "-m", "manipulators", *again], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "toy_line/right: success " in done.stdout


def test_record_with_a_camera(workplace, capsys):
    environment = "toy_line/right?camera=front&size=16"
    arguments = ["record", "--plugin", "toy_line", "--env", environment, "--episodes", "1", "--output", "filmed"]
    assert main(arguments) == 0
    assert "1 episodes (5 frames) in filmed" in capsys.readouterr().out
    inputs, _ = LeRobotDataset(workplace / "filmed").policy_features
    assert inputs["observation.images.front"].shape == (3, 16, 16)


def test_eval_in_a_process_of_its_own(workplace):
    """The module lies in the working directory; nothing but the flag names it."""
    arguments = ["eval", "trained", "--env", "toy_line/right", "--episodes", "1", "--device", "cpu"]
    start = "import sys; sys.path.remove(''); from manipulators.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments, "--plugin", "toy_line", "--plugin", "toy_plugin"],
        capture_output=True,
        text=True,
        cwd=workplace,
    )
    assert done.returncode == 0, done.stderr
    assert "toy_line/right: success " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "trained", "converted"],
        ["card", "trained", "--repo-id", "your-lab/toy"],
        ["benchmark", "trained", "--rounds", "1", "--warmup", "0", "--device", "cpu"],
    ],
)
def test_the_other_commands(workplace, arguments):
    assert main([arguments[0], "--plugin", "toy_plugin", *arguments[1:]]) == 0


def test_every_command_takes_plugins_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    commands = {
        "record": ["--env", "x/y", "--output", "z"],
        "train": ["x"],
        "eval": ["x", "--env", "x/y"],
        "benchmark": ["x"],
        "convert": ["x", "y"],
        "convert-dataset": ["x", "y"],
        "card": ["x"],
    }
    for command, arguments in commands.items():
        assert main([command, *arguments, "--plugin", "json", "--plugin", "no_such_module"]) == 1
        assert capsys.readouterr().err.strip() == (
            "PluginError: The plugin 'no_such_module' cannot be imported (ModuleNotFoundError: No module named "
            "'no_such_module'). Name a Python module, as in --plugin my_robot: it must be installed, in the working "
            "directory, or on PYTHONPATH."
        )


def test_a_plugin_of_a_recipe_that_cannot_be_imported(tmp_path, own_registries):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("toy_line, toy_plugin", "no_such_module"))
    with pytest.raises(PluginError, match="'no_such_module'"):
        load_recipe(tmp_path / "mine.yaml")


def test_loading_plugins_needs_nothing_heavy():
    code = (
        "import sys; from manipulators.plugins import load_plugins; load_plugins(['json'])\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
