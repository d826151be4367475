"""Commands in two processes, started by torch's launcher: one works where one is enough, and all end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manipulators import PolicyPipeline
from manipulators.hub_cards.lint import lint_card

SCRIPT = Path(__file__).with_name("launches.py")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of all launches, and what became of each."""
    folder = tmp_path_factory.mktemp("launches")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "launches.json").read_text())


def printed(launch):
    """What the processes of a launch printed on stderr, progress bars left out."""
    lines = [line for text in launch["stderr"] for line in text.splitlines()]
    return [line for line in lines if line and "episode/s" not in line and "it/s" not in line]


def record_of(folder):
    return json.loads((folder / "training.json").read_text())


def losses(folder):
    return [[e["loss"], e["l1"], e["kl"], e["grad_norm"]] for e in record_of(folder)["log_history"] if "loss" in e]


def test_a_run_of_two_processes_is_one_run(launched):
    folder, launches = launched
    launch, output = launches["whole"], folder / "whole"
    assert launch["status"] == 0
    assert launch["stdout"][0].splitlines()[1] == "Policy, card and results: whole"
    assert (launch["stdout"][1], launch["stderr"][1], printed(launch)) == ("", "", [])
    names = {path.name for path in output.iterdir() if not path.name.startswith("seen")}
    assert names == {
        *("README.md", "checkpoint-8", "config.json", "evaluation.json", "learning_curve.png", "model.safetensors"),
        *("processor_config.json", "training.json"),
    }
    card = (output / "README.md").read_text(encoding="utf-8")
    assert lint_card(card) == []
    assert "| Batch size | 8, in 2 processes |" in card
    training = record_of(output)["training"]
    assert (training["processes"], training["batch_size"], training["steps"]) == (2, 8, 8)
    assert training["hardware"].endswith(", 1 threads in each of 2 processes")
    assert json.loads((output / "evaluation.json").read_text())["episodes"] == 2
    assert record_of(output)["dataset"]["episodes"] == 3
    action = PolicyPipeline.from_pretrained(output, device="cpu")({"observation.state": torch.zeros(1)})
    assert torch.isfinite(action).all()
    assert not (folder / ".whole.lock").exists()


def test_each_process_draws_and_sees_its_own_and_begins_with_the_same_weights(launched):
    one, two = (json.loads((launched[0] / "whole" / f"seen-{i}.json").read_text()) for i in (0, 1))
    assert one["weights"] == two["weights"]
    assert one["drawn"] != two["drawn"]
    assert len({*one["state"], *two["state"]}) > len({*one["state"]})


def test_a_run_whose_process_was_killed_goes_on_to_the_same_bits(launched):
    folder, launches = launched
    launch = launches["killed"]
    assert launch["status"] != 0
    lost, kept, again = printed(launch)
    assert lost.startswith("LostProcessError: Another process of the run has ended without a word")
    command = "manipulators train tiny.yaml --output killed --resume"
    assert kept == f"Stopped. killed/checkpoint-4 is kept. To go on: {command}"
    assert again == "Launch it in 2 processes, as before."
    assert launches["resumed"]["status"] == 0
    assert losses(folder / "killed") == losses(folder / "whole")
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    states = [
        [(folder / name / "checkpoint-8" / f"rng_state_{i}.pth").read_bytes() for i in (0, 1)]
        for name in ("whole", "killed")
    ]
    assert states[0] == states[1]
    assert states[0][0] != states[0][1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("again", "OutputExistsError: whole already exists. Go on with the run that it holds: --resume."),
        ("broken", "InvalidRecipeError: broken.yaml: config has no field 'chunk_sise'."),
        ("eval", "LaunchError: manipulators eval runs in one process, and this is one of 2. Start it without the"),
        ("error", "InvalidConfigError: This process was made to fail."),
    ],
)
def test_an_error_of_one_or_all_processes_ends_all_with_one_message(launched, name, message):
    launch = launched[1][name]
    assert launch["status"] != 0
    assert launch["seconds"] < 60
    assert launch["stdout"] == ["", ""]
    [line] = printed(launch)
    assert line.startswith(message)


def test_a_signal_to_the_launcher_ends_all_although_one_waits_for_the_other(launched):
    launch = launched[1]["stopped"]
    assert launch["status"] != 0
    assert launch["seconds"] < 28  # after 30 s the launcher kills
    command = "manipulators train tiny.yaml --output stopped --resume"
    assert printed(launch) == [
        f"Stopped. stopped/checkpoint-4 is kept. To go on: {command}",
        "Launch it in 2 processes, as before.",
    ]
