"""Rendered cards: their words, their metadata, and the example that a reader copies."""

import re
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, metadata_load

import manipulators
from manipulators import PolicyFeature
from manipulators.configuration.contract import vector_entry
from manipulators.errors import InvalidCardError
from manipulators.hub_cards import card as card_module
from manipulators.hub_cards.card import EvaluationSummary, render_card, save_card
from manipulators.hub_cards.edits import was_edited
from manipulators.hub_cards.lint import SECTIONS, lint_card

ROOT = Path(card_module.__file__).parent.parent


def python_block(text: str) -> str:
    return re.search(r"^(`{3,})python\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL)[2]


def section(text: str, name: str) -> str:
    return re.search(rf"^## {name}\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1].strip()


def test_evaluated_card_says_how_well_the_policy_does(full_card):
    text = render_card(full_card)
    assert "\n# ACT policy for metaworld/reach-v3\n" in text
    assert (
        "**Solves 49 of 50 episodes of `metaworld/reach-v3` in simulation "
        "(success rate 98 %, 95 % interval 89.5–99.7 %).**"
    ) in text
    assert section(text, "Evaluation").startswith(
        "| | |\n|---|---|\n"
        "| Environment | metaworld/reach-v3 |\n"
        "| Success rate | 98 % (49 of 50 episodes) |\n"
        "| 95 % interval | 89.5–99.7 % |\n"
        "| Seeds | 10000–10049 |\n"
        "| Mean length | 61.3 steps |\n"
        "| Mean return | 812.4 |\n"
        "| Time per action | 3.21 ms for 10 environments at once |\n"
        "| Actions clipped to the action space | 3.1 % |\n"
        "\nMeasured in closed loop"
    )
    assert "An episode not solved within 500 steps counts as failed." in text
    assert "manipulators eval your-lab/act-reach --env metaworld/reach-v3\n" in section(text, "How to use")
    assert lint_card(text) == []


def test_card_states_contract_training_and_limits(full_card):
    text = render_card(full_card)
    contract = section(text, "What it expects and returns")
    assert (
        "| `observation.state` | robot state | 4 values | m, share of fully open "
        "| to mean 0, standard deviation 1 |\n"
        "| `observation.images.corner` | camera image | 240 × 320 pixels, 3 channels "
        "| 0–255 (uint8) or 0–1 (float) | not recorded |\n"
    ) in contract
    assert "| 1 | hand y | m | 0.4 | 0.8 |\n" in contract
    assert "| `action` | action | 2 values | not recorded | training range to [-1, 1] |\n" in contract
    assert "| 1 | grip | not recorded | not recorded | not recorded |\n" in contract
    assert "predicts 100 actions at a time (`action_horizon`) and executes the first 50 before" in contract
    assert "for example “reach the red ball”" in contract
    assert section(text, "Training").startswith(
        "| | |\n|---|---|\n"
        "| Steps | 20,000 |\n"
        "| Batch size | 8 |\n"
        "| Learning rate | backbone 1e-05, rest 0.0001 |\n"
        "| Time | 1 h 24 min |\n"
        "| Hardware | 1 × NVIDIA H200 |\n"
        "| Last loss | 0.5 |\n"
        "| Last l1 | 0.3 |\n"
        "| Last kl | 0.02 |\n"
        "\n![Loss over training steps](learning_curve.png)\n"
    )
    assert "| Demonstrations | 50 |\n| Time steps | 4,213 |\n| Tasks | 1 |\n" in text
    limits = section(text, "Limits")
    assert "- It was evaluated in simulation only" in limits
    assert "- It was trained on 50 demonstrations of one task." in limits
    assert "- Units were not recorded for `action`" in limits
    assert "- The red ball must be in view." in limits
    assert "@inproceedings{zhao2023learning," in section(text, "Citation")
    assert "Made with manipulators 0.1.0, torch 2.13.0." in text


def test_averaged_weights_are_said(make_card):
    text = render_card(make_card(training={"steps": 5, "ema_decay": 0.9999}))
    assert "| Weights | Exponential moving average over the steps, decay up to 0.9999 |" in text
    assert "moving average" not in render_card(make_card(training={"steps": 5, "ema_decay": None}))


def test_unevaluated_card_claims_nothing(make_card):
    text = render_card(make_card())
    assert "**This policy has not been evaluated.**" in text
    assert section(text, "Evaluation") == "This policy has not been evaluated."
    assert section(text, "Training") == section(text, "Training data") == "Not recorded."
    assert "hand on the emergency stop" in section(text, "Limits")
    assert not re.search(r"solves|success rate|model-index|learning_curve|Cameras:|manipulators eval", text)
    assert lint_card(text) == []


def test_metadata_round_trips_through_the_hub_client(full_card, tmp_path):
    text = render_card(full_card)
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    assert metadata_load(path) == {
        "base_model": "your-lab/act-base",
        "datasets": ["your-lab/reach-demos"],
        "library_name": "manipulators",
        "license": "apache-2.0",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "act_policy", "imitation-learning"],
        "model-index": [
            {
                "name": "act-reach",
                "results": [
                    {
                        "task": {"type": "robotics", "name": "Robotics"},
                        "dataset": {
                            "name": "metaworld/reach-v3",
                            "type": "metaworld/reach-v3",
                            "args": {"episodes": 50},
                        },
                        "metrics": [{"type": "success_rate", "value": 0.98, "name": "Success rate"}],
                    }
                ],
            }
        ],
    }
    loaded = ModelCard(text)
    assert loaded.data.eval_results[0].metric_value == 0.98
    assert loaded.content == text
    assert not was_edited(loaded.content)


def test_local_names_stay_out_of_metadata_and_lose_their_folders(make_card):
    card = make_card(dataset={"name": "/data/alice/reach"}, base_model="/data/alice/base")
    text = render_card(card)
    assert "datasets" not in ModelCard(text).data.to_dict()
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "| Dataset | reach |" in text
    assert "Fine-tuned from base." in text
    assert "alice" not in text


@pytest.mark.parametrize("instruction", [False, True, 'say "hi"\nnow'])
def test_python_example_runs_with_the_right_features(full_card, monkeypatch, instruction):
    calls = []

    class Pipeline:
        @classmethod
        def from_pretrained(cls, source):
            calls.append(source)
            return cls()

        def reset(self):
            calls.append("reset")

        def __call__(self, observation, task=None):
            calls.append((observation, task))

    full_card.instruction = instruction
    code = python_block(render_card(full_card))
    monkeypatch.setitem(vars(manipulators), "PolicyPipeline", Pipeline)
    exec(compile(code, "README.md", "exec"), {})
    source, reset, (observation, task) = calls
    assert (source, reset) == ("your-lab/act-reach", "reset")
    assert {name: (value.shape, value.dtype) for name, value in observation.items()} == {
        "observation.state": ((4,), np.float32),
        "observation.images.corner": ((240, 320, 3), np.uint8),
    }
    assert task == {False: None, True: "say in words what the robot should do"}.get(instruction, 'say "hi" now')


def test_without_a_camera_the_example_has_none(make_card):
    text = render_card(make_card())
    assert '"observation.state": np.zeros(4, dtype=np.float32),  # hand x, hand y, hand z, gripper' in text
    assert "observation.images" not in text
    assert "action = pipeline(observation)  # tensor (2,): reach, grip" in text


def test_without_a_repository_the_example_says_what_to_fill_in(make_card):
    assert 'from_pretrained("path/to/this/folder")' in render_card(make_card(repo_id=None))


def test_a_model_type_without_a_fragment_needs_no_code(make_card):
    text = render_card(make_card(model_type="my_policy", policy_name="Mine", summary="Copies the last action."))
    assert "\nCopies the last action.\n" in text
    assert section(text, "Citation") == "No paper is recorded for this policy."
    assert "Zhao" not in text
    assert render_card(make_card(model_type="policy_card"))  # the name of the template itself


@pytest.mark.parametrize("model_type", ["act_policy", "diffusion_policy", "gr00t_n1", "gr00t_n1_5", "pi0_policy"])
def test_every_policy_has_words_of_its_own(make_card, model_type):
    text = render_card(make_card(model_type=model_type))
    assert "Paper: [" in text and "```bibtex\n@" in text
    assert not lint_card(text)


def test_a_composed_policy_names_its_parts(make_card):
    text = render_card(make_card(model_type="composed_policy", components={"backbone": "mine", "action_head": "act"}))
    assert "Its backbone, `mine`, turns an observation into features. Its action head, `act` (ACT's decoder" in text
    assert not lint_card(render_card(make_card(model_type="composed_policy")))


def test_own_words_replace_those_of_the_model_type(make_card):
    card = make_card(summary="Ours.", paper={"title": "Our paper"}, citation="@misc{ours}")
    text = render_card(card)
    assert "\nOurs.\n" in text
    assert "Paper: Our paper." in text
    assert section(text, "Citation") == "```bibtex\n@misc{ours}\n```"


def test_many_dimensions_are_folded_away(make_card):
    wide = vector_entry("observation.state", PolicyFeature("STATE", (39,)), low=[0.0] * 39, high=[1.0] * 39)
    text = render_card(make_card(inputs=[wide]))
    assert "<details><summary>The 39 values of <code>observation.state</code>, in order</summary>\n\n|" in text
    assert "| 38 | not recorded | not recorded | 0 | 1 |\n\n</details>" in text
    assert "np.zeros(39, dtype=np.float32),  # 39 values, in the order of the training data" in text


def test_hostile_names_cannot_break_the_tables(make_card):
    row = vector_entry("observation.state", PolicyFeature("STATE", (2,)), names=["a|b", "c\nd<br>"], units="m|s")
    text = render_card(make_card(inputs=[row]))
    assert "| 0 | a\\|b | m\\|s | not recorded | not recorded |\n" in text
    assert "| 1 | c d&lt;br> | m\\|s |" in text
    compile(python_block(text), "README.md", "exec")


HOSTILE = "[click](https://evil.example) ![x](y) <img src=x> `a` **b** __c__ \n```\n# d | e &lt;"


def test_nothing_that_a_card_states_becomes_markdown(make_card, evaluation):
    """Names of dimensions, units, tasks, data sets, environments and hardware come from files of strangers."""
    row = vector_entry("observation.state", PolicyFeature("STATE", (2,)), names=["a", HOSTILE], units=HOSTILE)
    hostile = {
        **evaluation,
        "environment": HOSTILE,
        "task": HOSTILE,
        "video": 'a" onload="b.mp4',
        "video_note": HOSTILE,
    }
    hostile |= {"command": f"manipulators eval x --task '{HOSTILE}'", "further": [dict(hostile)]}
    card = make_card(
        policy_name=HOSTILE,
        inputs=[row],
        evaluation=hostile,
        instruction=HOSTILE,
        dataset={"name": HOSTILE},
        base_model=HOSTILE,
        embodiment=HOSTILE,
        training={"steps": 1, "hardware": HOSTILE, "losses": {HOSTILE: 1.0}, "command": f"train '{HOSTILE}'"},
        versions={HOSTILE: HOSTILE},
    )
    text = render_card(card)
    assert ModelCard(text).data.library_name == "manipulators"  # the metadata end where they should
    body = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text.split("---\n", 2)[2], flags=re.MULTILINE | re.DOTALL)
    body = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", body)  # inline code
    assert "](https://evil" not in body.replace("\\](https://evil", "")
    assert "](y)" not in body.replace("\\](y)", "")
    assert "<img" not in body and 'onload="' not in body
    assert not re.search(r"^# d", body, re.MULTILINE) and "**b**" not in body and "__c__" not in body
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    compile(python_block(text), "README.md", "exec")


