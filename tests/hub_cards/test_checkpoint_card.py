"""The card of a checkpoint folder, from nothing but the files in it."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from manipulators import ACTConfig, ACTPolicy, PolicyProcessor
from manipulators.configuration.contract import Dimension
from manipulators.errors import CorruptFileError, ManipulatorsError, MissingFileError
from manipulators.hub_cards.card import render_card
from manipulators.hub_cards.checkpoint_card import checkpoint_card, describe_policy, write_checkpoint_card
from manipulators.hub_cards.lint import lint_card

EVALUATION = {
    "environment": "metaworld/reach-v3",
    "episodes": 4,
    "successes": 3,
    "success_rate": 0.75,
    "interval": [0.3006, 0.9544],
    "mean_return": 10.5,
    "mean_length": 61.0,
    "milliseconds_per_action": 2.5,
    "num_envs": 2,
    "seeds": [500, 501, 502, 503],
    "per_episode": [],
    "clipped_fraction": 0.0,
    "horizon": 200,
    "versions": {"simulator": "metaworld 3"},
}
TRAINING = {
    "dataset": {"name": "your-lab/reach", "episodes": 50, "frames": 4000, "tasks": 1},
    "control_rate_hz": 80,
    "training": {
        "steps": 2,
        "batch_size": 8,
        "learning_rate": 0.001,
        "seconds": 12.0,
        "losses": {"loss": 0.5, "l1": 0.5},
    },
    "log_history": [{"step": 1, "loss": 0.75, "l1": 0.75}, {"step": 2, "loss": 0.5, "l1": 0.5}],
    "versions": {"manipulators": "0.1.0"},
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of a policy with known names, units and range."""
    config = ACTConfig(
        chunk_size=6,
        n_action_steps=3,
        dim_model=8,
        n_heads=1,
        dim_feedforward=8,
        n_encoder_layers=1,
        use_vae=False,
        input_features={"observation.state": {"type": "STATE", "shape": [2]}},
        output_features={"action": {"type": "ACTION", "shape": [2]}},
    )
    statistics = {
        name: {"mean": [0.0, 1.0], "std": [1.0, 2.0], "min": [-1.5, 0.25], "max": [1.5, 3.25]}
        for name in ("observation.state", "action")
    }
    names = {"observation.state": ["x", "y"], "action": ["dx", "dy"]}
    units = {"observation.state": ["m", "m"], "action": ["cm", "1"]}
    policy = ACTPolicy(config)
    policy.save_pretrained(tmp_path / "policy")
    PolicyProcessor.from_config(config, statistics, dimension_names=names, units=units).save_pretrained(
        tmp_path / "policy"
    )
    return tmp_path / "policy"


