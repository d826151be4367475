"""A recipe end to end: demonstrations in, a trained, measured and described policy out."""

import errno
import json
import shlex
import shutil
from pathlib import Path

import datasets
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from safetensors.torch import load_file

from manipulators import EnvironmentSpec, PolicyPipeline, PolicyProcessor, register_environment
from manipulators._lock import locked
from manipulators.cli import main
from manipulators.errors import (
    DiskFullError,
    FolderInUseError,
    InvalidConfigError,
    InvalidRecipeError,
    ManipulatorsError,
    OutputExistsError,
    ReadOnlyError,
    UnfinishedRunError,
)
from manipulators.hub_cards.checkpoint_card import write_checkpoint_card
from manipulators.hub_cards.lint import lint_card
from manipulators.training.runs import run
from manipulators.training.runs.recipe import load_recipe
from manipulators.training.runs.run import run_recipe

RECIPE = """
policy: act_policy
inputs: [observation.state, observation.environment_state]
data:
  dataset: {folder}/demonstrations
  record: {{environment: metaworld/pick-place-v3, episodes: 3, seed: 0}}
config: {{chunk_size: 8, n_action_steps: 4, dim_model: 16, n_heads: 2, dim_feedforward: 32, n_encoder_layers: 1,
  use_vae: false}}
training: {{max_steps: 5, per_device_train_batch_size: 4, learning_rate: 1e-3, logging_steps: 2, use_cpu: true,
  disable_tqdm: true}}
evaluation: {{environment: metaworld/pick-place-v3, episodes: 2, seed: 10000, horizon: 12}}
output: {folder}/trained
"""
OBSERVATION = {
    "observation.state": np.array([0.1, 0.6, 0.2, 0.5], dtype=np.float32),
    "observation.environment_state": np.linspace(-0.5, 0.5, 35, dtype=np.float32),
}


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the recipe has run once, and what its pipeline answered before it was saved."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    answers = []
    evaluate = run.evaluate_checkpoint

    def listening(output, recipe, pipeline):
        answers.append(pipeline.predict_chunk(OBSERVATION))
        evaluate(output, recipe, pipeline)

    patch = pytest.MonkeyPatch()
    patch.setattr(run, "evaluate_checkpoint", listening)
    try:
        output = run_recipe(load_recipe(path), command="manipulators train tiny")
    finally:
        patch.undo()
    assert output == folder / "trained"
    return folder, answers[0]


@pytest.fixture
def recipe(finished, tmp_path):
    """Build a recipe on the recorded demonstrations, with its own output; keywords are overrides."""

    def build(**overrides):
        folder = finished[0]
        overrides = [(key.replace("__", "."), value) for key, value in overrides.items()]
        return load_recipe(folder / "tiny.yaml", [("output", str(tmp_path / "trained")), *overrides])

    return build


def test_all_files_are_there(finished):
    names = {path.name for path in (finished[0] / "trained").iterdir()}
    assert names == {
        "README.md",
        "checkpoint-5",
        "config.json",
        "evaluation.json",
        "learning_curve.png",
        "model.safetensors",
        "processor_config.json",
        "training.json",
    }


def test_demonstrations_are_recorded(finished):
    folder = finished[0] / "demonstrations"
    info = json.loads((folder / "meta" / "info.json").read_text())
    assert info["total_episodes"] == 3
    assert info["fps"] == 80


def test_evaluation_json(finished):
    result = json.loads((finished[0] / "trained" / "evaluation.json").read_text())
    assert result["environment"] == "metaworld/pick-place-v3"
    assert result["episodes"] == 2
    assert result["seeds"] == [10000, 10001]
    assert result["horizon"] == 12
    assert 0 <= result["success_rate"] <= 1
    assert result["success_rate"] == result["successes"] / 2
    low, high = result["interval"]
    assert 0 <= low <= result["success_rate"] <= high <= 1
    assert low < high
    assert [row["seed"] for row in result["per_episode"]] == [10000, 10001]
    assert all(1 <= row["length"] <= 12 for row in result["per_episode"])
    assert result["milliseconds_per_action"] > 0