def test_every_table_row_has_as_many_cells_as_its_header(full_card):
    for table in re.findall(r"(?:^\|.*\n)+", render_card(full_card), re.MULTILINE):
        rows = table.splitlines()
        assert re.fullmatch(r"[|:-]+", rows[1])
        assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_there_once(full_card, name):
    assert render_card(full_card).count(f"\n## {name}\n") == 1


def test_values_that_contradict_each_other_are_refused(make_card):
    with pytest.raises(InvalidCardError, match=r"0\.5 is impossible with episodes=3: the nearest is 2 of 3"):
        EvaluationSummary(environment="e", episodes=3, success_rate=0.5)
    with pytest.raises(InvalidCardError, match=r"success_rate from 0 to 1; got episodes=3, success_rate=98"):
        EvaluationSummary(environment="e", episodes=3, success_rate=98)
    with pytest.raises(InvalidCardError, match=r"interval=\(0\.1, 0\.2\)"):
        EvaluationSummary(environment="e", episodes=2, success_rate=0.5, interval=[0.1, 0.2])
    with pytest.raises(InvalidCardError, match=r"no field 'episode'\. Did you mean 'episodes'"):
        make_card(dataset={"name": "d", "episode": 3})
    with pytest.raises(InvalidCardError, match="environment"):
        make_card(evaluation={"episodes": 3, "success_rate": 1.0})
    with pytest.raises(InvalidCardError, match="at least one input"):
        make_card(inputs=[])


