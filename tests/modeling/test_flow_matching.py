"""The flow-matching heads of GR00T: training, sampling, padding, what is frozen, what is refused."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from manipulators import (
    FlowmatchingActionHead,
    FlowmatchingActionHead_1_5,
    FlowmatchingActionHeadConfig,
    FlowmatchingActionHeadConfig_1_5,
)
from manipulators.errors import FeatureShapeError, FeatureValueError, InvalidConfigError, MissingFeatureError
from manipulators.modeling.seam import Draws, Features, PolicyInputs

SIZES = {
    "input_embedding_dim": 8,
    "hidden_size": 6,
    "max_seq_len": 8,
    "action_dim": 3,
    "action_horizon": 4,
    "max_state_dim": 5,
    "max_num_embodiments": 4,
    "num_inference_timesteps": 3,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 2,
    "interleave_self_attention": True,
    "positional_embeddings": None,
}
VL = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "positional_embeddings": None}


def build(version="n1_5", **fields):
    torch.manual_seed(0)
    fields = SIZES | {"diffusion_model_cfg": DIT} | fields
    if version == "n1":
        head = FlowmatchingActionHead(FlowmatchingActionHeadConfig(**fields))
    else:
        special = {"backbone_embedding_dim": 8, "vl_self_attention_cfg": VL, "num_target_vision_tokens": 2}
        head = FlowmatchingActionHead_1_5(FlowmatchingActionHeadConfig_1_5(**(special | fields)))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def batch(b=2, n=6):
    torch.manual_seed(1)
    return {
        "features": torch.randn(b, n, 8),
        "mask": torch.ones(b, n, dtype=torch.long),
        "state": torch.randn(b, 5),
        "actions": torch.randn(b, 4, 3),
        "action_mask": torch.ones(b, 4, 3, dtype=torch.bool),
        "embodiment_id": torch.arange(b) % 4,
    }


def parts(inputs):
    """Return what the seam hands to a head: features and inputs."""
    features = Features(inputs["features"], inputs["mask"])
    return features, PolicyInputs(state=inputs["state"], embodiment_id=inputs["embodiment_id"])


def flow(head, inputs, **draws):
    """Return the predicted velocity of a training pass, and its squared error."""
    velocity, wanted = head.velocity(*parts(inputs), inputs["actions"], Draws(**draws))
    return SimpleNamespace(velocity=velocity, error=(velocity - wanted).square())


def sample(head, inputs, **draws):
    return head.sample(*parts(inputs), Draws(**draws))


def draws(b=2):
    generator = torch.Generator().manual_seed(2)
    return {"noise": torch.randn(b, 4, 3, generator=generator), "time": torch.rand(b, generator=generator)}


def door(inputs):
    names = {"actions": "action"}
    features = {"backbone_features": inputs["features"], "backbone_attention_mask": inputs["mask"]}
    return features, {names.get(n, n): v for n, v in inputs.items() if n not in ("features", "mask")}


versions = pytest.mark.parametrize("version", ["n1", "n1_5"])


# --- training ---------------------------------------------------------------------------------------------


@versions
def test_loss_and_gradients(version):
    head, inputs = build(version), batch()
    found = flow(head, inputs, **draws())
    assert found.error.shape == found.velocity.shape == (2, 4, 3)
    found.error.mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_error_is_that_of_the_velocity():
    head, inputs, given = build().eval(), batch(), draws()
    found = flow(head, inputs, **given)
    torch.testing.assert_close(found.error, (found.velocity - (inputs["actions"] - given["noise"])) ** 2)
    # At time 0 there is only noise, so the labels do not matter.
    given["time"] = torch.zeros(2)
    other = inputs | {"actions": torch.randn(2, 4, 3)}
    assert torch.equal(flow(head, inputs, **given).velocity, flow(head, other, **given).velocity)
    # Times of one bucket are not told apart by the network.
    seen = []
    head.model.register_forward_hook(lambda _, arguments, __: seen.append(arguments[2].tolist()))
    flow(head, inputs, noise=given["noise"], time=torch.tensor([0.0019, 0.9999]))
    flow(head, inputs, noise=given["noise"], time=torch.tensor([-0.0009, 1.0]))
    assert seen == [[1, 999], [0, 1000]]


def test_times_are_more_often_close_to_noise():
    torch.manual_seed(0)
    time = build().sampler.draw_time(20000, "cpu")
    assert time.min() > -0.002 and time.max() <= 1
    assert time.mean().item() == pytest.approx(1 - 0.6 / 0.999, abs=0.01)  # Beta(1.5, 1) has mean 0.6


def test_randomness_can_be_seeded():
    head, inputs = build().eval(), batch()
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(flow(head, inputs).error)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_action_mask():
    head, inputs, given = build().eval(), batch(), draws()
    inputs["action_mask"][:, :, 2] = False
    error = flow(head, inputs, **given).error
    torch.testing.assert_close(head(*door(inputs), **given).loss, error[..., :2].mean())
    inputs["action_mask"] = inputs["action_mask"].float()
    torch.testing.assert_close(head(*door(inputs), **given).loss, error[..., :2].mean())
    without = {name: value for name, value in inputs.items() if name != "action_mask"}
    torch.testing.assert_close(head(*door(without), **given).loss, error.mean())


def test_nothing_that_counts():
    head, inputs = build(), batch()
    inputs["action_mask"][:] = False
    loss = head(*door(inputs)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in head.parameters())


def test_expanded_batch():
    """Each sample is trained on at several flow times, in the order 0, 1, 0, 1, …; sampling is as before."""
    head, inputs, given = build(expand_batch=3).eval(), batch(), draws(6)
    inputs["action_mask"][1, 2:] = False
    found = flow(head, inputs, **given)
    assert found.error.shape == (6, 4, 3)
    once = build().eval()
    for i in range(3):
        part = slice(2 * i, 2 * i + 2)
        expected = flow(once, inputs, noise=given["noise"][part], time=given["time"][part])
        torch.testing.assert_close(found.velocity[part], expected.velocity)
    counted = found.error[inputs["action_mask"].repeat(3, 1, 1)]
    torch.testing.assert_close(head(*door(inputs), **given).loss, counted.mean())
    assert flow(head, inputs).error.shape == (6, 4, 3)
    noise = given["noise"][:2]
    assert torch.equal(sample(head, inputs, noise=noise), sample(once, inputs, noise=noise))
    with pytest.raises(FeatureShapeError, match=r"noise has shape \(2, 4, 3\); expected \(6, 4, 3\)"):
        flow(head, inputs, noise=noise)
    with pytest.raises(FeatureShapeError, match=r"time has shape \(2,\); expected \(6,\)"):
        flow(head, inputs, time=torch.rand(2))


def test_gradient_checkpointing():
    gradients = []
    for recompute in (False, True):
        head = build().train()
        for module in head.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = recompute
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        torch.manual_seed(5)  # of the dropout
        calls = []
        head.model.transformer_blocks[0].norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        flow(head, batch(), **draws()).error.mean().backward()
        assert len(calls) == 1 + recompute
        gradients.append([parameter.grad for parameter in head.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


# --- what is trained --------------------------------------------------------------------------------------

PROJECTOR = {"state_encoder", "action_encoder", "action_decoder", "position_embedding"}
ALWAYS = {"future_tokens", "vlln", "vl_self_attention"}


@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("transformer", [True, False])
def test_trainable_parts(projector, transformer):
    head = build(tune_projector=projector, tune_diffusion_model=transformer)
    expected = ALWAYS | (PROJECTOR if projector else set()) | ({"model"} if transformer else set())
    assert {name.split(".")[0] for name, p in head.named_parameters() if p.requires_grad} == expected
    head.eval().train()
    assert {name for name, module in head.named_children() if module.training} == expected
    if not transformer:
        assert not head.model.transformer_blocks[0].final_dropout.training
        head.model.transformer_blocks[0].attn1.requires_grad_(True)  # somebody has unfrozen it
        assert head.train().model.training


def test_dropout_only_in_training():
    head, inputs, given = build(), batch(), draws()
    assert not torch.equal(flow(head, inputs, **given).error, flow(head, inputs, **given).error)
    head.eval()
    assert torch.equal(flow(head, inputs, **given).error, flow(head, inputs, **given).error)


# --- sampling ---------------------------------------------------------------------------------------------


@versions
def test_sampling(version):
    head, inputs = build(version).eval(), batch()
    noise = draws()["noise"]
    chunks = {n: sample(head, inputs, noise=noise, num_steps=n) for n in (1, 3, None)}
    assert chunks[1].shape == (2, 4, 3) and not chunks[1].requires_grad
    assert torch.equal(chunks[3], chunks[None]) and not torch.equal(chunks[1], chunks[3])
    seeded = [sample(head, inputs, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    start = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(head, inputs, noise=start), seeded[0])


def test_one_step_follows_the_velocity_of_the_noise():
    head, inputs = build().eval(), batch()
    noise = draws()["noise"]
    velocity = flow(head, inputs, noise=noise, time=torch.zeros(2)).velocity
    torch.testing.assert_close(sample(head, inputs, noise=noise, num_steps=1), noise + velocity)


def test_timesteps_are_cut_to_buckets():
    head, seen = build().eval(), []
    head.model.timestep_encoder.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].tolist()))
    sample(head, batch(), num_steps=16)
    assert seen == [[0, 62, 125, 187, 250, 312, 375, 437, 500, 562, 625, 687, 750, 812, 875, 937]]


def test_features_are_read_once():
    head, calls = build().eval(), []
    head.vl_self_attention.register_forward_hook(lambda *_: calls.append("features"))
    head.state_encoder.register_forward_hook(lambda *_: calls.append("state"))
    head.model.transformer_blocks[0].attn1.to_k.register_forward_hook(lambda *_: calls.append("keys"))
    head.action_decoder.register_forward_hook(lambda *_: calls.append("step"))
    sample(head, batch(), num_steps=4)
    assert calls == ["state", "features", "keys", *["step"] * 4]


@versions
def test_half_precision(version):
    head, inputs, given = build(version).eval(), batch(), draws()
    expected = sample(head, inputs, noise=given["noise"])
    error = flow(head, inputs, **given).error
    head.to(torch.bfloat16)
    found = sample(head, inputs, noise=given["noise"])
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.05
    half = flow(head, inputs, **given).error
    assert half.dtype == torch.float32 and 0 < (half - error).abs().max() < 0.3


@versions
def test_compiles_whole(version):
    head, inputs = build(version).eval(), batch()
    noise = draws()["noise"]
    compiled = torch.compile(head.sample, backend="eager", fullgraph=True)
    found = compiled(*parts(inputs), Draws(noise))
    torch.testing.assert_close(found, sample(head, inputs, noise=noise))


# --- padding and embodiments ------------------------------------------------------------------------------


def padded():
    """One batch, in which the second sample's first three tokens are padding, and that sample alone."""
    inputs = batch()
    inputs["mask"][1, :3] = 0
    alone = {name: value[1:] for name, value in inputs.items()}
    alone |= {"features": inputs["features"][1:, 3:], "mask": inputs["mask"][1:, 3:]}
    return inputs, alone


