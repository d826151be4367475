"""Weights in 8 bits by torchao and quanto, which compute on any CPU; skipped where they are not installed."""

import json
import shutil

import pytest
import torch
from transformers import QuantoConfig, TorchAoConfig

from manipulators import AutoPolicy, PolicyPipeline, merge_and_save
from manipulators.errors import CheckpointError, InvalidConfigError, InvalidTuningError
from manipulators.inference.speed import example_request
from manipulators.modeling.quantization import quantized_names
from manipulators.training.tuning import apply_tuning

QUANTIZED = (
    "act_two_cameras",
    "diffusion_language",
    "pi0",
    "pi05",
    "gr00t_n1_5",
    "gr00t_n1",
    "composed_act_flow_matching",
)
LIBRARIES = {"torchao": "torchao", "quanto": "optimum.quanto"}  # by the name of its method


@pytest.fixture(params=LIBRARIES)
def eight_bits(request):
    """The config of a library."""
    pytest.importorskip(LIBRARIES[request.param], reason=f"{request.param} is not installed")
    if request.param == "quanto":
        return QuantoConfig(weights="int8")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def predict(policy):
    return policy.predict_action_chunk(**policy.config.example_inputs(2), **policy.config.example_draws(2))


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_declared_is_quantised_and_saved_or_refused(cases, checkpoint, name, eight_bits, tmp_path):
    policy, folder = checkpoint(cases[name])
    loaded = AutoPolicy.from_pretrained(folder, quantization_config=eight_bits)
    names = quantized_names(loaded)
    assert names and all(n.startswith(tuple(policy.quantizable)) for n in names)
    found = predict(loaded)
    assert 0 < distance(found, predict(policy)) < 0.02
    if isinstance(eight_bits, QuantoConfig):
        with pytest.raises(CheckpointError, match="Weights quantised by quanto cannot be saved"):
            loaded.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        return
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoPolicy.from_pretrained(tmp_path / "saved")
    assert quantized_names(again) == names and torch.equal(predict(again), found)


def test_an_adapter_is_trained_on_them(cases, checkpoint, eight_bits, tmp_path):
    _, folder = checkpoint(cases["gr00t_n1_5"])
    base = shutil.copytree(folder, tmp_path / "base")
    trained = AutoPolicy.from_pretrained(base, quantization_config=eight_bits)
    with pytest.raises(InvalidTuningError, match="quantised and cannot be trained themselves"):
        apply_tuning(trained, {"tune_llm": True})
    apply_tuning(trained, {"tune_llm": "lora"}, r=2, lora_alpha=4)
    config = trained.config
    trained(**config.example_inputs(2), **config.example_draws(2, training=True)).loss.backward()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.sub_(parameter.grad.sign() * 0.05)
    assert not any(trained.get_parameter(name).requires_grad for name in quantized_names(trained))
    expected = predict(trained)
    trained.save_pretrained(tmp_path / "adapter")
    again = AutoPolicy.from_pretrained(tmp_path / "adapter")
    assert quantized_names(again) and torch.equal(predict(again), expected)
    method = "quanto" if isinstance(eight_bits, QuantoConfig) else "torchao"
    with pytest.raises(InvalidConfigError, match=f"by {method} cannot be turned .* quantization_config=None"):
        merge_and_save(again, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    plain = AutoPolicy.from_pretrained(tmp_path / "adapter", quantization_config=None)
    assert distance(predict(merge_and_save(plain, tmp_path / "merged")), expected) < 0.02


def test_a_pipeline_in_bfloat16(cases, checkpoint, eight_bits):
    _, folder = checkpoint(cases["pi0"])
    pipeline = PolicyPipeline.from_pretrained(folder, quantization_config=eight_bits, dtype="bfloat16", device="cpu")
    assert quantized_names(pipeline.policy)
    action = pipeline(*example_request(pipeline, 1))
    assert action.dtype == torch.float32 and torch.isfinite(action).all()


def test_a_library_that_is_absent(cases, checkpoint, tmp_path, monkeypatch):
    """At both doors: quantising, and loading what another machine has quantised."""

    def absent(*_, **__):
        raise ImportError("it needs pip install optimum-quanto")

    _, folder = checkpoint(cases["act_two_cameras"])
    monkeypatch.setattr("transformers.quantizers.quantizer_quanto.QuantoHfQuantizer.validate_environment", absent)
    plain = {"quant_method": "quanto", "weights": "int8"}
    message = "Weights quantised by quanto need its library: it needs pip install optimum-quanto. Install it"
    for config in (QuantoConfig(weights="int8"), plain):
        with pytest.raises(InvalidConfigError, match=message):
            AutoPolicy.from_pretrained(folder, quantization_config=config)
    shutil.copytree(folder, tmp_path / "quantised")
    path = tmp_path / "quantised/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": plain}))
    with pytest.raises(InvalidConfigError, match=message):
        AutoPolicy.from_pretrained(tmp_path / "quantised")