def test_save_card_writes_picture_and_text_and_keeps_edits(full_card, tmp_path):
    path = save_card(full_card, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "learning_curve.png"]
    assert path.read_text(encoding="utf-8") == render_card(full_card)

    full_card.parameters = 7
    save_card(full_card, tmp_path)
    assert "with 7 weights" in path.read_text(encoding="utf-8")

    mine = path.read_text(encoding="utf-8") + "\nMeasured again in May.\n"
    path.write_text(mine, encoding="utf-8")
    (tmp_path / "learning_curve.png").unlink()
    full_card.parameters = 8
    save_card(full_card, tmp_path)
    assert path.read_text(encoding="utf-8") == mine
    assert not (tmp_path / "learning_curve.png").exists()


def test_templates_are_package_data():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options.package_data"]["manipulators.hub_cards"] == "*.jinja"
    assert {file.name for file in (ROOT / "hub_cards").glob("*.jinja")} >= {
        "policy_card.jinja",
        "act_policy.jinja",
        "diffusion_policy.jinja",
    }


def test_a_rollout_video_is_embedded_with_its_note(make_card, evaluation):
    filmed = {**evaluation, "video": "rollout.mp4", "video_note": "The first 4 episodes."}
    published = render_card(make_card(evaluation=filmed))
    address = "https://huggingface.co/your-lab/act-reach/resolve/main/rollout.mp4"
    assert f'\n\n<video src="{address}" controls></video>\n\nThe first 4 episodes.\n' in published
    assert not lint_card(published)
    assert '<video src="rollout.mp4" controls>' in render_card(make_card(evaluation=filmed, repo_id=None))


