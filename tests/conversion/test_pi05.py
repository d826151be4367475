"""π0.5 in other projects' files: what they do not say, what they may lack, and what is refused."""

import json
import logging
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manipulators import AutoPolicy, PI05Policy, PI05PolicyConfig, PolicyPipeline
from manipulators.cli import main
from manipulators.conversion.pi0 import rename_pi0_weights
from manipulators.conversion.pi05 import pi05_fields
from manipulators.conversion.published import load_published
from manipulators.errors import CheckpointError, InvalidConfigError, MissingStatisticsError

PI0 = runpy.run_path(str(Path(__file__).parents[1] / "parity" / "test_pi0.py"))
RANGES = {"observation.state": {"q01": [-1.0] * 5, "q99": [1.0] * 5}, "action": {"q01": [-2.0] * 6, "q99": [2.0] * 6}}


@pytest.fixture
def checkpoint(shared, tmp_path):
    """LeRobot's checkpoint, which may be changed, and how it is loaded."""
    golden = shared / "golden" / "pi05_lerobot_ckpt"
    folder = tmp_path / "published"
    shutil.copytree(golden / "checkpoint", folder)
    sizes = PI0["sizes"](json.loads((golden / "case.json").read_text())["config"])
    return folder, sizes | {"tokenizer": golden / "tokenizer"}


def without_statistics(folder):
    """Make a base of it, as LeRobot publishes one: its two processors have no statistics."""
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        content = json.loads((folder / name).read_text())
        for step in content["steps"]:
            step.pop("state_file", None)
        (folder / name).write_text(json.dumps(content))
    for path in folder.glob("policy_*.safetensors"):
        path.unlink()


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def test_switches_that_files_do_not_state(checkpoint, log):
    folder, loading = checkpoint
    state = {"state": torch.zeros(1, 32)}
    expected = {
        None: "Task: pick up, State: 128 128 128 128 128;\nAction: ",
        7: "Task: pick up, State: 128 128 128 128 128 128 128;\nAction: ",
        0: "pick up\n",
    }
    for width, prompt in expected.items():
        pipeline = PolicyPipeline.from_pretrained(folder, device="cpu", prompt_state_dim=width, **loading)
        assert pipeline.processor.instruction.prompts([" pick_up"], state) == [prompt]
        assert pipeline.policy.config.prompt_state_dim == width
    with pytest.raises(InvalidConfigError, match="prompt_state_dim=4, but the state has 5 numbers"):
        PolicyPipeline.from_pretrained(folder, device="cpu", prompt_state_dim=4, **loading)
    assert "prompt_state_dim" not in log.text


def test_an_older_release_may_have_padded_the_state(checkpoint, log):
    folder, loading = checkpoint
    for name, step in (("pre", "relative_actions_processor"), ("post", "absolute_actions_processor")):
        path = folder / f"policy_{name}processor.json"
        content = json.loads(path.read_text())
        content["steps"] = [s for s in content["steps"] if s["registry_name"] != step]
        path.write_text(json.dumps(content))
    PolicyPipeline.from_pretrained(folder, device="cpu", **loading)
    assert "if the policy was trained so, prompt_state_dim=32" in log.text
    log.clear()
    PolicyPipeline.from_pretrained(folder, device="cpu", prompt_state_dim=32, **loading)
    assert not log.text


def test_a_base_without_statistics(checkpoint, tmp_path):
    """It is refused, unless statistics are given: as values, in a file, or of openpi's kind."""
    folder, loading = checkpoint
    without_statistics(folder)
    with pytest.raises(MissingStatisticsError, match=r"published holds no statistics.*--statistics org/name"):
        PolicyPipeline.from_pretrained(folder, device="cpu", **loading)
    (tmp_path / "stats.json").write_text(json.dumps(RANGES))
    norms = {"state": RANGES["observation.state"], "actions": RANGES["action"]}
    norms = {name: values | {"mean": values["q01"], "std": values["q99"]} for name, values in norms.items()}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": norms}))
    for given in (RANGES, tmp_path / "stats.json", str(tmp_path / "norm_stats.json")):
        processor = PolicyPipeline.from_pretrained(folder, device="cpu", statistics=given, **loading).processor
        assert processor.decode_actions(torch.full((1, 8), 0.5))[0].tolist() == [1.0] * 6


def test_a_base_without_processors(checkpoint):
    """Its weights and config.json alone: enough to be trained on, and to run with given statistics."""
    folder, loading = checkpoint
    without_statistics(folder)
    for path in folder.glob("policy_*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no policy_preprocessor\.json"):
        PolicyPipeline.from_pretrained(folder, device="cpu", **loading)
    sizes = {name: value for name, value in loading.items() if name != "tokenizer"}
    assert isinstance(AutoPolicy.from_pretrained(folder, **sizes), PI05Policy)
    pipeline = PolicyPipeline.from_pretrained(folder, device="cpu", statistics=RANGES, **loading)
    assert pipeline.processor.normalization_mapping["STATE"] == "QUANTILES"


