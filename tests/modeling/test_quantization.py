"""What every policy promises about weights in 4 or 8 bits, and about adapters on them."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BitsAndBytesConfig

from manipulators import AutoPolicy, PolicyPipeline, merge_and_save
from manipulators.errors import (
    BaseMismatchError,
    CheckpointError,
    FusedPolicyError,
    InvalidConfigError,
    WeightsValueError,
)
from manipulators.inference.speed import example_request
from manipulators.modeling.precision import compute_dtype
from manipulators.modeling.quantization import quantized_names
from manipulators.training.tuning import apply_tuning

pytestmark = pytest.mark.usefixtures("bitsandbytes")

QUANTIZED = ("act_two_cameras", "diffusion_language", "pi0", "gr00t_n1_5", "gr00t_n1", "composed_act_flow_matching")


def bits(number, **options):
    four = {"bnb_4bit_quant_type": "nf4"} if number == 4 else {}
    return BitsAndBytesConfig(**{f"load_in_{number}bit": True}, **four, **options)


def predict(policy):
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2)
    cast = {name: to_dtype(value, policy.dtype) for name, value in (inputs | draws).items()}
    return policy.predict_action_chunk(**cast).float()


def to_dtype(value, dtype):
    if isinstance(value, list):
        return [to_dtype(item, dtype) for item in value]
    return value.to(dtype) if value.is_floating_point() else value


@pytest.fixture(params=QUANTIZED)
def saved(request, cases, checkpoint):
    """A policy that has layers to quantise, and the folder that holds it."""
    return checkpoint(cases[request.param])


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("number", "tolerance"), [(8, 0.05), (4, 0.3)])
def test_what_is_declared_is_quantised_and_acts_the_same(saved, number, tolerance, tmp_path):
    policy, folder = saved
    loaded = AutoPolicy.from_pretrained(folder, quantization_config=bits(number))
    names = quantized_names(loaded)
    assert names and all(name.startswith(tuple(policy.quantizable)) for name in names)
    assert {p.dtype for n, p in loaded.named_parameters() if n not in names} == {torch.float32}
    assert loaded.dtype == compute_dtype(loaded) == torch.float32
    expected, found = predict(policy), predict(loaded)
    assert 0 < distance(found, expected) < tolerance
    # Saved after it has computed, and read again.
    loaded.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert quantized_names(again) == names and again.dtype == torch.float32
    assert torch.equal(predict(again), found)


@pytest.mark.parametrize("saved", ["diffusion_language", "gr00t_n1_5"], indirect=True)
def test_a_pipeline_acts_in_robot_units(saved):
    policy, folder = saved
    pipeline = PolicyPipeline.from_pretrained(folder, quantization_config=bits(4), dtype="bfloat16", device="cpu")
    assert quantized_names(pipeline.policy)
    if policy.config.n_obs_steps > 1:
        observation, task = example_request(pipeline, 1)
        observation = {name: value[0, -1] for name, value in observation.items()}
        task = task and task[0]
    else:
        observation, task = example_request(pipeline, 1)
    action = pipeline(observation, task)
    assert action.dtype == torch.float32 and torch.isfinite(action).all() and action.shape[-1] == 2


@pytest.mark.parametrize("saved", ["act_two_cameras", "pi0", "gr00t_n1"], indirect=True)
def test_an_adapter_on_quantised_weights_comes_back_and_is_merged(saved, tmp_path):
    policy, folder = saved
    base = shutil.copytree(folder, tmp_path / "base")
    options = bits(4, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)
    trained = AutoPolicy.from_pretrained(base, quantization_config=options)
    parts = {part: "lora" for part in trained.lora_targets if trained.part_modules(part)}
    apply_tuning(trained, parts, r=2, lora_alpha=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    expected = predict(trained)
    trained.save_pretrained(tmp_path / "adapter")
    # As it was trained; on the base as it is, which another path may name; merged.
    again = AutoPolicy.from_pretrained(tmp_path / "adapter")
    assert torch.equal(predict(again), expected) and quantized_names(again)
    plain = AutoPolicy.from_pretrained(tmp_path / "adapter", quantization_config=None)
    assert not quantized_names(plain) and distance(predict(plain), expected) < 0.3
    given = AutoPolicy.from_pretrained(tmp_path / "adapter", base=AutoPolicy.from_pretrained(base))
    assert torch.equal(predict(given), predict(plain))
    whole = merge_and_save(again, tmp_path / "merged")
    assert torch.equal(predict(again), expected)
    read = AutoPolicy.from_pretrained(tmp_path / "merged")
    assert not quantized_names(read) and {p.dtype for p in read.parameters()} == {torch.float32}
    assert torch.equal(predict(read), predict(whole))
    assert distance(predict(read), expected) < 0.02
    # Another base is found out, quantised or not: one value of a quantised weight differs.
    name = quantized_names(trained)[0].replace(".base_layer", "")
    with torch.no_grad():
        policy = AutoPolicy.from_pretrained(base)
        policy.get_parameter(name).view(-1)[0] += 1
    policy.save_pretrained(base)
    for arguments in ({}, {"quantization_config": None}):
        with pytest.raises(BaseMismatchError):
            AutoPolicy.from_pretrained(tmp_path / "adapter", **arguments)


def test_what_cannot_be_quantised_is_refused(checkpoint, tiny_diffusion, tmp_path):
    policy = AutoPolicy.from_config(tiny_diffusion())
    policy.save_pretrained(tmp_path)
    with pytest.raises(InvalidConfigError, match="DiffusionPolicy has no layers here that may be quantised"):
        AutoPolicy.from_pretrained(tmp_path, quantization_config=bits(8))


def test_broken_weights_are_found_before_they_are_quantised(tiny_act, tmp_path):
    AutoPolicy.from_config(tiny_act()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.encoder.layers.0.linear1.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsValueError, match="linear1"):
        AutoPolicy.from_pretrained(tmp_path, quantization_config=bits(4))


def test_a_library_without_files_is_refused_before_anything_is_written(tiny_act, tmp_path):
    policy = AutoPolicy.from_config(tiny_act())
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path, quantization_config=bits(8))
    loaded.hf_quantizer.is_serializable = lambda: False
    with pytest.raises(FusedPolicyError, match="is quantised"):
        loaded.fuse()
    with pytest.raises(CheckpointError, match="bitsandbytes cannot be saved"):
        loaded.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
