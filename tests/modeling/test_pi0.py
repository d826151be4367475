"""π0's components by themselves, and what is special about π0."""

import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from manipulators import PaliGemmaWithExpertModel, PI0FlowMatching, PI0Policy
from manipulators.errors import FeatureShapeError, FusedPolicyError, InvalidConfigError
from manipulators.modeling.action_heads.pi0 import block_mask, encode_time
from manipulators.training.tuning import lora_modules

BACKBONE = "model.paligemma_with_expert."
TAIL = {  # of the second and last layer: nothing that is computed from it is used
    f"{BACKBONE}layers.1.language_model.self_attn.q_proj.weight",
    f"{BACKBONE}layers.1.language_model.self_attn.o_proj.weight",
    f"{BACKBONE}layers.1.language_model.mlp.gate_proj.weight",
    f"{BACKBONE}layers.1.language_model.mlp.up_proj.weight",
    f"{BACKBONE}layers.1.language_model.mlp.down_proj.weight",
    f"{BACKBONE}layers.1.language_model.post_attention_layernorm.weight",
    f"{BACKBONE}language_norm.weight",
}


@pytest.fixture
def policy(tiny_pi0):
    torch.manual_seed(0)
    return PI0Policy(tiny_pi0()).eval()


@pytest.fixture
def inputs(policy):
    return policy.config.example_inputs(2)


def draws(policy, training=False):
    return policy.config.example_draws(2, training)


# --- attention and time -----------------------------------------------------------------------------------


def test_block_mask():
    """Two real tokens and one padded, the state, two actions."""
    expected = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 1],
        [1, 1, 0, 1, 1, 1],
    ]
    mask = block_mask(torch.tensor([[True, True, False], [True, True, True]]), horizon=2)
    assert mask.dtype == torch.bool
    assert mask[0].int().tolist() == expected
    assert mask[1].int()[:, 2].tolist() == [1] * 6


def test_encode_time():
    """Three periods, 0.004 · √1000ⁱ: sines first, then cosines, exact to float32's last digit."""
    encoded = encode_time(torch.tensor([0.0, 0.7]), 6, 4e-3, 4.0)
    time = torch.tensor(0.7).item()  # as float32 has it
    angles = [2 * math.pi * time / period for period in (0.004, 0.004 * math.sqrt(1000), 4.0)]
    assert encoded.dtype == torch.float32
    assert encoded[0].tolist() == [0, 0, 0, 1, 1, 1]
    expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    assert encoded[1].tolist() == pytest.approx(expected, abs=1e-7)


def test_sampled_times(policy):
    torch.manual_seed(0)
    times = policy.model.sampler.draw_time(20000, "cpu")
    assert times.shape == (20000,)
    assert times.min() > 0.001 and times.max() <= 1.0
    assert times.mean().item() == pytest.approx(0.999 * 0.6 + 0.001, abs=0.01)
    assert times.std().item() == pytest.approx(0.999 * math.sqrt(1.5 / (2.5**2 * 3.5)), abs=0.01)


