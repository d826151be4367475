"""What is special about the GR00T policies."""

import pytest
import torch

from manipulators import GR00TN1_5Policy, GR00TN1Policy
from manipulators.errors import FeatureShapeError, FeatureValueError, MissingFeatureError
from manipulators.modeling.inputs import LABELS
from manipulators.modeling.seam import Draws, PolicyInputs
from manipulators.training.tuning import apply_tuning


@pytest.fixture(params=["n1_5", "n1"])
def make(request, tiny_gr00t_n1_5, tiny_gr00t_n1):
    """Return a function: fields → a tiny policy, N1.5 and N1 in turn."""
    policy_class, config = {"n1_5": (GR00TN1_5Policy, tiny_gr00t_n1_5), "n1": (GR00TN1Policy, tiny_gr00t_n1)}[
        request.param
    ]

    def make_policy(cameras=None, **fields):
        torch.manual_seed(0)
        return policy_class(config(cameras, **fields)).eval()

    return make_policy


def given(policy, batch_size=2):
    return policy.config.example_inputs(batch_size) | policy.config.example_draws(batch_size, training=True)


def trained(module):
    return {parameter.requires_grad for parameter in module.parameters()}


# --- the loss ---------------------------------------------------------------------------------------------


def test_loss_over_steps_counts_what_lies_beyond_the_episode(make):
    """As NVIDIA trains; by default such steps do not count. Padded dimensions never do."""
    policy = make()
    inputs = given(policy)
    counted = policy(**inputs).loss
    inputs["action_is_pad"][0, 3:] = True
    real = policy(**inputs).loss
    policy.config.loss_over = "steps"
    assert torch.equal(policy(**inputs).loss, counted)
    assert not torch.allclose(real, counted, atol=1e-6)
    wide = inputs | {"action_mask": torch.ones_like(inputs["action_mask"])}
    assert not torch.allclose(policy(**wide).loss, counted, atol=1e-6)


def test_padded_dimensions_do_not_count_unless_a_mask_says_so(make):
    policy = make()
    inputs = given(policy)
    masked = policy(**inputs).loss
    del inputs["action_mask"]
    assert torch.equal(policy(**inputs).loss, masked)  # the features say that the action has two dimensions