@versions
def test_padding_counts_as_published(version):
    head, given = build(version).eval(), draws()
    inputs, alone = padded()
    ones = inputs | {"mask": torch.ones_like(inputs["mask"])}
    error = flow(head, inputs, **given).error
    assert torch.equal(error, flow(head, ones, **given).error)
    of_one = {name: value[1:] for name, value in given.items()}
    assert not torch.allclose(error[1:], flow(head, alone, **of_one).error, atol=1e-4)


@versions
def test_masked_padding_makes_samples_independent(version):
    head, given = build(version, mask_padding=True).eval(), draws()
    inputs, alone = padded()
    of_one = {name: value[1:] for name, value in given.items()}
    torch.testing.assert_close(flow(head, inputs, **given).error[1:], flow(head, alone, **of_one).error)
    chunk = sample(head, inputs, noise=given["noise"])
    torch.testing.assert_close(chunk[1:], sample(head, alone, noise=of_one["noise"]))
    # Nothing is masked where nothing is padded, or where nobody says what is.
    plain = build(version).eval()
    for mask in (torch.ones(2, 6), None):
        whole = inputs | {"mask": mask}
        torch.testing.assert_close(flow(head, whole, **given).error, flow(plain, whole, **given).error)
    with pytest.raises(FeatureShapeError, match=r"mask has shape \(2, 5\); expected \(2, 6\)"):
        flow(head, inputs | {"mask": torch.ones(2, 5)})