def test_training_json(finished):
    record = json.loads((finished[0] / "trained" / "training.json").read_text())
    info = json.loads((finished[0] / "demonstrations" / "meta" / "info.json").read_text())
    assert record["dataset"]["episodes"] == 3
    assert record["dataset"]["frames"] == info["total_frames"]
    assert record["dataset"]["tasks"] == 1
    assert record["control_rate_hz"] == 80
    training = record["training"]
    assert (training["steps"], training["batch_size"], training["learning_rate"]) == (5, 4, 1e-3)
    assert training["command"] == "manipulators train tiny"
    assert training["seconds"] > 0
    logged = [entry for entry in record["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logged][:2] == [2, 4]
    assert training["losses"] == {"loss": logged[-1]["loss"], "l1": logged[-1]["l1"]}
    assert record["recipe"]["config"]["dim_model"] == 16
    assert record["recipe"]["evaluation"]["horizon"] == 12


def test_the_card_is_clean(finished):
    text = (finished[0] / "trained" / "README.md").read_text(encoding="utf-8")
    assert lint_card(text) == []
    assert "library_name: manipulators" in text
    result = json.loads((finished[0] / "trained" / "evaluation.json").read_text())
    assert f"**Solves {result['successes']} of 2 episodes of `metaworld/pick-place-v3` in simulation" in text


def test_the_reloaded_policy_acts_the_same(finished):
    folder, before = finished
    pipeline = PolicyPipeline.from_pretrained(folder / "trained", device="cpu")
    assert before.shape == (8, 4)
    torch.testing.assert_close(pipeline.predict_chunk(OBSERVATION), before)
    torch.testing.assert_close(pipeline(OBSERVATION), before[0])
    names = ["hand_delta_x", "hand_delta_y", "hand_delta_z", "gripper_effort"]
    assert pipeline.processor.dimension_names["action"] == names
    assert pipeline.processor.units["observation.state"] == ["m", "m", "m", "1"]


def test_an_existing_output_is_refused_before_anything_is_done(finished, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the demonstrations were opened")

    monkeypatch.setattr(run, "open_dataset", never)
    recipe = load_recipe(finished[0] / "tiny.yaml")
    with pytest.raises(
        OutputExistsError, match=r"trained already exists\. Go on with the run that it holds: --resume\."
    ):
        run_recipe(recipe)


def test_an_empty_output_folder_is_fine(recipe, tmp_path):
    (tmp_path / "trained").mkdir()
    output = run_recipe(recipe(evaluation="null", training__max_steps="1"))
    assert (output / "model.safetensors").is_file()


def test_the_dataset_is_used_again_and_training_repeats(finished, recipe, monkeypatch):
    from manipulators.evaluation import demonstrations

    def never(*args, **kwargs):
        raise AssertionError("the demonstrations were recorded again")

    monkeypatch.setattr(demonstrations, "record_demonstrations", never)
    output = run_recipe(recipe(evaluation="null"))
    assert not (output / "evaluation.json").exists()
    again = PolicyPipeline.from_pretrained(output, device="cpu").predict_chunk(OBSERVATION)
    torch.testing.assert_close(again, finished[1])  # the same seed, the same policy


def test_another_seed_gives_another_policy(finished, recipe):
    output = run_recipe(recipe(evaluation="null", training__seed="7"))
    other = PolicyPipeline.from_pretrained(output, device="cpu").predict_chunk(OBSERVATION)
    assert not torch.allclose(other, finished[1], atol=1e-3)


def test_a_dataset_with_another_number_of_episodes_is_refused(recipe, tmp_path):
    with pytest.raises(InvalidRecipeError, match=r"exists and holds 3 episodes; the recipe records 4\."):
        run_recipe(recipe(data__record__episodes="4"))
    assert not (tmp_path / "trained").exists()


def test_chosen_episodes_are_trained_on(recipe):
    output = run_recipe(recipe(evaluation="null", data__episodes="[0, 2]", training__max_steps="1"))
    assert json.loads((output / "training.json").read_text())["dataset"]["episodes"] == 2


def test_inputs_choose_the_features(recipe):
    output = run_recipe(recipe(evaluation="null", inputs="[observation.state]", training__max_steps="1"))
    config = json.loads((output / "config.json").read_text())
    assert list(config["input_features"]) == ["observation.state"]


@pytest.mark.parametrize("inputs", ["[observation.stat]", "[]", "[next.reward]"])
def test_unknown_or_no_inputs_are_refused(recipe, inputs):
    with pytest.raises(ManipulatorsError):
        run_recipe(recipe(evaluation="null", inputs=inputs))


def test_a_run_shorter_than_its_log_interval_still_has_a_card(recipe):
    output = run_recipe(recipe(evaluation="null", training__max_steps="1", training__logging_steps="50"))
    assert lint_card((output / "README.md").read_text(encoding="utf-8")) == []


def test_interrupted_saving_leaves_no_half_checkpoint(recipe, tmp_path, monkeypatch):
    def interrupted(self, folder, *args, **kwargs):
        Path(folder, "processor_config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr("manipulators.processing.processor.PolicyProcessor.save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(evaluation="null", training__max_steps="1"))
    output = tmp_path / "trained"
    assert not output.exists() or list(output.iterdir()) == []


def no_step(self, *args, **kwargs):
    raise AssertionError("the training began")


class Line(gymnasium.Env):
    """A cart whose observations, actions, rate and mood are what its task says."""

    def __init__(self, task, horizon):
        widths = {"observation.state": 4, "observation.environment_state": 35, "action": 4}
        widths |= {"wide": {"observation.state": 5}, "strong": {"action": 5}}.get(task, {})
        if task == "blind":
            del widths["observation.environment_state"]
        features = {name: {"dtype": "float32", "shape": [w], "names": list("abcde"[:w])} for name, w in widths.items()}
        self.moody = task == "moody"
        self.action_space = Box(-1, 1, (widths.pop("action"),))
        self.observation_space = Dict({name: Box(-10, 10, (width,)) for name, width in widths.items()})
        rate = 10 if task == "slow" else 80
        self.environment_spec = EnvironmentSpec(f"run-line/{task}", "Go.", features, fps=rate, horizon=horizon)

    def reset(self, *, seed=None, options=None):
        return {name: np.zeros(space.shape, np.float32) for name, space in self.observation_space.items()}, {}

    def step(self, action):
        if self.moody:
            raise RuntimeError("the cart fell off")
        return self.reset()[0], 0.0, False, False, {"success": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": "metaworld/pick-plaice-v3"}, "pick-plaice-v3"),
        ({"environment": "run-line/wide"}, r"observation\.state has shape \(1, 5\)"),
        ({"environment": "run-line/strong"}, r"shape \(1, 4\) for run-line/strong; expected \(1, 5\)"),
        ({"environment": "run-line/blind"}, "lacks observation.environment_state"),
        ({"environment": "run-line/moody"}, "RuntimeError: the cart fell off"),
        ({"environment": "run-line/slow"}, r"run-line/slow takes 10 actions per second.* recorded at 80"),
        ({"further": "[{environment: run-line/wide}]"}, r"cannot be evaluated in run-line/wide"),
    ],
)
def test_an_evaluation_that_cannot_be_is_found_before_the_training(recipe, tmp_path, monkeypatch, changes, message):
    register_environment("run-line", Line, horizon=5)
    monkeypatch.setattr(run.PolicyTrainer, "training_step", no_step)
    changes = {f"evaluation__{name}": value for name, value in {"environment": "run-line/right", **changes}.items()}
    with pytest.raises(ManipulatorsError, match=message):
        run_recipe(recipe(**changes))
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("learning_rate", "nan", "training: learning_rate=nan must be a finite number"),
        ("optim_args", "nonsense", "training: not enough values to unpack"),
        ("lr_scheduler_kwargs", "{nonsense: 1}", "training: TypeError: .*unexpected keyword argument 'nonsense'"),
        ("train_sampling_strategy", "group_by_length", "training: Can only automatically infer lengths"),
        ("gradient_checkpointing", "true", "training: ACTPolicy does not support (activation|gradient) checkpointing"),
        ("log_level", "loud", "training: KeyError: 'loud'"),
    ],
)
def test_what_an_argument_causes_before_the_first_step_is_the_recipes(recipe, monkeypatch, argument, value, message):
    monkeypatch.setattr(run.PolicyTrainer, "training_step", no_step)
    with pytest.raises(InvalidRecipeError, match=message):
        run_recipe(recipe(evaluation="null", **{f"training__{argument}": value}))


