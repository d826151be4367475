"""PolicyTrainingArguments through transformers' own parser, from the command line, JSON and YAML."""

import json
import math
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

from manipulators import PolicyTrainer, PolicyTrainingArguments
from manipulators.errors import InvalidConfigError


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
    with pytest.raises(InvalidConfigError, match="model_init= is not supported"):
        PolicyTrainer(args=arguments, processor=processor, model_init=make_policy)


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