def put(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_it_reads_the_contract_from_config_and_processor(folder):
    card = checkpoint_card(folder, repo_id="your-lab/act-reach")
    assert (card.policy_name, card.model_type, card.repo_id) == ("ACT", "act_policy", "your-lab/act-reach")
    assert (card.action_horizon, card.n_action_steps) == (6, 3)
    [state], [action] = card.inputs, card.outputs
    assert (state.name, state.shape) == ("observation.state", (2,))
    assert [(d.name, d.unit) for d in state.dimensions] == [("x", "m"), ("y", "m")]
    assert list(action.dimensions) == [
        Dimension("dx", "cm", -1.5, 1.5, "MEAN_STD"),
        Dimension("dy", "1", 0.25, 3.25, "MEAN_STD"),
    ]
    assert (card.training, card.evaluation, card.dataset) == (None, None, None)


def test_a_policy_with_history_and_instruction(tiny_diffusion, tmp_path):
    config = tiny_diffusion(use_language_conditioning=True, language_config={"hidden_size": 16})
    processor = {"max_instruction_tokens": 16}
    card = describe_policy(config.to_dict(), processor, 3000, repo_id="your-lab/push")
    assert (card.policy_name, card.action_horizon, card.n_action_steps, card.n_obs_steps) == ("Diffusion", 8, 4, 2)
    text = render_card(card)
    assert "# Diffusion policy\n" in text and "takes the noise out of it step by step" in text
    assert (
        "predicts 8 actions at a time (`action_horizon`) and executes 4 of them, from the current step on, before it "
        "looks again (`n_action_steps`). It looks at the last 2 observations, which the pipeline keeps."
    ) in text
    assert "Instruction: the task in words" in text and 'task="say in words' in text
    assert not lint_card(text)


def test_it_counts_the_weights_without_loading_them(folder):
    expected = sum(parameter.numel() for parameter in ACTPolicy.from_pretrained(folder).parameters())
    assert checkpoint_card(folder).parameters == expected
    policy = ACTPolicy.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    policy.save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert checkpoint_card(folder).parameters == expected


def test_weights_are_counted_the_same_in_a_folder_and_when_pushed(tmp_path):
    """A camera policy's frozen batch norm counts among its weights, in both."""
    torch.manual_seed(0)
    config = ACTConfig(
        chunk_size=2,
        dim_model=8,
        n_heads=1,
        dim_feedforward=8,
        n_encoder_layers=1,
        use_vae=False,
        pretrained_backbone_weights=None,
        vision_config={
            "layer_type": "basic",
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "embedding_size": 8,
        },
        input_features={"observation.images.top": {"type": "VISUAL", "shape": [3, 32, 32]}},
        output_features={"action": {"type": "ACTION", "shape": [1]}},
    )
    policy = ACTPolicy(config)
    policy.save_pretrained(tmp_path)
    statistics = {
        "observation.images.top": {"mean": [[[0.5]]] * 3, "std": [[[0.5]]] * 3},
        "action": {"mean": [0.0], "std": [1.0]},
    }
    PolicyProcessor.from_config(config, statistics).save_pretrained(tmp_path)
    pushed = describe_policy(policy.config.to_dict(), {}, sum(v.numel() for v in policy.state_dict().values()))
    assert checkpoint_card(tmp_path).parameters == pushed.parameters


def test_a_whole_record_gives_a_clean_card(folder):
    put(folder, "training.json", TRAINING)
    put(folder, "evaluation.json", EVALUATION)
    path = write_checkpoint_card(folder, repo_id="your-lab/act-reach")
    assert path == folder / "README.md"
    text = path.read_text(encoding="utf-8")
    assert lint_card(text) == []
    assert "**Solves 3 of 4 episodes of `metaworld/reach-v3`" in text
    command = "manipulators eval your-lab/act-reach --env metaworld/reach-v3 --episodes 4 --seed 500 --num-envs 2"
    assert command in text
    assert "your-lab/reach" in text
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_repeats_the_measurement(folder):
    """Another horizon than the environment's own changes the success rate, so the command has to name it."""
    put(folder, "evaluation.json", EVALUATION)
    card = checkpoint_card(folder, repo_id="your-lab/act-reach")
    assert "--horizon 200" in card.evaluation.command


def test_a_card_that_a_person_edited_is_kept(folder):
    path = write_checkpoint_card(folder)
    path.write_text(path.read_text(encoding="utf-8") + "\nMine.\n", encoding="utf-8")
    put(folder, "evaluation.json", EVALUATION)
    write_checkpoint_card(folder)
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\nMine.\n")
    assert "Solves" not in text


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_a_folder_without_a_file_is_no_checkpoint(folder, name):
    (folder / name).unlink()
    with pytest.raises(MissingFileError, match=rf"holds no {name}; it holds .*model\.safetensors"):
        write_checkpoint_card(folder)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "training.json", "evaluation.json"])
@pytest.mark.parametrize("content", ['{"model_type": ', "\x00"])
def test_a_file_that_is_no_json_is_named(folder, name, content):
    put(folder, name, content)
    with pytest.raises(CorruptFileError, match=rf"{name} is not a readable JSON file"):
        write_checkpoint_card(folder)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "training.json", "evaluation.json"])
@pytest.mark.parametrize("content", ["[]", "5", '{"type": "act"}'])
def test_json_of_something_else_is_one_of_our_errors_or_a_card(folder, name, content):
    put(folder, name, content)
    try:
        path = write_checkpoint_card(folder)
    except ManipulatorsError as error:
        assert name in str(error)
    else:
        assert path.is_file()


def test_weights_that_cannot_be_read_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is not a readable safetensors file"):
        write_checkpoint_card(folder)


# --- the contract is the processor's ----------------------------------------------------------------------