def test_an_output_that_cannot_be_written_is_found_before_the_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_dataset", no_step)
    (tmp_path / "file").write_text("")
    chosen = recipe(evaluation="null")
    chosen.output = str(tmp_path / "file" / "trained")
    with pytest.raises(ReadOnlyError, match=r"trained may not be written: Not a directory"):
        run_recipe(chosen)


def test_a_card_that_cannot_be_written_is_found_before_the_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run.PolicyTrainer, "training_step", no_step)
    build = run.build_policy

    def misnamed(*args):
        policy, processor = build(*args)
        processor.dimension_names |= {"action": ["only one"]}
        return policy, processor

    monkeypatch.setattr(run, "build_policy", misnamed)
    with pytest.raises(InvalidConfigError, match="action has 4 dimensions but 1 names: only one"):
        run_recipe(recipe(evaluation="null"))


def test_a_failed_evaluation_loses_nothing_and_can_be_repeated_alone(recipe, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("the simulator crashed")

    with monkeypatch.context() as patch, pytest.raises(UnfinishedRunError, match="the simulator crashed") as error:
        patch.setattr(run, "evaluate_checkpoint", failing)
        run_recipe(recipe(evaluation__episodes="1", training__max_steps="1"))
    output = tmp_path / "trained"
    assert PolicyPipeline.from_pretrained(output, device="cpu").predict_chunk(OBSERVATION).shape == (8, 4)
    assert "This policy has not been evaluated" in (output / "README.md").read_text("utf-8")
    commands = [line for line in str(error.value).splitlines() if line.startswith("manipulators ")]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0
    assert json.loads((output / "evaluation.json").read_text())["horizon"] == 12
    assert "of 1 episodes of `metaworld/pick-place-v3`" in (output / "README.md").read_text("utf-8")


def test_a_full_disk_at_the_end_loses_nothing(recipe, tmp_path, monkeypatch):
    saving = PolicyProcessor.save_pretrained

    def full(self, folder, *args, **kwargs):
        if "checkpoint-" not in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        return saving(self, folder, *args, **kwargs)

    chosen = {"evaluation": "null", "training__max_steps": "2"}
    with monkeypatch.context() as patch, pytest.raises(UnfinishedRunError) as error:
        patch.setattr(PolicyProcessor, "save_pretrained", full)
        run_recipe(recipe(**chosen), command="manipulators train tiny")
    assert "is full" in str(error.value)
    assert f"it is in {tmp_path / 'trained' / 'checkpoint-2'}" in str(error.value)
    assert str(error.value).endswith("manipulators train tiny --resume")
    monkeypatch.setattr(run.PolicyTrainer, "training_step", no_step)
    output = run_recipe(recipe(**chosen), resume=True)
    saved, trained = load_file(output / "model.safetensors"), load_file(output / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    assert json.loads((output / "training.json").read_text())["training"]["steps"] == 2


def test_a_full_disk_in_between_leaves_the_last_checkpoint(recipe, tmp_path, monkeypatch):
    """torch does not say that the disk is full."""
    saving = torch.save

    def full(what, path, *args, **kwargs):
        if "checkpoint-2" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 48768 vs 48660")
        return saving(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="inline_container"):  # the disk has space: it is something else
        run_recipe(recipe(evaluation="null", training__max_steps="3"))
    monkeypatch.setattr("manipulators.training.checkpoints.folders._takes_more", lambda folder: False)
    with pytest.raises(DiskFullError, match=r"trained/checkpoint-1 stays; go on from it with --resume"):
        run_recipe(recipe(evaluation="null", training__max_steps="3"), resume=True)
    assert [path.name for path in (tmp_path / "trained").iterdir()] == ["checkpoint-1"]


def test_what_a_run_left_before_its_first_checkpoint_is_nothing(recipe, tmp_path):
    (tmp_path / "trained" / ".incomplete" / "checkpoint-1").mkdir(parents=True)
    assert (run_recipe(recipe(evaluation="null", training__max_steps="1")) / "model.safetensors").is_file()


def test_resuming_equals_an_uninterrupted_run(finished, recipe, tmp_path):
    """Interrupted after step 2, as Ctrl-C would do, then resumed."""
    saving = {"evaluation": "null", "training__save_strategy": "steps", "training__save_steps": "2"}
    original = run.PolicyTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.PolicyTrainer, "training_step", interrupted)
        run_recipe(recipe(**saving))
    with pytest.raises(OutputExistsError):
        run_recipe(recipe(**saving))
    output = run_recipe(recipe(**saving), resume=True)
    resumed = PolicyPipeline.from_pretrained(output, device="cpu").predict_chunk(OBSERVATION)
    torch.testing.assert_close(resumed, finished[1])
    assert json.loads((output / "training.json").read_text())["training"]["steps"] == 5


def test_averaged_weights_are_published_and_said(recipe):
    saving = {"training__save_strategy": "steps", "training__save_steps": "5"}
    output = run_recipe(recipe(evaluation="null", training__ema_decay="0.5", **saving))
    published, checkpoint = load_file(output / "model.safetensors"), output / "checkpoint-5"
    average, last = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    assert average.keys() <= published.keys()
    assert all(torch.equal(published[name], value) for name, value in average.items())
    assert not all(torch.equal(published[name], value) for name, value in last.items())
    assert json.loads((output / "training.json").read_text())["training"]["ema_decay"] == 0.5
    assert "Exponential moving average over the steps, decay up to 0.5" in (output / "README.md").read_text("utf-8")


def test_resuming_from_nothing_is_one_of_our_errors(recipe):
    with pytest.raises(ManipulatorsError):
        run_recipe(recipe(evaluation="null"), resume=True)


def test_an_edited_card_is_kept(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0] / "trained", folder)
    edited = (folder / "README.md").read_text(encoding="utf-8") + "\nMeasured on my arm as well.\n"
    (folder / "README.md").write_text(edited, encoding="utf-8")
    write_checkpoint_card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == edited


