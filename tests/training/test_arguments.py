"""PolicyTrainingArguments through transformers' own parser, from the command line, JSON and YAML."""

import json

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
    with pytest.raises(InvalidConfigError, match="PolicyTrainer needs a policy"):
        PolicyTrainer(args=arguments, processor=processor)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seed(tmp_path, seed):
    for name in ("seed", "data_seed"):
        with pytest.raises(InvalidConfigError, match=f"{name}={seed} must lie between 0 and"):
            PolicyTrainingArguments(output_dir=str(tmp_path), **{name: seed})
