"""The README: its Python runs, its commands parse, its files exist."""

import ast
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import manipulators
from manipulators import (
    ACTConfig,
    ACTPolicy,
    LeRobotDataset,
    LeRobotWriter,
    PolicyPipeline,
    PolicyProcessor,
    record_demonstrations,
)
from manipulators.cli import _overrides, build_parser, main, train
from manipulators.configuration import composed
from manipulators.evaluation import registry
from manipulators.evaluation.environments import available_environments
from manipulators.modeling import components
from manipulators.modeling import registry as policy_registry
from manipulators.training.runs.recipe import load_recipe

ROOT = Path(manipulators.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def command_lines():
    """Every `manipulators …` line, from shell blocks (continued lines joined) and from code spans."""
    shell = "\n".join(blocks("bash")).replace("\\\n", " ")
    shell = re.sub(r"^(?:torchrun|accelerate launch) .*? -m (?=manipulators )", "", shell, flags=re.MULTILINE)
    lines = [line.partition(" # ")[0].strip() for line in shell.splitlines() if line.startswith("manipulators ")]
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    return lines + [span for span in re.findall(r"`([^`\n]+)`", prose) if span.startswith("manipulators ")]


def filled(line):
    """Replace what a reader has to fill in, and leave out what is in brackets."""
    line = re.sub(r"\[--section\.field value …\]", "--training.max_steps 5", line)
    line = re.sub(r"\[(--[\w-]+)\]", r"\1", line)
    for placeholder, value in {
        "DIR": "some/folder",
        "SOURCE": "org/name",
        "SRC": "org/name",
        "DST": "some/folder",
    }.items():
        line = re.sub(rf"\b{placeholder}\b", value, line)
    return re.sub(r"\bRECIPE\b", "act_metaworld", line)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as `make demo` leaves it: a tiny checkpoint, and a dataset with the same features."""
    folder = tmp_path_factory.mktemp("readme")
    generator = np.random.default_rng(0)
    features = {
        "observation.state": {"dtype": "float32", "shape": [4]},
        "observation.environment_state": {"dtype": "float32", "shape": [35]},
        "action": {"dtype": "float32", "shape": [4]},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        root = folder / "outputs" / "datasets" / "metaworld_pick-place-v3_50"
        with LeRobotWriter(root, 80, features) as writer:
            for _ in range(2):
                for _ in range(20):
                    frame = {
                        name: generator.normal(size=f["shape"]).astype(np.float32) for name, f in features.items()
                    }
                    writer.add_frame(frame, task="pick and place")
                writer.end_episode()

        torch.manual_seed(0)
        config = ACTConfig(
            chunk_size=16,
            n_action_steps=8,
            dim_model=16,
            n_heads=2,
            dim_feedforward=32,
            n_encoder_layers=1,
            use_vae=False,
            input_features={
                "observation.state": {"type": "STATE", "shape": [4]},
                "observation.environment_state": {"type": "ENV", "shape": [35]},
            },
            output_features={"action": {"type": "ACTION", "shape": [4]}},
        )
        processor = PolicyProcessor.from_config(config, LeRobotDataset(root).statistics)
        PolicyPipeline(model=ACTPolicy(config), processor=processor, device="cpu").save_pretrained(
            folder / "outputs" / "demo"
        )
        patch.chdir(folder)
        yield folder


def test_the_python_examples_run_in_order(workplace, monkeypatch, request):
    available_environments()  # what registers itself does so before the table is copied
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(policy_registry, "_POLICIES", dict(policy_registry._POLICIES))
    for kind in ("BACKBONES", "ACTION_HEADS"):
        known = dict(getattr(composed, kind))
        monkeypatch.setattr(composed, kind, known)
        monkeypatch.setattr(components, kind, known)
        monkeypatch.setattr(components, f"_{kind}", dict(getattr(components, f"_{kind}")))
    examples = blocks("python")
    assert len(examples) >= 3
    namespace = {}
    for number, example in enumerate(examples):
        if "BitsAndBytesConfig" in example:  # in CI it is installed
            request.getfixturevalue("bitsandbytes")
        exec(compile(example, f"README.md, Python block {number + 1}", "exec"), namespace)
    action = namespace["action"]
    assert action.shape == (4,)
    assert action.dtype == torch.float32
    # What the text around the examples says.
    assert namespace["chunk"].shape == (1, 16, 4)
    assert "IA3" in str(namespace["adapted"].peft_config["default"].peft_type)
    assert type(namespace["pipeline"]) is PolicyPipeline
    assert namespace["arguments"].max_steps == 10
    assert len(namespace["dataset"]) == 40
    assert list(namespace["config"].input_features) == ["observation.state", "observation.environment_state"]
    recorded = record_demonstrations("line/right", 1, workplace / "line", progress=False)
    assert (recorded.episodes, recorded.frames) == (1, 5)


def test_the_examples_import_only_public_names():
    for example in blocks("python"):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("manipulators"):
                assert node.module == "manipulators"
                assert {alias.name for alias in node.names} <= set(manipulators.__all__)


def test_there_are_command_lines():
    assert len(command_lines()) >= 6
    named = {line.split()[1] for line in command_lines()}
    assert named == {"record", "train", "eval", "benchmark", "convert", "convert-dataset", "dataset", "card", "push"}


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_parses(line):
    arguments = shlex.split(filled(line))[1:]
    assert "…" not in " ".join(arguments)
    assert not re.search(r"\b[A-Z]{3,}\b", " ".join(arguments)), "a placeholder that this test does not know"
    options, rest = build_parser().parse_known_args(arguments)
    if options.command is train:
        overrides = _overrides(rest)
        recipe = load_recipe(options.recipe, overrides)
        assert recipe.policy == "act_policy"
    else:
        assert rest == []


def test_the_command_for_own_demonstrations_does_what_the_text_says():
    [line] = [line for line in command_lines() if "your-lerobot-dataset" in line]
    options, rest = build_parser().parse_known_args(shlex.split(line)[1:])
    recipe = load_recipe(options.recipe, _overrides(rest))
    assert recipe.data.dataset == "your-name/your-lerobot-dataset"
    assert recipe.data.record is None
    assert recipe.inputs == ["observation.state"]
    assert recipe.evaluation is None
    assert options.output == "outputs/mine"


@pytest.mark.parametrize("flags", re.findall(r"`(--[\w.]+ [^`]+)`", README))
def test_every_override_in_the_text_is_one(flags):
    assert load_recipe("act_metaworld", _overrides(shlex.split(flags))).policy == "act_policy"


def test_the_dataset_commands_run_in_order(tmp_path, monkeypatch):
    features = {
        "observation.images.wrist": {"dtype": "video", "shape": [16, 16, 3]},
        "action": {"dtype": "float32", "shape": [1]},
    }
    for name in ("monday", "tuesday"):
        with LeRobotWriter(tmp_path / name, 10, features) as writer:
            for _ in range(4):
                writer.add_frame(
                    {"observation.images.wrist": np.zeros((16, 16, 3), np.uint8), "action": [1.0]}, "pick"
                )
                writer.end_episode()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for line in [line for line in command_lines() if line.startswith("manipulators dataset") and "DIR" not in line]:
        assert main(shlex.split(line)[1:]) == 0, line
    assert (
        LeRobotDataset("all").tasks == ["pick up the cube"] and LeRobotDataset("all").statistics["action"]["q50"] == 1
    )
    assert LeRobotDataset("chosen").num_episodes == 5 and LeRobotDataset("chosen").camera_names == []
    assert [LeRobotDataset(f"parts/{name}").num_episodes for name in ("train", "val")] == [7, 1]


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


def test_files_and_folders_exist():
    """Code spans that end in a slash are folders of the repository, except what a run makes."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    spans = set(re.findall(r"`([^`\s]+)`", prose))
    folders = {span for span in spans if span.endswith("/") and not span.startswith("outputs/")}
    assert {"configuration/", "modeling/", "tests/", "recipes/", "tests/parity/"} <= folders
    # A row of the map names the rooms inside its own without it.
    assert sorted(f for f in folders if not (ROOT / f).is_dir() and not [*ROOT.glob(f"*/{f}")]) == []


def test_the_map_names_every_room_and_file():
    layout = README.split("## Find your way")[1]
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"tests", "benchmarks"}
    files = {path.name for path in ROOT.glob("*.py") if not path.name.startswith("_")}
    assert sorted(room for room in rooms if f"`{room}/`" not in layout) == []
    assert sorted(file for file in files if f"`{file}`" not in layout) == []
    inner = re.findall(r"`(\w+)/`", layout)
    assert sorted(room for room in inner if not [*ROOT.glob(room), *ROOT.glob(f"*/{room}")]) == []


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = {
        span for span in re.findall(r"`([\w./-]+)`", text) if "/" in span or span.endswith((".py", ".cfg", ".md"))
    }
    paths = {path for path in paths if not re.search(r"(?<!\w)x\.|^\.", path)}
    assert len(paths) > 10
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
    for folder in re.findall(r"`([\w/]+)/x\.\w+`", text):
        assert (ROOT / folder).is_dir(), folder


def test_the_table_of_composition_names_every_backbone_and_head():
    rows = [line.split("|")[1:-1] for line in README.splitlines() if "action head →" in line or line.startswith("| `")]
    header = next(number for number, row in enumerate(rows) if "action head →" in row[0])
    heads = re.findall(r"`(\w+)`", "".join(rows[header][1:]))
    backbones = [name for row in rows[header + 1 : header + 4] for name in re.findall(r"`(\w+)`", row[0])]
    assert set(heads) == {name for name, complete in composed.ACTION_HEADS.items() if complete}
    assert set(backbones) == {name for name, complete in composed.BACKBONES.items() if complete}


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_make_targets_exist(target):
    assert f"make {target} " in README
    rules = re.findall(r"^([\w ]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert target in " ".join(rules).split()


def test_what_make_demo_leaves_is_what_the_table_lists():
    """The demo's recipe has data, an evaluation and a log, so every file of the table is written."""
    recipe = load_recipe("act_metaworld")
    assert recipe.evaluation is not None
    assert recipe.data.record.episodes == recipe.evaluation.episodes == 50
    listed = set(re.findall(r"`([\w.]+\.(?:json|md|png|safetensors))`", README.split("## Use a policy")[0]))
    assert listed == {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "README.md",
        "learning_curve.png",
        "evaluation.json",
        "training.json",
    }


def test_no_placeholder_is_left():
    assert re.findall(r"\b(?:RESULT|INTERVAL|SECONDS|TODO|TBD)\b", README) == []