def test_further_evaluations_stand_beside_the_first(finished, tmp_path):
    folder = finished[0]
    text = (
        (folder / "tiny.yaml")
        .read_text()
        .replace("horizon: 12}", "horizon: 12,\n  further: [{environment: metaworld/reach-v3}, {task: Do nothing.}]}")
    )
    (tmp_path / "further.yaml").write_text(text)
    output = run_recipe(load_recipe(tmp_path / "further.yaml", [("output", str(tmp_path / "trained"))]))
    result = json.loads((output / "evaluation.json").read_text())
    assert result["environment"] == "metaworld/pick-place-v3"
    assert [(other["environment"], other["task"]) for other in result["further"]] == [
        ("metaworld/reach-v3", "Move the hand to the goal."),
        ("metaworld/pick-place-v3", "Do nothing."),
    ]
    assert all(other["seeds"] == result["seeds"] for other in result["further"])
    assert "| metaworld/reach-v3 |" in (output / "README.md").read_text()


def test_a_base_is_tuned_by_lora_and_only_the_adapter_saved(finished, recipe):
    base = str(finished[0] / "trained")
    output = run_recipe(recipe(base=base, training__tune_diffusion_model="lora", training__lora_rank="2"))
    names = {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "adapter_base.json", "processor_config.json"} <= names
    assert "model.safetensors" not in names
    assert json.loads((output / "adapter_base.json").read_text())["base"] == base
    adapted, plain = (PolicyPipeline.from_pretrained(folder, device="cpu") for folder in (output, base))
    assert not torch.equal(adapted.predict_chunk(OBSERVATION), plain.predict_chunk(OBSERVATION))


def test_a_base_of_another_policy_is_refused(finished, recipe):
    chosen = recipe(base=str(finished[0] / "trained"))
    chosen.policy, chosen.config = "diffusion_policy", {}
    with pytest.raises(InvalidRecipeError, match="is a act_policy; the recipe is for diffusion_policy"):
        run_recipe(chosen)


def test_a_type_of_weights_needs_a_base(recipe):
    with pytest.raises(InvalidRecipeError, match="dtype=bfloat16"):
        run_recipe(recipe(dtype="bfloat16"))


def test_two_runs_do_not_train_in_one_folder(recipe, tmp_path):
    with locked(tmp_path / "trained", "a training"), pytest.raises(FolderInUseError, match="a training"):
        run_recipe(recipe())