def test_an_expanded_batch_is_trained_at_several_flow_times(tiny_gr00t_n1_5):
    torch.manual_seed(0)
    policy = GR00TN1_5Policy(tiny_gr00t_n1_5(expand_batch=2)).eval()
    inputs = given(policy)
    assert len(inputs["noise"]) == len(inputs["time"]) == 4
    inputs["action_is_pad"][1, 2:] = True
    together = policy(**inputs).loss
    policy.action_head.config.expand_batch = None
    apart = [
        policy(**inputs | {"noise": inputs["noise"][half], "time": inputs["time"][half]}).loss
        for half in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(together, sum(apart) / 2)


# --- what is trained --------------------------------------------------------------------------------------


def test_flags_of_the_config_say_what_is_trained(make):
    policy = make(tune_llm=False, tune_visual=False, tune_projector=False, tune_diffusion_model=False)
    assert trained(policy.backbone.vision_language_model) == {False}
    for name in ("state_encoder", "action_encoder", "action_decoder", "position_embedding", "model"):
        assert trained(getattr(policy.action_head, name)) == {False}, name
    for name in ("vlln", "vl_self_attention", "future_tokens"):  # as published
        if hasattr(policy.action_head, name):
            assert trained(getattr(policy.action_head, name)) == {True}, name
    policy = make(tune_llm=True, tune_visual=True)
    assert trained(policy) == {True}


def test_flags_survive_a_reload(make, tmp_path):
    policy = make(tune_visual=False)
    policy.save_pretrained(tmp_path)
    loaded = type(policy).from_pretrained(tmp_path, tune_llm=True, tune_projector=False)
    vision_language = loaded.backbone.vision_language_model
    assert trained(vision_language.vision_model) == {False}
    assert trained(vision_language.language_model) == {True}
    assert trained(loaded.action_head.state_encoder) == {False}
    assert trained(loaded.action_head.model) == {True}


def test_projectors_are_trained_in_full_beside_lora(make, tmp_path):
    make().save_pretrained(tmp_path)
    policy = type(make()).from_pretrained(tmp_path)
    apply_tuning(policy, {"tune_visual": False, "tune_diffusion_model": "lora"}, r=2)
    learning = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    for name in ("state_encoder", "action_encoder", "action_decoder", "position_embedding"):
        assert any(f"action_head.{name}." in found for found in learning), name
    assert any(".attn1.to_q.lora_A." in found for found in learning)
    assert not any("vision_model" in found or "language_model" in found for found in learning)


def test_gradient_checkpointing_changes_no_gradient(make):
    policy = make(tune_llm=True)
    inputs = given(policy)
    gradients = []
    for enable in (False, True):
        policy.train()
        for module in policy.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if enable:
            policy.gradient_checkpointing_enable()
            assert policy.is_gradient_checkpointing
        policy.zero_grad()
        policy(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-5, msg=name)


# --- inputs -----------------------------------------------------------------------------------------------


def test_a_blind_robot_is_led_by_words_and_state(make):
    policy = make()
    policy.config.empty_cameras = 1
    policy.config.set_input_output_features(
        {"observation.state": policy.config.input_features["observation.state"]}, policy.config.output_features
    )
    inputs = policy.config.example_inputs(2) | policy.config.example_draws(2)
    words = inputs["input_ids"][0] != policy.config.image_token_index
    inputs |= {name: inputs[name][:, words] for name in ("input_ids", "attention_mask")}
    inputs["pixel_mask"] = torch.zeros(2, 1, dtype=torch.bool)
    chunk = policy.predict_action_chunk(**inputs)
    assert chunk.shape == (2, 5, 4)
    assert torch.isfinite(policy(**inputs).loss)
    inputs["pixel_values"] += 1.0
    assert torch.equal(policy.predict_action_chunk(**inputs), chunk)


def test_one_network_for_any_robot(make):
    """Without features the pictures are still needed, however many there are."""
    policy = make()
    policy.config.input_features, policy.config.output_features = {}, {}
    inputs = policy.config.example_inputs(2)
    assert inputs["pixel_values"].shape[1] == 1 and inputs["state"].shape == (2, 6)
    assert torch.isfinite(policy(**inputs).loss)
    del inputs["pixel_values"]
    with pytest.raises(MissingFeatureError, match="pixel_values"):
        policy(**inputs)


def test_pictures_as_a_list_are_joined_and_flat_ones_refused(make):
    policy = make()
    inputs = {n: v for n, v in policy.config.example_inputs(2).items() if "action" not in n}
    draws = policy.config.example_draws(2)
    expected = policy(**inputs, **draws).actions
    pictures = inputs["pixel_values"]
    assert torch.equal(policy(**inputs | {"pixel_values": list(pictures.unbind(1))}, **draws).actions, expected)
    with pytest.raises(FeatureShapeError, match=r"batch, cameras, 3, height, width"):
        policy(**inputs | {"pixel_values": pictures.flatten(0, 1)[:2]})


def test_slots_are_checked(make):
    policy = make()
    inputs = policy.config.example_inputs(2)
    with pytest.raises(FeatureValueError, match=r"embodiment_id holds 3.*0 to 2"):
        policy(**inputs | {"embodiment_id": torch.tensor([0, 3])})


def test_integration_is_in_float32_whatever_the_weights_are(make):
    """Steps of a bfloat16 chunk would be rounded away; its tokens are computed in the weights' type."""
    policy = make().to(torch.bfloat16)
    tokens = []
    policy.action_head.action_encoder.register_forward_pre_hook(lambda _, args: tokens.append(args[0].dtype))
    inputs, noise = policy.config.example_inputs(2), policy.config.example_draws(2)["noise"]
    observation = PolicyInputs.of({name: x for name, x in inputs.items() if name not in LABELS})
    features = policy.backbone.encode(observation)
    assert features.tokens.dtype == torch.bfloat16 and torch.equal(features.mask, inputs["attention_mask"])
    sampled = policy.action_head.sample(features, observation, Draws(noise))
    assert sampled.dtype == torch.float32
    assert tokens == [torch.bfloat16] * 2
    chunk = policy.predict_action_chunk(**inputs, noise=noise)
    assert torch.equal(chunk, sampled.to(torch.bfloat16))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_kernels(make, tmp_path, kernel):
    """Without padding they agree."""
    policy = make()
    inputs = policy.config.example_inputs(2) | policy.config.example_draws(2)
    expected = policy.predict_action_chunk(**inputs)
    policy.save_pretrained(tmp_path)
    loaded = type(policy).from_pretrained(tmp_path, attn_implementation=kernel)
    policy.set_attn_implementation(kernel)
    for changed in (loaded, policy):
        model = changed.backbone.vision_language_model
        assert model.vision_model.config._attn_implementation == kernel
        assert model.language_model.config._attn_implementation == kernel
        torch.testing.assert_close(changed.predict_action_chunk(**inputs), expected, atol=1e-5, rtol=1e-5)
