"""A package from outside, installed by pip: its policy and its simulator work everywhere, in other processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS / "external" / "toy-robot"
RECIPE = """
policy: toy_policy
data:
  dataset: demonstrations
config: {width: 16}
training: {max_steps: 3, per_device_train_batch_size: 2, logging_steps: 1, use_cpu: true, disable_tqdm: true}
evaluation: {environment: toy_line/right, episodes: 2, seed: 100}
output: trained
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A function that runs Python code in a process of its own, in a folder, with the package installed."""
    folder = tmp_path_factory.mktemp("external")
    shutil.copytree(SOURCE, folder / "source")  # pip builds beside what it installs
    site, place = folder / "site", folder / "place"
    arguments = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *arguments, "--target", str(site), str(folder / "source")]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place.mkdir()
    (place / "toy.yaml").write_text(RECIPE)
    paths = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": paths, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def run(code, **more):
        command = [sys.executable, "-c", code] if isinstance(code, str) else [sys.executable, *code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=os.environ | variables | more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.place = place
    return run


@pytest.fixture(scope="module")
def trained(workplace):
    """The folder of a checkpoint that the commands have recorded data for, trained and measured."""
    workplace(
        "from manipulators.cli import main\n"
        "for line in ('record --env toy_line/right --episodes 2 --output demonstrations', 'train toy.yaml'):\n"
        "    assert main(line.split()) == 0, line"
    )
    return workplace.place / "trained"


def test_it_is_as_short_as_promised():
    assert len((SOURCE / "toy_policy.py").read_text().splitlines()) < 80
    assert len((SOURCE / "toy_line.py").read_text().splitlines()) < 60


def test_record_and_train(trained):
    assert json.loads((trained / "config.json").read_text())["model_type"] == "toy_policy"
    processor = json.loads((trained / "processor_config.json").read_text())
    assert (processor["processor_class"], processor["largest"]) == ("ToyProcessor", 5.0)
    result = json.loads((trained / "evaluation.json").read_text())
    assert (result["environment"], result["episodes"]) == ("toy_line/right", 2)
    assert json.loads((trained / "training.json").read_text())["dataset"]["episodes"] == 2
    assert "# Toy" in (trained / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def printed(trained, workplace):
    """What one process prints in which transformers looks for the policy, and then the other commands are run."""
    doors = (
        "import manipulators\n"  # no name of it is taken
        "from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline\n"
        "print(type(AutoConfig.for_model('toy_policy')).__name__)\n"
        "from manipulators import AutoPolicy\n"
        "loaded = [auto.from_pretrained('trained') for auto in (AutoConfig, AutoModel, AutoProcessor, AutoPolicy)]\n"
        "print(*(type(one).__name__ for one in loaded))\n"
        "robot = pipeline('robotics', model='trained', device='cpu')\n"
        "print(tuple(robot({'observation.state': [1.0]}).shape))\n"
    )
    lines = (
        "eval trained --env toy_line/right --episodes 1 --device cpu",
        "convert trained converted",
        "card converted --repo-id your-lab/toy",
        "benchmark converted --rounds 1 --warmup 0 --device cpu",
    )
    commands = f"from manipulators.cli import main\nfor line in {lines!r}:\n    assert main(line.split()) == 0, line"
    return workplace(doors + commands)


def test_transformers_own_doors(printed):
    assert printed.startswith("ToyConfig\nToyConfig ToyPolicy ToyProcessor ToyPolicy\n(1,)\n")


def test_the_other_commands(printed, workplace):
    assert "toy_line/right: success " in printed
    assert (workplace.place / "converted" / "model.safetensors").is_file()


def test_the_policy_passes_the_generic_suite(workplace):
    suite = [str(TESTS / "modeling" / name) for name in ("test_policies.py", "test_adapters.py")]
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "toy_policy", "--rootdir", str(TESTS.parent)]
    printed = workplace([*arguments, *suite], POLICY_CASES=str(SOURCE / "policy_cases.py"))
    assert " passed" in printed and " skipped" not in printed