def test_padded_words_do_not_matter(policy, inputs):
    inputs["attention_mask"][:, 4:] = False
    before = policy.predict_action_chunk(**inputs, **draws(policy))
    other = inputs["input_ids"].clone()
    other[:, 4:] = 0
    torch.testing.assert_close(policy.predict_action_chunk(**inputs | {"input_ids": other}, **draws(policy)), before)
    # Nor how many there are: positions count real tokens only.
    shorter = inputs | {"input_ids": other[:, :4], "attention_mask": inputs["attention_mask"][:, :4]}
    torch.testing.assert_close(policy.predict_action_chunk(**shorter, **draws(policy)), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_kernels_agree(policy, inputs, implementation):
    expected = policy.predict_action_chunk(**inputs, **draws(policy))
    policy.set_attn_implementation(implementation)
    backbone = policy.model.paligemma_with_expert
    assert backbone.config.attention_implementation == implementation
    assert backbone.vision_tower.config._attn_implementation == implementation
    torch.testing.assert_close(policy.predict_action_chunk(**inputs, **draws(policy)), expected, atol=1e-5, rtol=1e-5)


def test_attention_kernel_of_loading(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    for kernel in ("eager", "sdpa"):
        loaded = PI0Policy.from_pretrained(tmp_path, attn_implementation=kernel)
        assert loaded.model.paligemma_with_expert.config.attention_implementation == kernel
    loaded = PI0Policy.from_pretrained(tmp_path, attention_implementation="eager")
    assert loaded.model.paligemma_with_expert.config.attention_implementation == "eager"


def test_mask_that_does_not_span_the_tokens(policy):
    backbone = policy.model.paligemma_with_expert
    with pytest.raises(FeatureShapeError, match=r"attention_mask has shape \(2, 3, 4\); expected \(2, 3, 3\)"):
        backbone(
            torch.ones(2, 3, 4, dtype=torch.bool),
            torch.arange(3).expand(2, -1),
            inputs_embeds=[torch.randn(2, 3, 32), None],
        )


def test_config_or_fields(tiny_pi0):
    config = tiny_pi0().backbone_config()
    sizes = {"paligemma_config": config.paligemma_config, "gemma_expert_config": config.gemma_expert_config}
    model = PaliGemmaWithExpertModel(**sizes, train_expert_only=True)
    assert len(model.layers) == 2 and model.config.train_expert_only
    with pytest.raises(InvalidConfigError, match="a config and train_expert_only"):
        PaliGemmaWithExpertModel(config, train_expert_only=True)


# --- training ---------------------------------------------------------------------------------------------


def test_what_no_loss_depends_on_is_not_trained(policy):
    assert {name for name, p in policy.named_parameters() if not p.requires_grad} == TAIL


def test_parts_hold_every_trained_parameter_once(policy):
    owners = {
        name: [part for part, prefixes in policy.parameter_parts.items() if name.startswith(prefixes)]
        for name, _ in policy.named_parameters()
    }
    assert {name for name, parts in owners.items() if not parts} == TAIL
    assert all(len(parts) == 1 for name, parts in owners.items() if name not in TAIL)
    assert owners[f"{BACKBONE}layers.0.language_model.mlp.up_proj.weight"] == ["tune_llm"]
    assert owners[f"{BACKBONE}embed_tokens.weight"] == ["tune_llm"]
    assert owners[f"{BACKBONE}multi_modal_projector.linear.bias"] == ["tune_projector"]
    assert owners[f"{BACKBONE}vision_tower.post_layernorm.weight"] == ["tune_visual"]
    for name in (f"{BACKBONE}layers.1.gemma_expert.mlp.up_proj.weight", "model.state_proj.bias"):
        assert owners[name] == ["tune_diffusion_model"]


@pytest.mark.parametrize(
    ("fields", "frozen"),
    [
        ({}, ()),
        ({"freeze_vision_encoder": True}, ("tune_visual",)),
        ({"train_expert_only": True}, ("tune_visual", "tune_projector", "tune_llm")),
        ({"train_expert_only": True, "freeze_vision_encoder": True}, ("tune_visual", "tune_projector", "tune_llm")),
    ],
)
def test_frozen_parts_stay_as_they_are(tiny_pi0, fields, frozen, tmp_path):
    policy = PI0Policy(tiny_pi0(**fields))
    assert policy.train() is policy
    assert policy.model.paligemma_with_expert.train() is policy.model.paligemma_with_expert
    prefixes = tuple(prefix for part in frozen for prefix in policy.parameter_parts[part])
    for name, parameter in policy.named_parameters():
        if name not in TAIL:
            assert parameter.requires_grad != name.startswith(prefixes), name
    backbone = policy.model.paligemma_with_expert
    assert backbone.vision_tower.training == (not frozen)
    assert backbone.layers[0].language_model.training == (len(frozen) < 2)
    assert backbone.layers[0].gemma_expert.training and policy.model.state_proj.training
    assert not policy.eval().model.paligemma_with_expert.layers[0].gemma_expert.training
    policy.save_pretrained(tmp_path)
    loaded = PI0Policy.from_pretrained(tmp_path)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_trained(policy, inputs, checkpointing):
    """In every part; beside them only the projections of states and actions."""
    given = draws(policy, training=True)
    before = policy(**inputs, **given).loss
    targets = [name for part in policy.lora_targets for name in lora_modules(policy, part)]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=list(policy.modules_to_save))
    adapted = get_peft_model(policy, config)
    adapters = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" in name}
    # Per part: keys and values of two layers and the rest of one; vision; projector; two expert layers.
    assert len(adapters) == 2 * ((7 + 2) + 6 + 1 + 2 * 7)
    torch.testing.assert_close(adapted(**inputs, **given).loss, before)
    if checkpointing:
        policy.gradient_checkpointing_enable()
    with torch.no_grad():
        for name in adapters:
            adapted.get_parameter(name).add_(0.1)
    adapted.train()(**inputs, **given).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(adapted.get_parameter(name).grad.norm() > 0 for name in trained)
    assert {f"model.{name.split('.')[-4]}" for name in trained - adapters} == set(policy.modules_to_save)


def test_loss_over(tiny_pi0):
    """The mean of a squared error over what is real, over all steps, or over everything."""
    losses = {}
    for counted in ("real", "steps", "all"):
        torch.manual_seed(0)
        policy = PI0Policy(tiny_pi0(loss_over=counted)).eval()
        inputs = policy.config.example_inputs(2)
        inputs["actions"][1, 3:] = inputs["actions"][1, 2]  # as a dataset pads
        inputs["action_is_pad"][1, 3:] = True
        given = draws(policy, training=True)
        with torch.no_grad():
            losses[counted] = policy(**inputs, **given).loss
            names = ("pixel_values", "pixel_mask", "input_ids", "attention_mask", "state", "actions")
            error = policy.model(*[inputs.get(name) for name in names], **given)
    assert error.shape == (2, 5, 4)
    torch.testing.assert_close(losses["real"], torch.cat([error[0, :, :2], error[1, :3, :2]]).mean())
    torch.testing.assert_close(losses["steps"], error[..., :2].mean())
    torch.testing.assert_close(losses["all"], error.mean())


def test_action_mask_by_default(policy, inputs):
    given = draws(policy, training=True)
    mask = inputs.pop("action_mask")
    assert mask[0, 0].tolist() == [True, True, False, False]
    assert torch.equal(policy(**inputs, **given).loss, policy(**inputs, action_mask=mask, **given).loss)
    other = torch.tensor([True, False, False, False]).expand_as(mask)
    assert not torch.equal(policy(**inputs, action_mask=other, **given).loss, policy(**inputs, **given).loss)


def test_fresh_weights(policy):
    backbone = policy.model.paligemma_with_expert
    assert torch.equal(backbone.expert_norm.weight, torch.zeros(16))  # Gemma multiplies by 1 + weight
    assert torch.equal(backbone.layers[0].language_model.input_layernorm.weight, torch.zeros(32))
    assert backbone.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert backbone.layers[1].gemma_expert.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.15)


