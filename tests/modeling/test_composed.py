"""ComposedPolicy: which backbone goes with which action head, and what those that go together can do."""

import copy
import json
import logging
import runpy
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoProcessor

from manipulators import (
    AutoPolicy,
    ComposedConfig,
    ComposedPolicy,
    PolicyPipeline,
    register_action_head,
    register_backbone,
)
from manipulators.configuration import composed
from manipulators.errors import InvalidConfigError, UnknownConfigFieldError
from manipulators.hub_cards.checkpoint_card import write_checkpoint_card
from manipulators.hub_cards.lint import lint_card
from manipulators.modeling import components
from manipulators.modeling.seam import Features
from manipulators.processing.registry import processor_class
from manipulators.training.tuning import apply_tuning

POLICY_CASES = runpy.run_path(str(Path(__file__).parent.parent / "policy_cases.py"))
BACKBONES, HEADS, tiny_composed = (POLICY_CASES[name] for name in ("BACKBONES", "HEADS", "tiny_composed"))
PAIRS = list(product(BACKBONES, HEADS))


def observation_of(config, batch_size=2):
    inputs = config.example_inputs(batch_size)
    return {name: value for name, value in inputs.items() if not name.startswith("action")}


def predict(policy, batch_size=2):
    return policy.predict_action_chunk(
        **observation_of(policy.config, batch_size), **policy.config.example_draws(batch_size)
    )


def raw_observation(config):
    shapes = {name: feature.shape for name, feature in config.input_features.items()}
    return {name: torch.rand(*shape) for name, shape in shapes.items()}


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone, head", PAIRS)
def test_a_pair(backbone, head, processor_of, tmp_path):
    """It is trained for a step, samples, is saved and loaded, controls a robot, and takes LoRA."""
    torch.manual_seed(0)
    config = tiny_composed(backbone, head)
    policy = ComposedPolicy(config)

    optimizer = torch.optim.SGD(policy.train().parameters(), lr=1e-3)
    loss = policy(**config.example_inputs(2), **config.example_draws(2, training=True)).loss
    loss.backward()
    assert torch.isfinite(loss)
    for part in (policy.backbone, policy.action_head):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    optimizer.step()

    chunk = predict(policy.eval())
    assert chunk.shape == (2, 8, 2) and torch.isfinite(chunk).all()
    assert torch.equal(predict(policy), chunk)
    moved = observation_of(config)
    moved["state"] = moved["state"] + 1
    assert not torch.equal(policy.predict_action_chunk(**moved, **config.example_draws(2)), chunk)

    policy.save_pretrained(tmp_path / "base")
    processor = processor_of(config)
    processor.save_pretrained(tmp_path / "base")
    assert torch.equal(predict(AutoPolicy.from_pretrained(tmp_path / "base")), chunk)
    pipeline = PolicyPipeline.from_pretrained(tmp_path / "base", device="cpu")
    assert type(pipeline.processor) is type(processor) is processor_class(config)
    assert pipeline(raw_observation(config), task="push the red button").shape == (2,)

    adapted = AutoPolicy.from_pretrained(tmp_path / "base")
    part = "tune_diffusion_model" if head != "act" else "tune_visual"
    apply_tuning(adapted, {part: "lora"}, r=2)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" in name]
    assert trained
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(predict(AutoPolicy.from_pretrained(tmp_path / "adapter")), predict(adapted.eval()))


@pytest.mark.parametrize("backbone, head", [pair for pair in PAIRS if pair != ("diffusion", "diffusion")])
def test_history_is_refused_where_only_one_observation_is_read(backbone, head):
    with pytest.raises(InvalidConfigError, match="n_obs_steps=2") as caught:
        tiny_composed(backbone, head, n_obs_steps=2)
    assert str(caught.value).startswith(f"The backbone {backbone!r} does not go with the action head {head!r}: ")


def test_history_where_both_read_it():
    """The chunk begins at the oldest observation; what is executed begins at the current one."""
    policy = ComposedPolicy(tiny_composed("diffusion", "diffusion", n_obs_steps=2)).eval()
    assert predict(policy).shape == (2, 7, 2)
    assert policy(**observation_of(policy.config)).actions.shape == (2, 8, 2)


# --- refusals ---------------------------------------------------------------------------------------------

