"""LeRobot's π0 (0.6.1, in float32) gives its numbers here: the network alone, and a whole checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from manipulators import PaliGemmaWithExpertModel, PI0FlowMatching, PI0Policy, PI0PolicyConfig, load_published
from manipulators.conversion.pi0 import rename_pi0_weights
from manipulators.modeling.action_heads.pi0 import block_mask

VARIANTS = ("all_present", "last_camera_masked", "lang_padded", "camera_and_lang_masked")
# The dead tail of the last prefix layer: LeRobot computes its queries, which influence nothing.
UNUSED = "layers.2.language_model.self_attn.q_proj.weight"
FEATURES = {
    "input_features": {
        **{f"observation.images.{i}": {"type": "VISUAL", "shape": (3, 28, 28)} for i in range(3)},
        "observation.state": {"type": "STATE", "shape": (8,)},
    },
    "output_features": {"action": {"type": "ACTION", "shape": (8,)}},
}


def close(found, expected, atol=2e-5, rtol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def sizes(case: dict) -> dict:
    """Return the fields of our config for the widths in LeRobot's case.json."""

    def gemma(stream: dict) -> dict:
        return {
            "hidden_size": stream["width"],
            "num_hidden_layers": stream["depth"],
            "intermediate_size": stream["mlp_dim"],
            "num_attention_heads": stream["num_heads"],
            "num_key_value_heads": stream["num_kv_heads"],
            "head_dim": stream["head_dim"],
            "vocab_size": case["vocab_size"],
        }

    return {
        "paligemma_config": {
            "text_config": gemma(case["vlm"]),
            "vision_config": case["vision"],
            "projection_dim": case["vision"]["projection_dim"],
        },
        "gemma_expert_config": gemma(case["expert"]),
    }


@pytest.fixture(scope="module")
def core(shared):
    """Weights, inputs and outputs of LeRobot's network, and a function that builds ours with its weights."""
    folder = shared / "golden" / "pi0_core"
    case = json.loads((folder / "case.json").read_text())["config"]
    arrays = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    config = PI0PolicyConfig(
        **sizes(case),
        **FEATURES,
        image_resolution=(28, 28),
        chunk_size=case["chunk_size"],
        max_state_dim=case["max_state_dim"],
        max_action_dim=case["max_action_dim"],
        max_instruction_tokens=7,
    )

    def build(kind=PI0FlowMatching, attention="eager"):
        config.attention_implementation = attention
        return load_published(kind(config), arrays["weights"]).eval()

    inputs = arrays["inputs"]

    def observation(variant: str) -> tuple:
        images = [inputs[f"images.{i}"] for i in range(3)]
        masks = [inputs[f"{variant}.img_masks.{i}"] for i in range(3)]
        return images, masks, inputs["lang_tokens"], inputs[f"{variant}.lang_masks"], inputs["state"]

    return SimpleNamespace(
        build=build,
        config=config,
        weights=arrays["weights"],
        observation=observation,
        labels=tuple(inputs[name] for name in ("actions", "noise", "time")),
        outputs=arrays["outputs"],
        gradient_norms=arrays["grad_norms_camera_and_lang_masked"],
    )


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def network(core, request):
    return core.build(attention=request.param)