def section(text, name):
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_ranges_of_differences_are_not_given_out_as_those_of_actions(folder):
    processor = PolicyProcessor.from_pretrained(folder, relative_to=[1, None])
    processor.save_pretrained(folder)
    text = render_card(checkpoint_card(folder))
    contract, limits = section(text, "What it expects and returns"), section(text, "Limits")
    assert "| 0 | dx | cm | -1.5 | 1.5 | difference to observation.state y |\n" in contract
    assert "| 1 | dy | 1 | 0.25 | 3.25 | absolute value |\n" in contract
    assert "the lowest and highest are those of the difference" in contract
    assert "It has learned absolute actions inside the training ranges above" in limits
    assert "`clamp_actions=True` keeps actions and differences inside these ranges" in limits
    assert "`max_action_step={'dx': 0.05}` limits how far an action may be from the one before" in limits
    assert "`print(pipeline.observation_report)` names states outside their training range" in limits
    assert "Actions that are predicted as differences have no recorded range in the robot's own units" in limits
    assert lint_card(render_card(checkpoint_card(folder, "your-lab/act-reach"))) == []
    processor.relative_to = [1, 0]
    processor.save_pretrained(folder)
    assert "It has learned" not in section(render_card(checkpoint_card(folder)), "Limits")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("identity", "none"),
        ("mean_std", "to mean 0, standard deviation 1"),
        ("min_max", "training range to [-1, 1]"),
        ("q99", "1st–99th percentile to [-1, 1], cut off"),
        ("scale", "divided by the largest magnitude in training"),
        ("binary", "to 1 above 0.5, else to 0"),
        ("sin_cos", "to sine and cosine"),
    ],
)
def test_every_mode_of_a_part_is_named(folder, mode, words):
    """Beside a second part, and as the only one."""
    config = json.loads((folder / "config.json").read_text())
    saved = json.loads((folder / "processor_config.json").read_text())
    parts = {"arm": {"width": 1, "mode": mode}, "grip": {"width": 1, "mode": "binary"}}
    text = render_card(describe_policy(config, saved | {"state_parts": parts, "action_parts": None}, 1))
    contract = section(text, "What it expects and returns")
    assert f"| `observation.state` | robot state | 2 values | m | arm {words}; grip to 1 above 0.5, else to 0 |" in (
        contract
    )
    assert f"| 0 | x | m | -1.5 | 1.5 | {words} |\n| 1 | y | m | 0.25 | 3.25 | to 1 above 0.5, else to 0 |" in contract
    whole = {"arm": {"width": 2, "mode": mode}}
    text = render_card(describe_policy(config, saved | {"state_parts": whole, "action_parts": None}, 1))
    assert f"| `observation.state` | robot state | 2 values | m | {words} |" in text


def test_card_and_processor_tell_the_same(folder):
    contract = PolicyProcessor.from_pretrained(folder).contract()
    card = checkpoint_card(folder)
    assert (card.inputs, card.outputs) == (contract.inputs, contract.outputs)


def test_robot_and_cameras_that_may_be_absent(folder):
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())
    camera = {"observation.images.top": {"type": "VISUAL", "shape": [3, 4, 6]}}
    config["input_features"] |= camera
    processor |= {"optional_cameras": list(camera), "embodiment": "gr1"}
    contract = section(render_card(describe_policy(config, processor, 1)), "What it expects and returns")
    assert "| `observation.images.top` | camera image, may be absent | 4 × 6 pixels, 3 channels |" in contract
    assert "\nRobot: `gr1`, of those that the policy knows.\n" in contract


def test_the_datasets_of_a_mixture_are_all_named(folder):
    path = folder / "training.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    parts = [
        {
            "name": "lab/first",
            "episodes": 20,
            "frames": 1000,
            "tasks": 1,
            "weight": 2,
            "share": 0.8,
            "embodiment": "a",
        },
        {"name": "/home/me/second", "episodes": 5, "frames": 250, "tasks": 1, "weight": 1, "share": 0.2},
    ]
    whole = {"name": "lab/first, /home/me/second", "episodes": 25, "frames": 1250, "tasks": 2, "mixture": parts}
    path.write_text(json.dumps(record | {"dataset": whole}))
    text = write_checkpoint_card(folder).read_text(encoding="utf-8")
    link = "[lab/first](https://huggingface.co/datasets/lab/first)"
    assert ModelCard(text).data.to_dict()["datasets"] == ["lab/first"]
    assert f"| {link} | `a` | 2 | 80 % | 20 | 1,000 |" in text
    assert "| second |  | 1 | 20 % | 5 | 250 |" in text
    assert f"| Dataset | {link}, second |" in text
    assert lint_card(text) == []
