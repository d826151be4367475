"""What every policy promises about its parts and about LoRA adapters in them."""

import copy
import itertools
import json
import shutil

import pytest
import torch
import transformers
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from manipulators import AutoPolicy, PolicyPipeline, merge_and_save, parameter_table
from manipulators.checkpoint import ADAPTER_BASE, ADAPTER_WEIGHTS
from manipulators.errors import (
    BaseMismatchError,
    CorruptFileError,
    InvalidConfigError,
    InvalidTuningError,
    MissingFileError,
    WeightsMismatchError,
    WeightsValueError,
)
from manipulators.modeling.adapters import is_adapter_parameter, require_saved, unwrapped
from manipulators.training.arguments import PARTS
from manipulators.training.tuning import apply_tuning, lora_modules


def parts_of(policy):
    return [part for part in policy.parameter_parts if policy.part_modules(part)]


def lora_everywhere(policy):
    return dict.fromkeys((part for part in parts_of(policy) if part in policy.lora_targets), "lora")


def observation(policy):
    inputs = policy.config.example_inputs(2)
    return {name: value for name, value in inputs.items() if not name.startswith("action")}


def predict(policy):
    torch.manual_seed(0)
    return policy.predict_action_chunk(**observation(policy))


def aligned(policy):
    """A copy whose tensors begin anew in memory: where they lie in a file changes sums in their last bits."""
    return copy.deepcopy(policy).eval()


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def base(complete_case, checkpoint, tmp_path):
    """The folder of a policy that an adapter can be trained on."""
    return shutil.copytree(checkpoint(complete_case)[1], tmp_path / "base")


