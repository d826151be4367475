"""Parts that are frozen, trained or adapted, through the trainers: arguments, checkpoints, resume."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from manipulators import AutoPolicy, PolicyPipeline, PolicyTrainer, PolicyTrainingArguments
from manipulators.checkpoint import ADAPTER_WEIGHTS
from manipulators.errors import BaseMismatchError, InvalidConfigError, InvalidTuningError, WeightsMismatchError
from manipulators.modeling.adapters import is_adapter_parameter
from manipulators.training.collator import PolicyCollator
from manipulators.training.runs.recipe import load_recipe
from manipulators.training.tuning import apply_tuning

LORA = {"tune_diffusion_model": "lora", "tune_visual": False, "lora_rank": 2}


@pytest.fixture
def base(make_policy, make_processor, tmp_path):
    """The folder of a policy with a camera."""
    policy = make_policy(camera=True)
    policy.save_pretrained(tmp_path / "base")
    make_processor(policy).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make_trainer(base, make_processor, make_dataset, make_arguments):
    """Build a trainer of the saved policy; keywords are training arguments."""

    def make(eval_dataset=None, **arguments):
        policy = AutoPolicy.from_pretrained(base)
        dataset = make_dataset(camera=True)
        arguments = make_arguments(**arguments)
        return PolicyTrainer(
            policy, arguments, make_processor(policy), train_dataset=dataset, eval_dataset=eval_dataset
        )

    return make


def weights(policy):
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}


def test_a_frozen_part_does_not_change(make_trainer, base):
    trainer = make_trainer(tune_visual=False, learning_rate=1e-2)
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("backbone.image_encoder.") for name in changed)
    assert trainer.model.training
    assert not trainer.model.backbone.image_encoder.training


def test_a_lora_run_saves_the_adapter_only_and_everything_that_goes_with_it(make_trainer, base, tmp_path):
    trainer = make_trainer(**LORA, learning_rate=1e-2, save_strategy="steps", save_steps=4)
    before = weights(trainer.model)
    trainer.train()
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, before[name]) != is_adapter_parameter(name) or "vae" in name, name
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-4"):
        names = {path.name for path in folder.iterdir()}
        files = {ADAPTER_WEIGHTS, "adapter_config.json", "adapter_base.json", "config.json", "processor_config.json"}
        assert files | {"README.md"} <= names
        assert "model.safetensors" not in names
        pipeline = PolicyPipeline.from_pretrained(folder, device="cpu")
        loaded = pipeline.policy.state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.9}, {"use_dora": True, "lora_dropout": 0.1}])
def test_resuming_a_lora_run_equals_an_uninterrupted_one(make_trainer, tmp_path, more):
    options = LORA | more | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(output="whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    torch.manual_seed(9)  # other LoRA matrices to begin with
    resumed = make_trainer(output="half", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_resume_is_strict(make_trainer, tmp_path):
    options = LORA | {"save_strategy": "steps", "save_steps": 1}
    make_trainer(max_steps=1, **options).train()
    path = tmp_path / "run" / "checkpoint-1" / ADAPTER_WEIGHTS
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)
    with pytest.raises(WeightsMismatchError, match="1 missing"):
        make_trainer(max_steps=2, **options).train(resume_from_checkpoint=True)


def test_resume_refuses_another_base(make_trainer, base):
    options = LORA | {"save_strategy": "steps", "save_steps": 1}
    make_trainer(max_steps=1, **options).train()
    tensors = load_file(base / "model.safetensors")
    tensors["action_head.decoder_pos_embed.weight"] += 1.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="are not those that the adapter"):
        make_trainer(max_steps=2, **options).train(resume_from_checkpoint=True)


def test_an_adapter_that_transformers_put_in_is_saved_too(base, tmp_path):
    policy = AutoPolicy.from_pretrained(base)
    policy.add_adapter(LoraConfig(target_modules=["linear1"], r=2, init_lora_weights=False))
    policy.save_pretrained(tmp_path / "adapter")
    loaded = AutoPolicy.from_pretrained(tmp_path / "adapter", base=base).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in policy.state_dict().items())


def test_the_best_adapter_is_loaded(make_trainer, make_dataset, tmp_path):
    trainer = make_trainer(
        **LORA,
        eval_dataset=make_dataset(4, camera=True, seed=2),
        max_steps=3,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = AutoPolicy.from_pretrained(tmp_path / "run" / f"checkpoint-{trainer.state.best_global_step}").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


def test_a_part_that_is_absent(make_trainer):
    with pytest.raises(InvalidTuningError, match=r"tune_llm='lora', but ACTPolicy has no such part.*tune_projector"):
        make_trainer(tune_llm="lora")


def test_a_part_without_layers_for_lora(make_policy, monkeypatch):
    policy = make_policy()
    monkeypatch.setattr(
        type(policy), "lora_targets", {"tune_diffusion_model": policy.lora_targets["tune_diffusion_model"]}
    )
    with pytest.raises(InvalidTuningError) as caught:
        apply_tuning(policy, {"tune_projector": "lora"})
    assert str(caught.value) == (
        "tune_projector='lora', but ACTPolicy has no layers for LoRA in this part. Train it in full with "
        "tune_projector=True, or freeze it with tune_projector=False. Parts with layers for LoRA: "
        "tune_diffusion_model."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tune_visual": "lorra"}, "tune_visual='lorra' must be None, False, True or 'lora'"),
        ({"lora_rank": 0}, "lora_rank=0 must be at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 in \[0, 1\)"),
    ],
)
def test_impossible_arguments(tmp_path, arguments, message):
    with pytest.raises(InvalidConfigError, match=message):
        PolicyTrainingArguments(str(tmp_path), use_cpu=True, **arguments)


def test_a_recipe_says_it():
    changes = [("training.tune_visual", "lora"), ("training.tune_projector", "false"), ("training.tune_llm", "null")]
    training = load_recipe("act_metaworld", changes).training
    assert (training["tune_visual"], training["tune_projector"], training["tune_llm"]) == ("lora", False, None)


def test_plain_trainer_trains_a_policy_that_plain_peft_wraps(base, make_processor, make_dataset, tmp_path):
    policy = AutoPolicy.from_pretrained(base)
    wrapped = get_peft_model(policy, LoraConfig(target_modules=["linear1", "linear2"], r=2))
    arguments = TrainingArguments(
        str(tmp_path / "plain"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        label_names=["actions"],
    )
    collator = PolicyCollator(make_processor(policy))
    before = weights(wrapped)
    Trainer(wrapped, arguments, train_dataset=make_dataset(camera=True), data_collator=collator).train()
    changed = {name for name, value in weights(wrapped).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    again = PeftModel.from_pretrained(AutoPolicy.from_pretrained(base), tmp_path / "plain" / "checkpoint-2")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights(wrapped).items())