def test_conversion_by_the_command_line(checkpoint, tmp_path, monkeypatch):
    folder, loading = checkpoint
    without_statistics(folder)
    (tmp_path / "stats.json").write_text(json.dumps(RANGES))
    arguments = ["convert", str(folder), str(tmp_path / "ours"), "--statistics", str(tmp_path / "stats.json")]
    sizes = {name: json.dumps(loading[name]) for name in ("paligemma_config", "gemma_expert_config")}
    fields = [word for name, value in sizes.items() for word in (f"--config.{name}", value)]
    fields += ["--config.prompt_state_dim", "0"]
    assert main([*arguments, "--tokenizer", str(loading["tokenizer"]), *fields]) == 0
    pipeline = PolicyPipeline.from_pretrained(tmp_path / "ours", device="cpu")
    assert pipeline.policy.config.prompt_state_dim == pipeline.processor.prompt_state_dim == 0
    assert pipeline.processor.statistics["action"]["q99"] == [2.0] * 6


def test_lora_weights_are_refused(checkpoint):
    """They are no part of the network, and the weights beside them are not what was trained."""
    folder, loading = checkpoint
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name.replace(".weight", ".lora_A.default.weight")] = torch.zeros(2, 64)
    save_file(weights, folder / "model.safetensors")
    sizes = {name: value for name, value in loading.items() if name != "tokenizer"}
    for load, given in ((PolicyPipeline.from_pretrained, loading), (AutoPolicy.from_pretrained, sizes)):
        with pytest.raises(CheckpointError, match=r"1 LoRA weights beside.*q_proj\.lora_A.*merge_and_unload"):
            load(folder, **given)
    del weights[name.replace(".weight", ".lora_A.default.weight")]
    save_file(weights, folder / "model.safetensors")
    policy = AutoPolicy.from_pretrained(folder, **sizes)
    weights["model.action_in_proj.lora_b"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match="1 LoRA weights"):
        load_published(policy, weights)


def test_a_state_wider_than_the_padding(checkpoint):
    """The network reads the state in the prompt only, so any width will do."""
    folder, loading = checkpoint
    pipeline = PolicyPipeline.from_pretrained(folder, device="cpu", max_state_dim=3, **loading)
    assert pipeline.policy.config.model_state_dim == 5
    assert pipeline.processor.encode("observation.state", torch.zeros(1, 5)).shape == (1, 5)


def test_a_robot_without_a_state(checkpoint):
    """A prompt that tells none needs none."""
    folder, loading = checkpoint
    inputs = json.loads((folder / "config.json").read_text())["input_features"]
    cameras = {name: feature for name, feature in inputs.items() if feature["type"] == "VISUAL"}
    with pytest.raises(InvalidConfigError, match="needs the robot's state"):
        PolicyPipeline.from_pretrained(folder, device="cpu", input_features=cameras, **loading)
    pipeline = PolicyPipeline.from_pretrained(
        folder, device="cpu", input_features=cameras, prompt_state_dim=0, **loading
    )
    observation = {name: torch.zeros(feature["shape"]) for name, feature in cameras.items()}
    assert pipeline.predict_chunk(observation, task="pick up").shape == (6, 6)
    policy = pipeline.policy
    assert policy(**policy.config.example_inputs(2)).loss > 0


# --- the real size: every weight that LeRobot and openpi publish fits ours; nothing is allocated ------------

CONFIG = {
    "type": "pi05",
    "input_features": {
        "observation.state": {"type": "STATE", "shape": [7]},
        "observation.images.base": {"type": "VISUAL", "shape": [3, 480, 640]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [7]}},
}


@pytest.fixture(scope="module")
def rows(shared):
    return json.loads((shared / "specs" / "pi05_keys.json").read_text())["keys"].values()


@pytest.fixture(scope="module")
def expected():
    """Names and shapes of our real-size model."""
    with torch.device("meta"):
        policy = PI05Policy(PI05PolicyConfig.from_dict(pi05_fields(CONFIG, {})))
    return {name: list(weight.shape) for name, weight in policy.state_dict().items()}


@pytest.mark.parametrize("layout", ["openpi", "lerobot_pi05_base", "lerobot_save"])
def test_every_weight_of_every_layout(rows, expected, layout):
    published = {row[layout]: row["shape"] for row in rows if row[layout]}
    assert len(published) > 800 and rename_pi0_weights(published) == expected


def test_its_size_and_its_own_names(expected):
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == 3_353_433_872
    assert rename_pi0_weights(expected) == expected