@pytest.fixture
def adapted(base):
    """A policy with LoRA in all its parts, of which no matrix is zero."""
    policy = AutoPolicy.from_pretrained(base)
    apply_tuning(policy, lora_everywhere(policy), r=2, lora_alpha=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture
def adapter(adapted, processor_of, tmp_path):
    """The folder in which that adapter is saved."""
    adapted.save_pretrained(tmp_path / "adapter")
    processor_of(adapted.config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_other_methods_of_peft(base, processor_of, tmp_path):
    """Layers that peft's own function puts in are saved and loaded like those of `add_adapter`."""
    policy = AutoPolicy.from_pretrained(base)
    linear = [n for n, m in policy.named_modules() if isinstance(m, torch.nn.Linear) and "out_proj" not in n]
    wrapped = get_peft_model(policy, LoHaConfig(r=2, target_modules=linear, init_weights=False), adapter_name="robot")
    assert unwrapped(wrapped) is policy and unwrapped(policy) is policy
    require_saved(policy)
    expected = predict(policy.eval())
    assert torch.equal(predict(wrapped), expected)
    policy.save_pretrained(tmp_path / "adapter")
    assert not torch.equal(predict(AutoPolicy.from_pretrained(base)), expected)
    loaded = AutoPolicy.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(predict(loaded), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(predict(merge_and_save(loaded, tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


# --- parts ------------------------------------------------------------------------------------------------


def test_parts_are_named_like_the_arguments_and_hold_every_trained_parameter_once(policy):
    """What is never trained, such as the text encoder of Diffusion Policy, may stand outside."""
    assert parts_of(policy)
    assert set(policy.parameter_parts) <= set(PARTS)
    assert set(policy.lora_targets) <= set(policy.parameter_parts)
    modules = [name for part in parts_of(policy) for name in policy.part_modules(part)]
    for name, parameter in policy.named_parameters():
        held = sum(name.startswith(module + ".") for module in modules)
        assert held == 1 or (held == 0 and not parameter.requires_grad), name


def test_every_declared_module_exists(complete_case, build):
    policy = build(complete_case)
    names = dict(policy.named_modules())
    for declared in (*policy.parameter_parts.values(), policy.modules_to_save):
        assert [name for name in declared if name not in names] == []


def test_no_parameter_is_taken_for_an_adapters(policy):
    assert [name for name, _ in policy.named_parameters() if is_adapter_parameter(name)] == []


def test_a_frozen_part_has_no_gradients_and_stays_in_eval_mode(policy):
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    for part in parts_of(policy):
        frozen = copy.deepcopy(policy)
        apply_tuning(frozen, {part: False})
        frozen.train()
        held = frozen.part_modules(part).values()
        assert not any(inner.training for module in held for inner in module.modules())
        assert frozen.training
        inside = {id(parameter) for module in held for parameter in module.parameters()}
        others = [p for name, p in frozen.named_parameters() if name in trained and id(p) not in inside]
        assert all(parameter.requires_grad for parameter in others)
        if others:
            frozen(**frozen.config.example_inputs(2)).loss.backward()
            assert all(parameter.grad is None for parameter in frozen.parameters() if id(parameter) in inside)
        apply_tuning(frozen, {part: True})
        frozen.train()
        names = {name for name, parameter in frozen.named_parameters() if id(parameter) in inside}
        assert {name for name, parameter in frozen.named_parameters() if parameter.requires_grad} == trained | names
        assert all(inner.training for module in frozen.part_modules(part).values() for inner in module.modules())


def test_nothing_changes_without_modes(policy):
    before = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    apply_tuning(policy, dict.fromkeys(PARTS))
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == before


def test_a_part_that_is_absent_is_named(policy):
    for part, mode in itertools.product(set(PARTS) - set(parts_of(policy)), (False, True, "lora")):
        with pytest.raises(InvalidTuningError, match=rf"{part}={mode!r}, but \w+ has no such part.*tune_"):
            apply_tuning(policy, {part: mode})


# --- LoRA -------------------------------------------------------------------------------------------------


def test_only_the_adapter_is_trained_and_gradients_reach_all_of_it(complete_case, base):
    policy = AutoPolicy.from_pretrained(base)
    apply_tuning(policy, lora_everywhere(policy), r=2)
    policy.train()(**policy.config.example_inputs(2)).loss.backward()
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if is_adapter_parameter(name)}
    assert any("lora_A" in name for name in trained)
    reached = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    plain = {name.split(".lora_")[0] for name in trained - reached}
    assert {f"{name}.weight" for name in plain} <= complete_case.untrained


def test_a_fresh_adapter_changes_nothing(base):
    policy = AutoPolicy.from_pretrained(base)
    before = predict(aligned(policy))
    apply_tuning(policy, lora_everywhere(policy), r=2)
    torch.testing.assert_close(predict(aligned(policy)), before)


def test_parts_beside_lora_are_saved_whole(base, tmp_path):
    first = next(iter(lora_everywhere(AutoPolicy.from_pretrained(base))))
    policy = AutoPolicy.from_pretrained(base)
    others = [part for part in parts_of(policy) if part != first]
    never_trained = any(not parameter.requires_grad for parameter in policy.parameters())
    modes = {first: "lora"} | dict.fromkeys(others[:1], True) | dict.fromkeys(others[1:], False)
    apply_tuning(policy, modes, r=2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    policy.save_pretrained(tmp_path / "adapter")
    assert_same_weights(AutoPolicy.from_pretrained(tmp_path / "adapter"), policy)
    shown = parameter_table(policy)
    assert all(part in shown for part in parts_of(policy))
    assert ("frozen" in shown) == (never_trained or bool(others[1:]))


def test_base_and_adapter_come_back_to_the_bit(adapted, adapter):
    assert not (adapter / "model.safetensors").exists()
    assert {ADAPTER_WEIGHTS, "adapter_config.json", ADAPTER_BASE, "config.json"} <= {p.name for p in adapter.iterdir()}
    for loaded in (AutoPolicy.from_pretrained(adapter), type(adapted).from_pretrained(adapter)):
        assert not loaded.training
        assert_same_weights(loaded, adapted)
        assert torch.equal(predict(aligned(loaded)), predict(aligned(adapted)))
    loaded = AutoModel.from_pretrained(adapter)
    assert_same_weights(loaded, adapted)
    pipeline = PolicyPipeline.from_pretrained(adapter, device="cpu")
    assert_same_weights(pipeline.policy, adapted)


def test_dora_comes_back_too(base, tmp_path):
    policy = AutoPolicy.from_pretrained(base)
    apply_tuning(policy, lora_everywhere(policy), r=2, use_dora=True)
    assert any("magnitude" in name for name, p in policy.named_parameters() if p.requires_grad)
    policy.save_pretrained(tmp_path / "adapter")
    assert_same_weights(AutoPolicy.from_pretrained(tmp_path / "adapter"), policy)


def test_merged_weights_act_the_same(adapted, adapter, tmp_path):
    before = copy.deepcopy(adapted.state_dict())
    processor = PolicyPipeline.from_pretrained(adapter, device="cpu").processor
    whole = merge_and_save(adapted, tmp_path / "merged", processor)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert not any(is_adapter_parameter(name) for name, _ in whole.named_parameters())
    loaded = PolicyPipeline.from_pretrained(tmp_path / "merged", device="cpu").policy
    expected = predict(aligned(adapted))
    for policy in (whole, loaded):
        torch.testing.assert_close(predict(aligned(policy)), expected, atol=1e-5, rtol=0)
    assert (tmp_path / "merged" / "README.md").is_file()
    assert (predict(AutoPolicy.from_pretrained(tmp_path / "base")) - expected).abs().max() > 1e-3


def test_without_an_adapter_there_is_nothing_to_merge(policy, tmp_path):
    with pytest.raises(InvalidConfigError, match="no adapter to merge"):
        merge_and_save(policy, tmp_path)


def test_a_policy_from_no_checkpoint_gets_no_adapter(policy):
    with pytest.raises(InvalidConfigError, match="the base must be a checkpoint"):
        apply_tuning(policy, lora_everywhere(policy))


def test_a_second_adapter_is_refused(adapted):
    with pytest.raises(InvalidConfigError, match="has an adapter already"):
        apply_tuning(adapted, lora_everywhere(adapted))


# --- adapters that do not fit -----------------------------------------------------------------------------


def first_of(tensors):
    return sorted(tensors)[0]


@pytest.mark.parametrize(
    ("door", "change", "message"),
    [
        (AutoPolicy, lambda tensors: tensors.pop(first_of(tensors)), "1 missing"),
        (AutoModel, lambda tensors: tensors.update(stray=torch.zeros(1)), "1 unexpected:\n    stray"),
        (
            PolicyPipeline,
            lambda tensors: tensors.update({first_of(tensors): torch.zeros(1, 7)}),
            "1 of another shape",
        ),
    ],
)
def test_an_adapter_with_other_tensors_is_refused(adapter, door, change, message):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(WeightsMismatchError, match=message):
        door.from_pretrained(adapter)


@pytest.mark.parametrize(
    ("door", "change", "message"),
    [
        (
            AutoModel,
            lambda tensor: tensor.index_fill(0, torch.tensor([0]), float("nan")),
            "1 with NaN or infinity:\n    .*lora_",
        ),
        (PolicyPipeline, lambda tensor: tensor.to(torch.int32), "lora_.*: torch.int32"),
    ],
)
def test_an_adapter_with_values_that_are_no_numbers_is_refused(adapter, door, change, message):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    name = next(name for name in tensors if "lora_" in name)
    save_file(tensors | {name: change(tensors[name])}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(WeightsValueError, match=message):
        door.from_pretrained(adapter)


def test_an_adapter_without_its_file_or_with_half_of_it(adapter):
    path = adapter / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorruptFileError, match=ADAPTER_WEIGHTS):
        AutoPolicy.from_pretrained(adapter)
    path.unlink()
    with pytest.raises(MissingFileError, match=rf"holds no {ADAPTER_WEIGHTS}"):
        AutoPolicy.from_pretrained(adapter)


def test_another_base_is_refused(adapter, base):
    tensors = load_file(base / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[0] += 1e-4
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="are not those that the adapter"):
        AutoPolicy.from_pretrained(adapter)


def test_a_base_that_has_moved_can_be_said(adapted, adapter, base, tmp_path):
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(MissingFileError, match=r"needs its base .*base=folder_or_id"):
        AutoPolicy.from_pretrained(adapter)
    assert_same_weights(AutoPolicy.from_pretrained(adapter, base=tmp_path / "elsewhere"), adapted)
    assert_same_weights(PolicyPipeline.from_pretrained(adapter, base=tmp_path / "elsewhere").policy, adapted)


def test_the_same_base_in_half_precision_is_accepted(adapter):
    loaded = AutoPolicy.from_pretrained(adapter, dtype=torch.bfloat16)
    own, lora = (
        {p.dtype for name, p in loaded.named_parameters() if is_adapter_parameter(name) is adapts}
        for adapts in (False, True)
    )
    assert torch.bfloat16 in own  # some policies keep a part of themselves in float32
    assert {p.dtype for name, p in loaded.named_parameters() if "lora_" in name} == {torch.float32} <= lora


def test_a_damaged_record_of_the_base(adapter):
    (adapter / ADAPTER_BASE).write_text(json.dumps({"base": json.loads((adapter / ADAPTER_BASE).read_text())["base"]}))
    with pytest.raises(CorruptFileError, match=ADAPTER_BASE):
        AutoPolicy.from_pretrained(adapter)


# --- plain peft -------------------------------------------------------------------------------------------


def test_plain_peft_wraps_a_policy(base, tmp_path, monkeypatch):
    policy = AutoPolicy.from_pretrained(base)
    modules = dict(policy.named_modules())
    targets = [name for part in policy.lora_targets for name in lora_modules(policy, part)]
    targets = [name for name in targets if isinstance(modules[name], torch.nn.Linear)]
    wrapped = get_peft_model(policy, LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    wrapped.train()(**wrapped.config.example_inputs(2)).loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_B" in n and "vae" not in n)
    wrapped.save_pretrained(tmp_path / "peft")

    again = PeftModel.from_pretrained(AutoPolicy.from_pretrained(base), tmp_path / "peft")
    assert_same_weights(again, wrapped)
    torch.testing.assert_close(predict(again.eval()), predict(wrapped.eval()))
    said = []
    monkeypatch.setattr("manipulators.modeling.adapters.logger.warning", said.append)
    ours = AutoPolicy.from_pretrained(tmp_path / "peft")
    torch.testing.assert_close(predict(ours), predict(wrapped))
    assert "is not known" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_a_base_as_another_project_publishes_it(shared, tmp_path, dtype):
    source = shared / "golden" / "act_envstate" / "checkpoint"
    policy = AutoPolicy.from_pretrained(source, dtype=dtype)
    apply_tuning(policy, lora_everywhere(policy), r=2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path)
    assert_same_weights(loaded, policy)
    assert loaded.dtype == policy.dtype == dtype


def test_the_right_base_in_float16_is_no_other_base(adapter, base, adapted):
    loaded = AutoPolicy.from_pretrained(adapter, dtype=torch.float16)
    assert torch.float16 in {parameter.dtype for parameter in loaded.parameters()}
    tensors = load_file(base / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[0] += 0.1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="are not those that the adapter"):
        AutoPolicy.from_pretrained(adapter, dtype=torch.float16)


def test_merging_takes_the_processor_in_the_adapters_folder(adapter, processor_of, tmp_path):
    policy = AutoPolicy.from_pretrained(adapter)
    merge_and_save(policy, tmp_path / "merged")
    pipeline = PolicyPipeline.from_pretrained(tmp_path / "merged", device="cpu")
    assert pipeline.processor.to_dict() == processor_of(policy.config).to_dict()
    assert (tmp_path / "merged" / "README.md").is_file()


def test_transformers_pipeline_loads_an_adapter(adapter, adapted):
    pipeline = transformers.pipeline("robotics", str(adapter), device="cpu")
    assert_same_weights(pipeline.policy, adapted)
    assert torch.equal(predict(aligned(pipeline.policy)), predict(aligned(adapted)))


def test_overrides_of_an_adapter_are_honoured(adapter):
    modes = json.loads((adapter / "config.json").read_text())["normalization_mapping"]
    pipeline = PolicyPipeline.from_pretrained(adapter, device="cpu", normalization_mapping={"STATE": "IDENTITY"})
    assert pipeline.processor.normalization_mapping == modes | {"STATE": "IDENTITY"}
    assert {kind: mode.value for kind, mode in pipeline.policy.config.normalization_mapping.items()} == (
        modes | {"STATE": "IDENTITY"}
    )