def test_masked_padding_in_an_expanded_batch():
    head, given = build(mask_padding=True, expand_batch=2).eval(), draws(4)
    inputs, alone = padded()
    of_one = {name: value[1::2] for name, value in given.items()}
    torch.testing.assert_close(flow(head, inputs, **given).error[1::2], flow(head, alone, **of_one).error)


def test_embodiments_have_weights_of_their_own():
    head, inputs = build().eval(), batch()
    noise = draws()["noise"]
    mixed = sample(head, inputs, noise=noise)
    for i in range(2):
        same = inputs | {"embodiment_id": torch.tensor([i, i])}
        assert torch.allclose(sample(head, same, noise=noise)[i], mixed[i], atol=1e-6)
        assert not torch.allclose(sample(head, same, noise=noise)[1 - i], mixed[1 - i], atol=1e-4)


@pytest.mark.parametrize(("ids", "given"), [([0, 4], "4"), ([-1, 0], "-1")])
def test_embodiment_without_a_slot(ids, given):
    head, inputs = build(), batch() | {"embodiment_id": torch.tensor(ids)}
    with pytest.raises(FeatureValueError, match=f"embodiment_id holds {given}; .*max_num_embodiments=4 slots, 0 to 3"):
        flow(head, inputs)
    with pytest.raises(FeatureValueError, match="embodiment_id"):
        sample(head, inputs)