# --- inference --------------------------------------------------------------------------------------------


def test_number_of_steps(policy, inputs):
    given = draws(policy)
    chunks = [policy.predict_action_chunk(**inputs, **given, num_steps=n) for n in (1, 3, None)]
    assert not torch.equal(chunks[0], chunks[1])
    assert torch.equal(chunks[1], chunks[2])  # num_inference_steps=3
    with pytest.raises(InvalidConfigError, match="num_steps=0"):
        policy.predict_action_chunk(**inputs, **given, num_steps=0)


def test_what_is_observed_is_read_once(policy, inputs):
    """Pictures, words and the state at the first pass; then only actions."""
    calls = []
    backbone = policy.model.paligemma_with_expert
    backbone.vision_tower.register_forward_hook(lambda *_: calls.append("vision"))
    backbone.embed_tokens.register_forward_hook(lambda *_: calls.append("words"))
    policy.model.state_proj.register_forward_hook(lambda *_: calls.append("state"))
    backbone.layers[0].register_forward_hook(
        lambda layer, args, output: calls.append([None if x is None else x.shape[1] for x in args[:2]])
    )
    policy.predict_action_chunk(**inputs, num_steps=4)
    assert sorted(map(str, calls[:3])) == ["state", "vision", "words"]
    assert calls[3:] == [[2 * 4 + 6, 1], *[[None, 5]] * 4]


