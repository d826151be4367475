"""The commands of `manipulators dataset`, as a user types them."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest

from manipulators._options import numbers
from manipulators.cli import build_parser, main
from manipulators.data.dataset import LeRobotDataset
from manipulators.data.recording.writer import LeRobotWriter
from manipulators.errors import InvalidConfigError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with two datasets, of four and of two episodes."""
    features = {
        "observation.images.top": {"dtype": "video", "shape": [32, 32, 3]},
        "action": {"dtype": "float32", "shape": [1], "names": ["x"]},
    }
    for name, lengths in (("a", (2, 3, 2, 3)), ("b", (2, 2))):
        with LeRobotWriter(tmp_path / name, 10, features) as writer:
            for episode, length in enumerate(lengths):
                for step in range(length):
                    picture = np.full((32, 32, 3), 40 * episode + step, dtype=np.uint8)
                    action = np.full(1, 10 * episode + step, dtype=np.float32)
                    writer.add_frame(
                        {"observation.images.top": picture, "action": action}, task=("push", "pull")[episode % 2]
                    )
                writer.end_episode()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def actions(folder):
    return [float(sample["action"][0]) for sample in LeRobotDataset(folder)]


def test_all_in_turn(place, capsys):
    assert main(["dataset", "merge", "a", "b", "--output", "c"]) == 0
    assert capsys.readouterr().out == "a and b merged into c: 6 episodes, 14 frames, instructions: 'push', 'pull'\n"
    chosen = ["--episodes", "0-1,5", "--remove-episodes", "0", "--drop", "observation.images.top"]
    assert main(["dataset", "select", "c", *chosen, "--output", "d"]) == 0
    assert capsys.readouterr().out == "d: 2 episodes, 5 frames, instructions: 'pull'\n"
    assert actions("d") == [10, 11, 12, 10, 11] and LeRobotDataset("d").camera_names == []
    assert main(["dataset", "split", "c", "--fractions", "train=0.5,val=0.25", "test=0.25", "--output", "parts"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "parts/train: 3 episodes",
        "parts/val: 2 episodes",
        "parts/test: 1 episode",
    ]
    assert main(["dataset", "split", "c", "--episodes", "train=0-2,4", "val=3", "--output", "named"]) == 0
    assert actions("named/val") == [30, 31, 32]
    assert main(["dataset", "retask", "d", "--map", "pull=lift the cube"]) == 0
    assert LeRobotDataset("d").tasks == ["lift the cube"]
    assert main(["dataset", "retask", "c", "--task", "go", "--episodes", "1-2", "4", "--output", "e"]) == 0
    assert [s["task"] for s in LeRobotDataset("e")][:4] == ["push", "push", "go", "go"]
    capsys.readouterr()
    assert main(["dataset", "stats", "c", "--check"]) == 1
    assert "observation.images.top: q01 is not recorded" in capsys.readouterr().err
    assert main(["dataset", "stats", "c"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| feature | min | max | mean | std | q01 | q50 | q99 |" and len(table) == 2 + 3 + 1 + 5
    assert next(line for line in table if line.startswith("| action ")).startswith("| action | 0 | 32 | ")
    assert main(["dataset", "stats", "c", "--check", "--features", "action"]) == 0
    assert capsys.readouterr().out.endswith("The statistics of c are those of its data.\n")
    assert sorted(p.name for p in place.iterdir()) == ["a", "b", "c", "cache", "d", "e", "named", "parts"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("select a --episodes 3-1 --output c", "--episodes '3-1' is no number and no range of numbers; write 0-3,7"),
        ("select a --episodes x --output c", "--episodes 'x' is no number"),
        ("select a --episodes 2-9 --output c", "only episodes 0 … 3; there is no 4"),
        ("select a --output a", "It is the source itself"),
        ("select a --rename-map action --output c", "--rename-map 'action' is no pair; write old_name=new_name"),
        ("select nowhere --output c", "There is no folder 'nowhere'"),
        ("split a --fractions train=0.9,val --output c", "--fractions 'val' is no pair; write train=0.9,val=0.1"),
        ("split a --fractions train=most --output c", "could not convert string to float: 'most'; write train=0.9"),
        ("split a --episodes 0-9 --output c", "--episodes '0-9' is no pair; write name=0-9"),
        ("split a --output c", "either fractions"),
        ("merge a --output c", "at least two datasets; got a"),
        ("merge a b", None),
        ("retask a --map push:pull", "write 'old instruction=new instruction'"),
        ("retask a", "one new instruction"),
        ("push a", None),
    ],
)
def test_errors_name_the_option(place, capsys, words, message):
    if message is None:  # argparse's own
        with pytest.raises(SystemExit):
            main(["dataset", *words.split()])
        assert "the following arguments are required" in capsys.readouterr().err
        return
    assert main(["dataset", *words.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (place / "c").exists()


def test_numbers():
    assert numbers("--episodes", ["0-3,7", "9"]) == [0, 1, 2, 3, 7, 9]
    for words in ([], [","], ["1-"], ["-3"], ["1-2-3"]):
        with pytest.raises(InvalidConfigError, match="write 0-3,7"):
            numbers("--episodes", words)


def test_every_option_is_described():
    parser = build_parser()
    actions = parser._subparsers._group_actions[0].choices["dataset"]._subparsers._group_actions[0].choices
    assert list(actions) == ["merge", "split", "select", "retask", "stats", "push"]
    assert all(action.help for command in actions.values() for action in command._actions)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_interrupted(place, capsys, monkeypatch):
    before = files_of(place / "a")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("manipulators.data.editing.retasking._write_json", interrupt)
        assert main(["dataset", "retask", "a", "--task", "lift"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "Stopped. Nothing was finished. To begin again: manipulators dataset retask a --task lift"
    )
    assert sorted(os.listdir(place)) == ["a", "b"] and files_of(place / "a") == before


def test_killed_in_the_middle(place):
    """Nothing half written is left under the name; the same command begins again."""
    slow = (
        "import sys, time\n"
        "from manipulators.data.editing import retasking\n"
        "def wait(*arguments):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "retasking._write_json = wait\n"
        "from manipulators.cli import main\n"
        "sys.exit(main(['dataset', 'retask', 'a', '--task', 'lift']))\n"
    )
    before = files_of(place / "a")
    run = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "writing\n"
    run.kill()
    run.communicate(timeout=60)
    assert files_of(place / "a") == before
    assert main(["dataset", "retask", "a", "--task", "lift"]) == 0
    assert LeRobotDataset("a").tasks == ["lift"]
    assert json.loads((place / "a/meta/info.json").read_text())["total_tasks"] == 1
    assert sorted(os.listdir(place)) == ["a", "b", "cache"]