def test_future_tokens_are_optional():
    head = build(num_target_vision_tokens=0).eval()
    assert not any("future_tokens" in name for name in head.state_dict())
    assert head.prefix(torch.randn(2, 1, 5), 0).shape == (2, 1, 8)
    assert build().prefix(torch.randn(2, 1, 5), 0).shape == (2, 3, 8)


def test_parts_left_out():
    head = build(use_vlln=False, vl_self_attention_cfg=None, add_pos_embed=False)
    assert {name.split(".")[0] for name in head.state_dict()} == PROJECTOR - {"position_embedding"} | {
        "model",
        "future_tokens",
    }
    features = torch.randn(2, 6, 8)
    assert head.refine(features, None) is features
    assert sample(build(add_pos_embed=False, tune_projector=False), batch()).shape == (2, 4, 3)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": torch.zeros(2, 6, 9)}, r"features has shape \(2, 6, 9\); expected \(batch, tokens, 8\)"),
        ({"state": torch.zeros(2, 4)}, r"state has shape \(2, 1, 4\); expected \(2, 1, 5\)"),
        ({"actions": torch.zeros(2, 5, 3)}, r"actions has shape \(2, 5, 3\); expected \(2, 4, 3\)"),
        ({"embodiment_id": torch.tensor([1])}, r"embodiment_id has shape \(1,\); expected \(2,\)"),
    ],
)
def test_shapes(changed, message):
    with pytest.raises(FeatureShapeError, match=message):
        flow(build(), batch() | changed)


def test_a_mask_of_another_shape():
    with pytest.raises(FeatureShapeError, match=r"action_mask has shape \(2, 4\); expected \(2, 4, 3\)"):
        build()(*door(batch() | {"action_mask": torch.ones(2, 4)}))


def test_errors_average_the_times_of_a_sample():
    head, inputs, given = build(expand_batch=3).eval(), batch(), draws(6)
    error = head.errors(*parts(inputs), inputs["actions"], Draws(**given))
    expected = flow(head, inputs, **given).error
    assert error.keys() == {"flow"} and error["flow"].shape == (2, 4, 3)
    torch.testing.assert_close(error["flow"], (expected[:2] + expected[2:4] + expected[4:]) / 3)


def test_sampling_is_checked():
    head, inputs = build(), batch()
    with pytest.raises(InvalidConfigError, match="num_steps=0 must be at least 1"):
        sample(head, inputs, num_steps=0)
    with pytest.raises(FeatureShapeError, match=r"noise has shape \(2, 4, 2\); expected \(2, 4, 3\)"):
        sample(head, inputs, noise=torch.zeros(2, 4, 2))


def test_missing_entries():
    features, given = door(batch())
    with pytest.raises(MissingFeatureError, match="lacks action"):
        build()(features, {name: value for name, value in given.items() if name != "action"})
    with pytest.raises(MissingFeatureError, match="lacks embodiment_id, state"):
        build().get_action(features, {"action": given["action"]})


def test_another_heads_config():
    with pytest.raises(InvalidConfigError, match="is built from FlowmatchingActionHeadConfig_1_5, not Flow"):
        FlowmatchingActionHead_1_5(FlowmatchingActionHeadConfig())
    with pytest.raises(InvalidConfigError, match="not FlowmatchingActionHeadConfig_1_5"):
        FlowmatchingActionHead(FlowmatchingActionHeadConfig_1_5())


@versions
def test_the_documents_names(version):
    head, inputs, given = build(version).eval(), batch(), draws()
    features, rest = door(inputs)
    output = head(head.prepare_input(features), head.prepare_input(rest), **given)
    assert output.loss.shape == () and output["predictions"].shape == (2, 4, 3)
    noise = given["noise"]
    expected = sample(head, inputs, noise=noise)
    assert torch.equal(head.get_action(features, rest, noise=noise).action_pred, expected)
    assert torch.equal(head.inference(features, rest, noise=noise)["action_pred"], expected)
    ours = {("actions" if name == "action" else name): value for name, value in rest.items()}
    assert torch.equal(head(features, ours, **given).loss, output.loss)
    with_time = rest | {"state": rest["state"][:, None]}  # (b, 1, s), as published
    assert torch.equal(head(features, with_time, **given).loss, output.loss)