class CountedOperators(TorchDispatchMode):
    """Count what reaches a device: ATen operators that compute or copy.

    Views are not counted: operators whose schema says that their output shares memory with their input
    (`OpOverload.is_view`), and `_unsafe_view`, which differs from `view` for autograd only.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name != "_unsafe_view":
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def operators_per_step(policy):
    """Return what one denoising step more costs, by operator."""
    inputs, given, counts = policy.config.example_inputs(1), policy.config.example_draws(1), []
    for steps in (2, 3):
        with CountedOperators() as counted:
            policy.predict_action_chunk(**inputs, **given, num_steps=steps)
        counts.append(counted.counts)
    return counts[1] - counts[0]


# transformers' own π0 takes 795 on the same layout, LeRobot's (0.6.1) 936.
@pytest.mark.parametrize(("fused", "limit"), [(False, 625), (True, 450)])
def test_operators_per_denoising_step(tiny_pi0, fused, limit):
    """On the published layout, 18 layers and one head of keys and values: what one step more costs."""
    gemma = {
        "hidden_size": 32,
        "num_hidden_layers": 18,
        "intermediate_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 32,
    }
    paligemma = tiny_pi0().paligemma_config | {"text_config": gemma}
    policy = PI0Policy(tiny_pi0(paligemma_config=paligemma, gemma_expert_config=gemma | {"hidden_size": 16})).eval()
    if fused:
        policy.fuse()
    step = operators_per_step(policy)
    assert step["_scaled_dot_product_flash_attention_for_cpu"] == 18
    assert step["cat"] == (1 if fused else 19)  # actions with their time; unfused, also queries, keys and values
    assert step["clone"] == step["constant_pad_nd"] == step["embedding"] == step["cos"] == step["where"] == 0
    assert step.total() <= limit, step


def test_fused_weights(policy, inputs, tmp_path):
    """One matrix where there were three or two; on disk nothing changes."""
    policy.save_pretrained(tmp_path / "apart")
    stored = load_file(tmp_path / "apart" / "model.safetensors")
    expected = policy.predict_action_chunk(**inputs, **draws(policy))
    assert policy.fuse() is policy and policy.fuse().is_fused
    layer = policy.model.paligemma_with_expert.layers[0].gemma_expert
    assert layer.self_attn.qkv_proj.weight.shape == ((4 + 2 + 2) * 8, 16)
    assert layer.mlp.gate_up_proj.weight.shape == (2 * 24, 16)
    assert not hasattr(layer.self_attn, "q_proj") and not hasattr(layer.mlp, "up_proj")
    torch.testing.assert_close(policy.predict_action_chunk(**inputs, **draws(policy)), expected, atol=2e-6, rtol=1e-5)
    policy.save_pretrained(tmp_path / "fused")
    again = load_file(tmp_path / "fused" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], weight) for name, weight in stored.items())
    reloaded = PI0Policy.from_pretrained(tmp_path / "fused")
    assert not reloaded.is_fused
    assert torch.equal(reloaded.predict_action_chunk(**inputs, **draws(policy)), expected)


def test_fused_norms_survive_a_cast(policy):
    """1 + weight is computed anew, not rounded to bfloat16."""
    with torch.no_grad():
        policy.model.paligemma_with_expert.expert_norm.weight.fill_(0.001953125)  # 2⁻⁹; bfloat16 rounds 1 + 2⁻⁹ to 1
    norm = policy.fuse().to(torch.bfloat16).model.paligemma_with_expert.expert_norm
    assert norm.scale.dtype == torch.float32 and norm.scale[0].item() == 1.001953125


def test_fused_policies_are_for_inference(policy, tmp_path):
    policy.train()
    with pytest.raises(FusedPolicyError, match=r"training mode.*policy\.eval\(\)"):
        policy.fuse()
    weights = policy.state_dict()
    policy.eval().fuse()
    with pytest.raises(FusedPolicyError, match="to train it, load it again"):
        policy.train()
    with pytest.raises(FusedPolicyError, match="load them first, then call fuse"):
        policy.load_state_dict(weights)
    with pytest.raises(FusedPolicyError, match="takes no adapter"):
        policy.add_adapter(LoraConfig(r=2, target_modules=["o_proj"]))


def test_adapters_are_not_fused(policy, tmp_path):
    policy.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(FusedPolicyError, match="merge_and_save"):
        policy.eval().fuse()


def test_noise_of_another_shape(policy, inputs):
    with pytest.raises(FeatureShapeError, match=r"noise has shape \(2, 5, 2\); expected \(2, 5, 4\)"):
        policy.predict_action_chunk(**inputs, noise=torch.randn(2, 5, 2))


def test_widths_are_the_padded_ones(tiny_pi0):
    network = PI0FlowMatching(tiny_pi0())
    state, actions, time = torch.randn(2, 6), torch.randn(2, 5, 4), torch.rand(2)
    assert network.embed_suffix(state, actions, time).shape == (2, 6, 16)
    with pytest.raises(FeatureShapeError, match=r"state has shape \(2, 3\).*a last dimension of 6, padded"):
        network.embed_suffix(state[:, :3], actions, time)
    with pytest.raises(FeatureShapeError, match=r"actions has shape \(2, 5, 2\).*4, padded"):
        network.embed_suffix(state, actions[..., :2], time)


def test_bfloat16_keeps_what_must_be_exact(policy, inputs, tmp_path):
    """As LeRobot: pictures, norms and projections stay in float32; so do noise, time and integration."""
    policy.save_pretrained(tmp_path)
    loaded = PI0Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half = {name for name, p in loaded.named_parameters() if p.dtype == torch.bfloat16}
    assert half == {
        name
        for name, _ in policy.named_parameters()
        if "embed_tokens" in name or ("layers." in name and "proj" in name and "vision_tower" not in name)
    }
    assert loaded.dtype == torch.float32  # of what it takes and returns
    expected = policy.predict_action_chunk(**inputs, **draws(policy))
    found = loaded.predict_action_chunk(**inputs, **draws(policy))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05
    loaded.save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {name for name, weight in stored.items() if weight.dtype == torch.bfloat16} == half