def test_an_absent_video_is_explained_and_one_that_nobody_wanted_is_not_mentioned(make_card, evaluation):
    absent = render_card(make_card(evaluation={**evaluation, "video": None, "video_note": "There is no video: dark."}))
    assert "\nThere is no video: dark.\n" in absent
    assert "<video" not in absent
    assert "video" not in render_card(make_card(evaluation=evaluation))


def test_an_environment_with_options_is_quoted_for_the_shell(make_card, evaluation):
    name = "metaworld/reach-v3?camera=corner2&size=96"
    text = render_card(make_card(evaluation={**evaluation, "environment": name}))
    assert f"--env '{name}'" in text


def test_further_evaluations_stand_in_one_table(make_card, evaluation):
    swapped = {**evaluation, "task": "close it", "success_rate": 0.0, "interval": [0.0, 0.0714]}
    both = {**evaluation, "task": "open it", "further": [swapped]}
    text = render_card(make_card(evaluation=both, instruction="open it"))
    assert "| metaworld/reach-v3 | open it | 49 of 50 | 89.5–99.7 % |" in text
    assert "| metaworld/reach-v3 | close it | 0 of 50 | 0–7.1 % |" in text
    assert "| Instruction | open it |" in text
    assert not lint_card(text)
    assert "open it" not in render_card(make_card(evaluation={**both, "further": []}))  # it reads no instruction


def test_errors_and_an_early_stop_are_said(make_card, evaluation):
    stopped = {**evaluation, "errors": 1, "requested_episodes": 400}
    text = render_card(make_card(evaluation=stopped))
    assert "| Stopped early | after 50 of 400 episodes |" in text
    assert "| Ended in an error of the environment | 1 episode, counted as failed |" in text
    whole = render_card(make_card(evaluation={**evaluation, "errors": 0, "requested_episodes": 50}))
    assert "Stopped early" not in whole and "Ended in an error" not in whole