REFUSED = {
    "a VAE": (("act", "act"), {"head_fields": {"use_vae": True}}, r"use_vae=True: .* Use ACTPolicy"),
    "a VAE in the backbone": (("act", "diffusion"), {"backbone_fields": {"use_vae": True}}, "use_vae=True"),
    "a width": (("act", "act"), {"head_fields": {"dim_model": 8}}, "dim_model is 8, but .* features have width 16"),
    "a width of attention": (
        ("diffusion", "flow_matching"),
        {"head_fields": {"diffusion_model_cfg": POLICY_CASES["DIT"] | {"cross_attention_dim": 5}}},
        "features that it reads is 5, but",
    ),
    "no state": (
        ("act", "flow_matching"),
        {"state": None},
        "reads the robot's state; .* holds no 'observation.state'",
    ),
    "no state, Eagle": (("eagle", "diffusion"), {"state": None}, "holds no 'observation.state'"),
    "an environment": (("eagle", "act"), {"environment": 4}, "does not read 'observation.environment_state'"),
    "heads that do not divide": (
        ("diffusion", "act"),
        {"head_fields": {"n_heads": 2}},
        "dim_model=19 must be a multiple",
    ),
    "no camera": (("eagle_1_5", "act"), {"cameras": {}}, "needs a camera"),
    "a field": (("act", "diffusion"), {"head_fields": {"down_dim": (8,)}}, "down_dim.*down_dims"),
    "a backbone's field": (("eagle", "act"), {"backbone_fields": {"select_layers": 1}}, "select_layers.*select_layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(case):
    (backbone, head), fields, message = REFUSED[case]
    with pytest.raises(InvalidConfigError, match=message):
        tiny_composed(backbone, head, **fields)


@pytest.mark.parametrize(
    "kind, given, message",
    [
        ("backbone", {"type": "pi0"}, r"'pi0', which does not compose: .* Use PI0Policy\."),
        ("action_head", {"type": "pi0"}, r"'pi0', which does not compose"),
        ("backbone", {"type": "eagl"}, "no registered type.*eagle"),
        ("action_head", {"type": "flow_maching"}, "no registered type.*flow_matching"),
        ("action_head", {}, "no registered type"),
        ("action_head", None, "no registered type"),
    ],
)
def test_a_type_that_does_not_exist_is_refused(kind, given, message):
    parts = {"backbone": {"type": "act"}, "action_head": {"type": "act"}} | {kind: given}
    with pytest.raises(InvalidConfigError, match=message):
        ComposedConfig(**parts)


def test_a_camera_alone_is_enough_where_nothing_reads_a_state():
    policy = ComposedPolicy(tiny_composed("act", "diffusion", state=None)).eval()
    assert predict(policy).shape == (2, 8, 2)


# --- the config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone, head", [("act", "flow_matching_1_5"), ("eagle", "diffusion")])
def test_the_config_survives(backbone, head, tmp_path):
    config = tiny_composed(backbone, head)
    policy = ComposedPolicy(config)
    policy.save_pretrained(tmp_path / "one")
    AutoPolicy.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    saved = [(tmp_path / folder / "config.json").read_text() for folder in ("one", "two")]
    assert saved[0] == saved[1]
    assert ComposedConfig.from_dict(json.loads(saved[0])).to_json_string() == policy.config.to_json_string()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert type(AutoModel.from_pretrained(tmp_path / "one")) is ComposedPolicy


def test_overrides_complete_what_is_saved(tmp_path):
    ComposedPolicy(tiny_composed("act", "flow_matching")).save_pretrained(tmp_path)
    policy = AutoPolicy.from_pretrained(tmp_path, chunk_size=4, action_head={"num_inference_timesteps": 3})
    assert (policy.config.chunk_size, policy.config.n_action_steps) == (4, 4)
    assert policy.config.action_head == policy.config.action_head | {"type": "flow_matching", "hidden_size": 16}
    assert policy.action_head.config.num_inference_timesteps == 3
    with pytest.raises(InvalidConfigError, match=r"num_inference_timestep.*num_inference_timesteps"):
        AutoPolicy.from_pretrained(tmp_path, action_head={"num_inference_timestep": 3})
    with pytest.raises(UnknownConfigFieldError, match="chunk_sizes"):
        AutoPolicy.from_pretrained(tmp_path, chunk_sizes=3)


def test_assignment_reaches_the_components():
    config = tiny_composed("act", "flow_matching")
    config.action_head = config.action_head | {"num_inference_timesteps": 5}
    config.chunk_size = 6
    policy = ComposedPolicy(config).eval()
    assert (policy.action_head.config.num_inference_timesteps, config.n_action_steps) == (5, 6)
    assert predict(policy).shape == (2, 6, 2)


def test_normalization_is_the_backbones_and_the_heads():
    assert tiny_composed("eagle", "act").normalization_mapping["STATE"] == "MIN_MAX"
    assert tiny_composed("eagle", "act").normalization_mapping["ACTION"] == "MEAN_STD"
    assert tiny_composed("act", "flow_matching").normalization_mapping["ACTION"] == "MIN_MAX"
    given = tiny_composed("act", "act", normalization_mapping={"STATE": "QUANTILES"}).normalization_mapping
    assert (given["STATE"], given["ACTION"]) == ("QUANTILES", "MEAN_STD")


# --- what a policy is used with ---------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient():
    config = tiny_composed("eagle_1_5", "flow_matching")
    torch.manual_seed(0)
    policy = ComposedPolicy(config).train()
    given = config.example_inputs(2) | config.example_draws(2, training=True)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            policy.gradient_checkpointing_enable()
        policy.zero_grad()
        torch.manual_seed(0)
        policy(**given).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_parts_are_those_of_both_components():
    policy = ComposedPolicy(tiny_composed("eagle", "flow_matching"))
    apply_tuning(
        policy, {"tune_llm": False, "tune_visual": False, "tune_projector": True, "tune_diffusion_model": False}
    )
    trained = {name.split(".")[0] for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {"backbone", "action_head"}
    assert not any(p.requires_grad for p in policy.backbone.model.language_model.parameters())
    assert not any(p.requires_grad for p in policy.action_head.model.parameters())


def test_the_card_names_both_parts(processor_of, tmp_path):
    config = tiny_composed("act", "diffusion")
    ComposedPolicy(config).save_pretrained(tmp_path)
    processor_of(config).save_pretrained(tmp_path)
    card = write_checkpoint_card(tmp_path, "your-lab/composed").read_text(encoding="utf-8")
    assert "Its backbone, `act` (ACT's transformer encoder" in card
    assert "Its action head, `diffusion` (Diffusion Policy's U-Net" in card
    assert lint_card(card) == []


def test_auto_processor_finds_the_backbones_processor(processor_of, tmp_path):
    config = tiny_composed("eagle", "act")
    ComposedPolicy(config).save_pretrained(tmp_path)
    processor_of(config).save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is processor_class(config)


# --- components of one's own ------------------------------------------------------------------------------


class MeanBackbone(nn.Module):
    """Encode the state as three tokens."""

    def __init__(self, config, width=12):
        super().__init__()
        self.width = width
        self.encoder = nn.Linear(config.state_dim, 3 * width)

    def encode(self, inputs):
        return Features(self.encoder(inputs.state).unflatten(-1, (3, self.width)))


class LinearHead(nn.Module):
    """Predict a chunk by one layer."""

    def __init__(self, config, width, bias=True):
        super().__init__()
        self.shape = (config.chunk_size, config.robot_action_dim)
        self.decoder = nn.Linear(width, self.shape[0] * self.shape[1], bias=bias)

    def errors(self, features, inputs, actions, draws):
        return {"mse": (self.sample(features, inputs, draws) - actions) ** 2}

    def sample(self, features, inputs, draws):
        return self.decoder(features.tokens.mean(dim=1)).unflatten(-1, self.shape)


@pytest.fixture
def own_components(monkeypatch):
    for module, name in (
        (components, "_BACKBONES"),
        (components, "_ACTION_HEADS"),
        (composed, "BACKBONES"),
        (composed, "ACTION_HEADS"),
    ):
        copied = dict(getattr(module, name))
        monkeypatch.setattr(module, name, copied)
        if hasattr(components, name):
            monkeypatch.setattr(components, name, copied)
    register_backbone("mean")(MeanBackbone)
    register_action_head("linear")(LinearHead)


@pytest.mark.parametrize(
    "backbone, head, cameras",
    [
        *(("mean", head, {}) for head in (*HEADS, "linear")),
        *((backbone, "linear", None) for backbone in BACKBONES),
    ],
)
def test_ones_own_component_goes_with_ours(own_components, processor_of, tmp_path, backbone, head, cameras):
    parts = {
        "backbone": {"type": backbone, **BACKBONES.get(backbone, {"width": 16})},
        "action_head": {"type": head, **HEADS.get(head, {"bias": False})},
    }
    features = POLICY_CASES["features_of"](POLICY_CASES["TWO_CAMERAS"] if cameras is None else cameras, 3, None)
    torch.manual_seed(0)
    policy = ComposedPolicy(ComposedConfig(**parts, **features, chunk_size=8))
    config = policy.config
    loss = policy.train()(**config.example_inputs(2), **config.example_draws(2, training=True)).loss
    loss.backward()
    assert torch.isfinite(loss)
    chunk = predict(policy.eval())
    assert chunk.shape == (2, 8, 2)
    policy.save_pretrained(tmp_path)
    processor_of(config).save_pretrained(tmp_path)
    pipeline = PolicyPipeline.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(predict(pipeline.policy), chunk)
    assert pipeline(raw_observation(config), task="push the red button").shape == (2,)


def test_a_taken_type_is_refused(own_components):
    with pytest.raises(InvalidConfigError, match="'act' is taken"):
        register_backbone("act")(MeanBackbone)
    register_backbone("mean")(MeanBackbone)  # a notebook cell that is run twice


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("backbone", {"n_decoder_layers": 2}),
        ("backbone", {"chunk_size": 4}),
        ("backbone", {"normalization_mapping": {"STATE": "MIN_MAX"}}),
        ("action_head", {"crop_shape": (8, 8)}),
        ("action_head", {"n_action_steps": 3}),
    ],
)
def test_a_field_of_no_use_is_refused_and_left_out_of_what_was_saved(kind, field, caplog):
    """Earlier versions took it, and ignored it: what they saved loads as it did, with a word."""
    (name,) = field
    with pytest.raises(InvalidConfigError, match=f"has {name}, of which a .* makes no use"):
        tiny_composed("act", "diffusion", **{f"{'head' if kind == 'action_head' else kind}_fields": field})
    plain = tiny_composed("act", "diffusion")
    saved = plain.to_dict()
    saved[kind] |= field
    with caplog.at_level(logging.WARNING):
        assert ComposedConfig.from_dict(saved).to_dict() == plain.to_dict()
    assert f"{kind} has {name}, of which its type makes no use" in caplog.text
