"""The command line in a card, and the Hub's own file of results."""

import shlex

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from manipulators.cli import _action_step, _observation_limit, build_parser
from manipulators.errors import InvalidConfigError
from manipulators.hub_cards.card_data import EvaluationSummary
from manipulators.hub_cards.commands import evaluation_command
from manipulators.hub_cards.eval_results import eval_results
from manipulators.hub_cards.wording import without_local_paths

CONFIG = {"n_action_steps": 4, "num_inference_steps": None, "num_train_timesteps": 100, "dtype": "float32"}


def command(evaluation, reads_instruction=True, **changes):
    values = {"environment": "metaworld/reach-v3?camera=corner2", "seeds": [5, 6], "episodes": 2, **changes}
    return evaluation_command({**values, **evaluation}, "org/name", CONFIG, reads_instruction)


def test_what_is_as_saved_is_not_repeated():
    used = {"n_action_steps": 4, "sampling_steps": 100, "dtype": "float32", "task": "Go.", "observation_limit": 100.0}
    assert command(used, reads_instruction=False) == (
        "manipulators eval org/name --env 'metaworld/reach-v3?camera=corner2' --episodes 2 --seed 5"
    )


def test_what_the_evaluation_changed_is_an_option():
    used = {
        "task": 'open "it"\nnow',
        "seeds": [5, 9],
        "n_action_steps": 1,
        "sampling_steps": 10,
        "dtype": "bfloat16",
        "device": "cuda",
        "tokenizer": "org/tokenizer",
        "embodiment": "gr1",
        "camera_map": {"corner2": "top", "wrist": "hand"},
        "clamp_actions": True,
        "max_action_step": {"x": 0.05, "a=b": 0.1},
        "observation_limit": None,
        "overrides": {"relative_to": [0, None]},
        "plugins": ["my_robot"],
    }
    words = shlex.split(command(used))
    options, rest = build_parser().parse_known_args(words[1:])
    assert (options.seeds, options.task, options.dtype) == ([5, 9], 'open "it"\nnow', "bfloat16")
    assert (options.tokenizer, options.embodiment, options.device) == ("org/tokenizer", "gr1", "cuda")
    assert (options.camera_map, options.clamp_actions) == (["corner2=top", "wrist=hand"], True)
    assert _action_step(options.max_action_step) == {"x": 0.05, "a=b": 0.1}
    assert _observation_limit(options.observation_limit) == {"observation_limit": None}
    assert options.plugins == ["my_robot"]
    assert dict(zip(rest[::2], map(yaml.safe_load, rest[1::2]), strict=True)) == {
        "--config.relative_to": [0, None],
        "--config.n_action_steps": 1,
        "--config.num_inference_steps": 10,
    }


@pytest.mark.parametrize(
    ("step", "words"), [(0.05, ["0.05"]), ([0.05, 1.0], ["0.05", "1.0"]), ({"lift": 2.0}, ["lift=2.0"])]
)
def test_steps_are_read_as_they_were_written(step, words):
    found = shlex.split(command({"max_action_step": step}))
    assert found[found.index("--max-action-step") + 1 :] == words
    assert _action_step(words) == step


@pytest.mark.parametrize(
    ("words", "message"),
    [(["x"], "could not convert"), (["x=a"], "could not convert"), (["x=1", "2"], "mixes numbers")],
)
def test_steps_that_cannot_be_read(words, message):
    with pytest.raises(InvalidConfigError, match=message):
        _action_step(words)


@pytest.mark.parametrize("environment", ["metaworld/reach-v3?camera=corner2", "mine"])
def test_the_hub_reads_the_results(environment):
    other = {"environment": "metaworld/push-v3", "episodes": 4, "success_rate": 0.5, "task": "Push: it\n- x"}
    evaluation = EvaluationSummary(environment, 4, 0.25, seeds=[1, 2, 3, 4], date="2026-11-26T08:00:00+00:00")
    evaluation.further = [EvaluationSummary(**other)]
    first, second = parse_eval_result_entries(yaml.safe_load(eval_results(evaluation)))
    assert (first.dataset_id, first.value, first.date) == (environment.split("?")[0], 25.0, evaluation.date)
    assert first.task_id == ("reach-v3" if "/" in environment else "mine")
    assert (second.dataset_id, second.task_id, second.value) == ("metaworld/push-v3", "push-v3", 50.0)
    assert "instruction: Push: it - x" in second.notes


@pytest.mark.parametrize(
    ("typed", "published"),
    [
        ("/home/alice/runs/reach", "reach"),
        ("~/runs/reach", "reach"),
        ("C:\\runs\\reach", "reach"),
        ("manipulators train act --output=/mnt/a/b --data.dataset '/mnt/c/d e'", "manipulators train act --output=b "),
        ("lerobot/pi0_base", "lerobot/pi0_base"),
        ("outputs/mine", "outputs/mine"),
        ("metaworld/pick-place-v3?camera=corner2&size=96", "metaworld/pick-place-v3?camera=corner2&size=96"),
        ("https://huggingface.co/org/name/tree/main", "https://huggingface.co/org/name/tree/main"),
        ("1/2 of 3/4", "1/2 of 3/4"),
    ],
)
def test_what_is_published_names_no_folder_of_this_computer(typed, published):
    hidden = without_local_paths({"recipe": [{"output": typed}], "steps": 3})
    assert hidden["steps"] == 3
    found = hidden["recipe"][0]["output"]
    assert found.startswith(published) and "/mnt" not in found and "alice" not in found