# --- the network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens(core, network, variant):
    images, masks, tokens, real, state = core.observation(variant)
    actions, noise, time = core.labels
    with torch.no_grad():
        prefix, mask = network.embed_prefix(images, masks, tokens, real)
        close(prefix, core.outputs[f"{variant}.prefix_embs"])
        assert torch.equal(mask, core.outputs[f"{variant}.prefix_pad_masks"])
        noisy = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
        close(network.embed_suffix(state, noisy, time), core.outputs[f"{variant}.suffix_embs"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss(core, network, variant):
    actions, noise, time = core.labels
    with torch.no_grad():
        loss = network(*core.observation(variant), actions, noise, time)
    assert loss.shape == (2, 6, 8)
    close(loss, core.outputs[f"{variant}.loss"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_velocity_at_every_step(core, network, variant, monkeypatch):
    velocities = []
    velocity = network._velocity
    monkeypatch.setattr(network, "_velocity", lambda x: velocities.append(velocity(x)) or velocities[-1])
    network.sample_actions(*core.observation(variant), noise=core.labels[1])
    close(torch.stack(velocities), core.outputs[f"{variant}.step_velocities"])


@pytest.mark.parametrize("steps", [10, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sampled_actions(core, network, variant, steps):
    noise = core.labels[1]
    before = noise.clone()
    actions = network.sample_actions(*core.observation(variant), noise=noise, num_steps=steps)
    close(actions, core.outputs[f"{variant}.sampled_{steps}"])
    assert torch.equal(noise, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(core, network, checkpointing):
    """Also recomputed layer by layer, through the policy's own switch."""
    policy = PI0Policy(core.config)
    policy.model = network
    # transformers before 5.23 has only the older name, which warns since.
    name = "activation" if hasattr(policy, "activation_checkpointing_enable") else "gradient"
    if checkpointing:
        getattr(policy, f"{name}_checkpointing_enable")()
    recomputed = [layer for layer in network.paligemma_with_expert.layers if layer.gradient_checkpointing]
    assert len(recomputed) == (3 if checkpointing else 0)
    network.train().zero_grad()
    actions, noise, time = core.labels
    network(*core.observation("camera_and_lang_masked"), actions, noise, time).mean().backward()
    expected = rename_pi0_weights(core.gradient_norms)
    assert expected.pop(f"model.paligemma_with_expert.{UNUSED}") == 0
    found = {f"model.{name}": p.grad.norm() for name, p in network.named_parameters() if p.requires_grad}
    getattr(policy, f"{name}_checkpointing_disable")()
    network.eval()
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        assert found[name].item() == pytest.approx(norm.item(), rel=1e-3, abs=2e-6), name


def test_published_names_of_the_backbone_alone(core):
    backbone = load_published(PaliGemmaWithExpertModel(core.config.backbone_config()), core.weights)
    key = "paligemma_with_expert.paligemma.model.language_model.norm.weight"
    assert torch.equal(backbone.language_norm.weight, core.weights[key])
    part = {name.removeprefix("paligemma_with_expert."): w for name, w in core.weights.items() if "paligemma_" in name}
    alone = load_published(PaliGemmaWithExpertModel(core.config.backbone_config()), part)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), backbone.parameters(), strict=True))


def test_prefix_output_does_not_depend_on_the_suffix(core):
    """The last layer's tail is skipped where nobody wants it, and computed where somebody does."""
    backbone = core.build().paligemma_with_expert
    images, masks, tokens, real, state = core.observation("all_present")
    network = core.build()
    with torch.no_grad():
        prefix, mask = network.embed_prefix(images, masks, tokens, real)
        suffix = network.embed_suffix(state, core.labels[0], core.labels[2])
        n, m = prefix.shape[1], suffix.shape[1]
        positions = torch.arange(n + m).expand(2, -1)
        blocks = block_mask(mask, m - 1)
        (both, expert), none = backbone(blocks, positions, inputs_embeds=[prefix, suffix])
        (alone, _), cache = backbone(
            blocks[:, :n, :n], positions[:, :n], inputs_embeds=[prefix, None], use_cache=True, fill_kv_cache=True
        )
        (_, cached), again = backbone(
            blocks[:, n:], positions[:, n:], past_key_values=cache, inputs_embeds=[None, suffix], use_cache=True
        )
        (unwanted, skipped), _ = backbone(blocks, positions, inputs_embeds=[prefix, suffix], prefix_output=False)
    assert none is None and again is cache and unwanted is None
    assert both.shape == prefix.shape and expert.shape == suffix.shape
    close(both, alone)
    close(expert, cached)
    close(expert, skipped)
