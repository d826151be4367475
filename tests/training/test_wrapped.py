"""Policies that peft has wrapped: trained, saved, resumed and loaded like those with an adapter of our own."""

import shutil

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)

from manipulators import AutoPolicy, PolicyPipeline, PolicyTrainer, merge_and_save
from manipulators.errors import BaseMismatchError, InvalidConfigError

LINEARS = [f"backbone.encoder.layers.0.{name}" for name in ("linear1", "linear2")]
HEAD = "action_head.action_head"
METHODS = {
    "LoRA, a module whole": lambda: LoraConfig(r=2, target_modules=LINEARS, modules_to_save=[HEAD]),
    "AdaLoRA": lambda: AdaLoraConfig(total_step=10, init_r=2, target_r=1, target_modules=LINEARS),
    "IA3": lambda: IA3Config(target_modules=LINEARS, feedforward_modules=[]),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=4, target_modules=LINEARS),
}


@pytest.fixture
def base(make_policy, make_processor, tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path / "base")
    make_processor(policy).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def make_trainer(base, make_processor, make_dataset, make_arguments):
    """Build a trainer of the base as `wrap` returns it; a checkpoint is saved after every step."""

    def make(wrap, output="run", **arguments):
        policy = AutoPolicy.from_pretrained(base)
        arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2} | arguments
        return PolicyTrainer(
            wrap(policy), make_arguments(output, **arguments), make_processor(policy), train_dataset=make_dataset()
        )

    return make


def chunk(policy):
    return policy.eval().predict_action_chunk(state=torch.tensor([[0.5, -1.0, 2.0]]))


@pytest.mark.parametrize("method", METHODS)
def test_wrapped_policy_is_trained_saved_resumed_and_loaded(make_trainer, make_processor, base, tmp_path, method):
    def wrap(policy):
        return get_peft_model(policy, METHODS[method](), adapter_name="robot")

    whole = make_trainer(wrap, "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "half" / "checkpoint-1")
    resumed = make_trainer(wrap, "half")
    resumed.train(resume_from_checkpoint=True)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())

    folder, expected = tmp_path / "whole" / "checkpoint-2", chunk(whole.model)
    assert not (folder / "model.safetensors").exists()
    assert not torch.equal(chunk(AutoPolicy.from_pretrained(base)), expected)
    loaded = AutoPolicy.from_pretrained(folder)
    assert torch.equal(chunk(loaded), expected)
    assert torch.equal(chunk(PolicyPipeline.from_pretrained(folder, device="cpu").policy), expected)
    assert torch.equal(chunk(PeftModel.from_pretrained(AutoPolicy.from_pretrained(base), folder)), expected)
    merge_and_save(loaded, tmp_path / "merged", make_processor(loaded))
    torch.testing.assert_close(chunk(AutoPolicy.from_pretrained(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


def test_adapter_of_transformers_own_method_records_its_base(make_trainer, make_policy, base, tmp_path):
    def wrap(policy):
        policy.add_adapter(LoraConfig(r=2, target_modules=LINEARS), "robot")
        return policy

    trainer = make_trainer(wrap)
    trainer.train()
    assert torch.equal(chunk(AutoPolicy.from_pretrained(tmp_path / "run" / "checkpoint-2")), chunk(trainer.model))
    make_policy(seed=1).save_pretrained(base)  # another base in its place
    with pytest.raises(BaseMismatchError):
        AutoPolicy.from_pretrained(tmp_path / "run" / "checkpoint-2")


def frozen(policy):
    saved = get_peft_model(policy, LoraConfig(r=2, target_modules=LINEARS))
    saved.base_model.peft_config["default"].inference_mode = True
    return saved


def two(policy):
    wrapped = get_peft_model(policy, LoraConfig(r=2, target_modules=LINEARS))
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=LINEARS))
    return wrapped


def beside(policy):
    wrapped = get_peft_model(policy, LoraConfig(r=2, target_modules=LINEARS))
    policy.get_submodule(HEAD).requires_grad_(True)
    return wrapped


REFUSED = {
    "loaded for inference": (frozen, "is_trainable=True"),
    "two adapters": (two, r"2 adapters \(default, other\)"),
    "trained beside it": (beside, rf"2 parameters are trained beside the adapter.*{HEAD}\.weight"),
    "shared outside": (lambda p: get_peft_model(p, VeraConfig(r=2, target_modules=LINEARS)), "peft's VERA"),
    "shared inside": (
        lambda p: get_peft_model(p, RandLoraConfig(r=2, target_modules=LINEARS)),
        "peft's RANDLORA share",
    ),
    "mixed": (
        lambda p: get_peft_model(p, LoraConfig(r=2, target_modules=LINEARS), mixed=True),
        "peft's LORA is not a set of layers",
    ),
    "another model": (lambda p: torch.nn.Linear(1, 1), "needs a policy, not Linear"),
    "no model": (lambda p: None, "needs a policy: "),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_trained_is_refused_before_training(make_trainer, way):
    wrap, message = REFUSED[way]
    with pytest.raises(InvalidConfigError, match=message):
        make_trainer(wrap)


def test_tuning_arguments_contradict_an_adapter(make_trainer):
    message = r"tune_projector=True, but the policy has an adapter already.*Leave the tune_ arguments out"
    with pytest.raises(InvalidConfigError, match=message):
        make_trainer(lambda policy: get_peft_model(policy, METHODS["IA3"]()), tune_projector=True)


def test_a_base_that_is_no_checkpoint_is_refused(make_policy, make_processor, make_arguments):
    policy = make_policy()
    wrapped = get_peft_model(policy, METHODS["IA3"]())
    with pytest.raises(InvalidConfigError, match="the base must be a checkpoint"):
        PolicyTrainer(wrapped, make_arguments(), make_processor(policy))
