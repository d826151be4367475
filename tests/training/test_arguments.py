"""PolicyTrainingArguments through transformers' own parser, from the command line, JSON and YAML."""

import json
import math
import re

import pytest
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.integrations import rewrite_logs

from manipulators import PolicyTrainer, PolicyTrainingArguments
from manipulators.errors import InvalidConfigError
from manipulators.training import arguments as arguments_module


def test_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--tune_llm", "lora", "--tune_visual", "false", "--tune_projector", "True"]
    (arguments,) = HfArgumentParser(PolicyTrainingArguments).parse_args_into_dataclasses(
        [*words, "--ema_decay", "0.9"]
    )
    assert list(arguments.tuning.values()) == ["lora", False, True, None]
    assert arguments.ema_decay == 0.9


def test_json_and_yaml(tmp_path):
    values = {"output_dir": str(tmp_path), "tune_llm": "lora", "tune_visual": False, "learning_rate_visual": 1e-5}
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    lines = [f"output_dir: {tmp_path}", "tune_llm: lora", "tune_visual: false", "learning_rate_visual: 1e-5"]
    (tmp_path / "arguments.yaml").write_text("\n".join(lines))
    parser = HfArgumentParser(PolicyTrainingArguments)
    for (arguments,) in (
        parser.parse_json_file(tmp_path / "arguments.json"),
        parser.parse_yaml_file(tmp_path / "arguments.yaml"),
    ):
        assert list(arguments.tuning.values()) == ["lora", False, None, None]
        assert arguments.learning_rate_visual == 1e-5


def test_what_a_trainer_needs(make_policy, make_processor, make_dataset, tmp_path):
    policy = make_policy()
    processor, arguments = make_processor(policy), PolicyTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = PolicyTrainer(policy, arguments, processing_class=processor, train_dataset=make_dataset(2))
    assert trainer.processor is processor and trainer.processing_class is None
    with pytest.raises(InvalidConfigError, match=r"takes PolicyTrainingArguments.*got TrainingArguments"):
        PolicyTrainer(policy, TrainingArguments(output_dir=str(tmp_path), use_cpu=True), processor)
    with pytest.raises(InvalidConfigError, match="needs the policy's processor, not None"):
        PolicyTrainer(policy, arguments)
    with pytest.raises(InvalidConfigError, match="PolicyTrainer needs a policy"):
        PolicyTrainer(args=arguments, processor=processor)


def test_trackers_are_there_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", lambda: ["wandb"])
    assert PolicyTrainingArguments(str(tmp_path), report_to="wandb", use_cpu=True).report_to == ["wandb"]
    for name, package in (("tensorboard", "tensorboard"), ("comet_ml", "comet-ml")):
        with pytest.raises(InvalidConfigError, match=rf"report_to='{name}'.*pip install {package}$"):
            PolicyTrainingArguments(str(tmp_path), report_to=["wandb", name], use_cpu=True)
    with pytest.raises(InvalidConfigError, match=r"report_to='tensorbord' is no tracker. Did you mean 'tensorboard'"):
        PolicyTrainingArguments(str(tmp_path), report_to="tensorbord", use_cpu=True)


def test_trackers_are_given_the_parts_of_the_loss(
    make_policy, make_processor, make_dataset, make_arguments, monkeypatch
):
    """As named values of every log, which is what transformers' callbacks pass on."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(rewrite_logs(logs))

    monkeypatch.setitem(arguments_module.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(arguments_module, "get_available_reporting_integrations", lambda: ["wandb"])
    policy = make_policy()
    arguments = make_arguments(max_steps=1, report_to="wandb")
    PolicyTrainer(policy, arguments, make_processor(policy), train_dataset=make_dataset(4)).train()
    assert {"train/loss", "train/l1", "train/kl", "train/data_wait"} <= seen[0].keys()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seed(tmp_path, seed):
    for name in ("seed", "data_seed"):
        with pytest.raises(InvalidConfigError, match=f"{name}={seed} must lie between 0 and"):
            PolicyTrainingArguments(output_dir=str(tmp_path), **{name: seed})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", math.nan, "learning_rate=nan must be a finite number"),
        ("learning_rate", "inf", "learning_rate=inf must be a finite number"),
        ("learning_rate", -1e-3, "learning_rate=-0.001 must be greater than 0"),
        ("learning_rate", 0, "learning_rate=0 must be greater than 0"),
        ("learning_rate_visual", -1.0, "learning_rate_visual=-1.0 must be at least 0"),
        ("weight_decay", -1.0, "weight_decay=-1.0 must be at least 0"),
        ("adam_beta2", math.nan, "adam_beta2=nan must be a finite number"),
        ("max_grad_norm", -1.0, "max_grad_norm=-1.0 must be at least 0"),
        ("max_steps", 0, "max_steps=0 must be at least 1; -1 counts epochs"),
        ("num_train_epochs", 0, "num_train_epochs=0 must be greater than 0"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size=0 must be at least 1"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps=0 must be at least 1"),
        ("save_steps", 0, "save_steps=0 must be greater than 0"),
        ("ema_power", 0.0, "ema_power=0.0 must be greater than 0"),
        (
            "train_sampling_strategy",
            "by_size",
            "train_sampling_strategy='by_size' does not exist. Choose one of: random",
        ),
    ],
)
def test_numbers_that_nothing_can_be_trained_with(tmp_path, name, value, message):
    with pytest.raises(InvalidConfigError, match=re.escape(message)):
        PolicyTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_gradients_may_be_left_as_they_are(tmp_path):
    for norm in (0.0, math.inf):
        assert PolicyTrainingArguments(str(tmp_path), use_cpu=True, max_grad_norm=norm).max_grad_norm == norm
