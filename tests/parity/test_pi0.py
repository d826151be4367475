"""LeRobot's π0 (0.6.1, in float32) gives its numbers here: the network alone, and a whole checkpoint."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from manipulators import (
    AutoPolicy,
    PaliGemmaWithExpertModel,
    PI0FlowMatching,
    PI0Policy,
    PI0PolicyConfig,
    PolicyPipeline,
    load_published,
)
from manipulators.auto import load_policy_and_processor
from manipulators.conversion.pi0 import rename_pi0_weights
from manipulators.errors import FeatureShapeError, MissingFeatureError, MissingTokenizerError
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


@pytest.fixture(scope="module", params=["eager", "sdpa", "eager fused", "sdpa fused"])
def sampler(core, request):
    """The network with every switch that sampling has."""
    attention, _, fused = request.param.partition(" ")
    built = core.build(attention=attention)
    if fused:
        built.paligemma_with_expert.fuse()
    return built


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
def test_velocity_at_every_step(core, sampler, variant, monkeypatch):
    velocities = []
    velocity = sampler._velocity
    monkeypatch.setattr(sampler, "_velocity", lambda x: velocities.append(velocity(x)) or velocities[-1])
    sampler.sample_actions(*core.observation(variant), noise=core.labels[1])
    close(torch.stack(velocities), core.outputs[f"{variant}.step_velocities"])


@pytest.mark.parametrize("steps", [10, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sampled_actions(core, sampler, variant, steps):
    noise = core.labels[1]
    before = noise.clone()
    actions = sampler.sample_actions(*core.observation(variant), noise=noise, num_steps=steps)
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


# --- a whole checkpoint -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(shared):
    """LeRobot's checkpoint folder, its inputs and outputs, and how it is loaded."""
    folder = shared / "golden" / "pi0_lerobot_ckpt"
    case = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    return SimpleNamespace(
        checkpoint=folder / "checkpoint",
        sizes=sizes(case["config"]),
        loading=sizes(case["config"]) | {"tokenizer": folder / "tokenizer"},
        tasks=case["tasks"],
        inputs=inputs,
        observation={name: x for name, x in inputs.items() if name.startswith("observation.")},
        outputs=load_file(folder / "outputs.safetensors"),
    )


@pytest.fixture(scope="module")
def pipeline(golden):
    return PolicyPipeline.from_pretrained(golden.checkpoint, device="cpu", **golden.loading)


@pytest.fixture(autouse=True)
def _fresh_episode(request):
    if "pipeline" in request.fixturenames:
        request.getfixturevalue("pipeline").reset()


def test_processed_inputs(golden, pipeline):
    found = pipeline.processor(golden.observation, task=golden.tasks, actions=golden.inputs["action"])
    outputs = golden.outputs
    for view in range(3):  # the third is an empty camera
        close(found["pixel_values"][:, view], outputs[f"processed.images.{view}"], atol=1e-6)
        assert torch.equal(found["pixel_mask"][:, view], outputs[f"processed.img_masks.{view}"])
    close(found["state"], outputs["processed.state"])
    close(found["actions"], outputs["processed.action"])
    assert torch.equal(found["input_ids"], outputs["processed.lang_tokens"])
    assert torch.equal(found["attention_mask"].bool(), outputs["processed.lang_masks"])
    assert found["action_mask"].shape == (2, 6, 8) and found["action_mask"].sum(-1).unique().tolist() == [5]


def test_pictures_as_bytes_in_any_order_of_axes(golden, pipeline):
    expected = pipeline.processor(golden.observation, task=golden.tasks)["pixel_values"]
    cameras = [name for name in golden.observation if "images" in name]
    pictures = {name: (golden.observation[name].movedim(1, -1) * 255).round().to(torch.uint8) for name in cameras}
    found = pipeline.processor(golden.observation | pictures, task=golden.tasks)["pixel_values"]
    torch.testing.assert_close(found, expected, atol=0.6 * 2 / 255, rtol=0)


def test_chunk(golden, pipeline):
    inputs = pipeline.processor(golden.observation, task=golden.tasks)
    normalised = pipeline.policy.predict_action_chunk(**inputs, noise=golden.inputs["noise"])
    assert normalised.shape == (2, 6, 8)
    close(normalised[..., :5], golden.outputs["chunk_normalized"])
    chunk = pipeline.predict_chunk(golden.observation, task=golden.tasks, noise=golden.inputs["noise"])
    close(chunk, golden.outputs["chunk"])


def test_chunk_of_a_fused_policy(golden):
    fused = PolicyPipeline.from_pretrained(golden.checkpoint, device="cpu", **golden.loading)
    fused.policy.fuse()
    chunk = fused.predict_chunk(golden.observation, task=golden.tasks, noise=golden.inputs["noise"])
    close(chunk, golden.outputs["chunk"])


def test_select_action(golden, pipeline):
    actions = [pipeline(golden.observation, task=golden.tasks, noise=golden.inputs["noise"]) for _ in range(6)]
    close(torch.stack(actions), golden.outputs["select_action_6"])


def test_one_robot(golden, pipeline):
    observation = {name: x[1] for name, x in golden.observation.items()}
    chunk = pipeline.predict_chunk(observation, task=golden.tasks[1], noise=golden.inputs["noise"][1:])
    close(chunk, golden.outputs["chunk"][1])


def test_training_loss(golden, pipeline):
    batch = pipeline.processor(golden.observation, task=golden.tasks, actions=golden.inputs["action"])
    draws = {name: golden.inputs[name] for name in ("noise", "time")}
    with torch.no_grad():
        output = pipeline.policy(**batch, **draws)
        alone = [pipeline.policy(**{n: x[i : i + 1] for n, x in (batch | draws).items()}).loss for i in range(2)]
    close(output.loss, golden.outputs["loss"][0])
    close(output.losses["flow"], output.loss)
    close(torch.stack(alone), golden.outputs["loss_per_sample"])


def test_empty_camera_may_be_absent_and_others_not(golden, pipeline):
    assert pipeline.policy.config.optional_cameras == ("observation.images.empty_camera_0",)
    observation = {name: x for name, x in golden.observation.items() if "wrist" not in name}
    with pytest.raises(MissingFeatureError, match=r"lacks observation\.images\.wrist"):
        pipeline.processor(observation, task=golden.tasks)


def test_written_as_ours(golden, pipeline, tmp_path):
    """Tokenizer and sizes included: nothing else is needed to load it."""
    pipeline.save_pretrained(tmp_path)
    again = PolicyPipeline.from_pretrained(tmp_path, device="cpu")
    assert again.processor.to_dict() == pipeline.processor.to_dict()
    chunk = again.predict_chunk(golden.observation, task=golden.tasks, noise=golden.inputs["noise"])
    close(chunk, golden.outputs["chunk"])


def test_policy_without_a_tokenizer(golden):
    policy = AutoPolicy.from_pretrained(golden.checkpoint, **golden.sizes)
    assert type(policy) is PI0Policy and not policy.training
    assert policy.dtype == torch.float32


def test_gated_tokenizer(golden, monkeypatch):
    """LeRobot's processor names PaliGemma's tokenizer only, which is gated."""

    def refuse(source, **kwargs):
        raise OSError(f"{source} is a gated repository")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    message = r"'google/paligemma-3b-pt-224' cannot be loaded.*tokenizer="
    with pytest.raises(MissingTokenizerError, match=message):
        PolicyPipeline.from_pretrained(golden.checkpoint, device="cpu", **golden.sizes)


def test_dtype_of_the_published_config(golden, tmp_path):
    shutil.copytree(golden.checkpoint, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "config.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    policy, processor = load_policy_and_processor(tmp_path / "checkpoint", **golden.loading)
    assert policy.model.paligemma_with_expert.embed_tokens.weight.dtype == torch.bfloat16
    assert policy.model.state_proj.weight.dtype == torch.float32
    inputs = processor(golden.observation, task=golden.tasks)
    chunk = policy.predict_action_chunk(**inputs, noise=golden.inputs["noise"])
    torch.testing.assert_close(chunk[..., :5], golden.outputs["chunk_normalized"], atol=0.1, rtol=0)


def test_relative_actions(golden, tmp_path):
    """Actions that the network knows as differences to the state come out absolute."""
    shutil.copytree(golden.checkpoint, tmp_path / "checkpoint")
    changes = {
        "relative_actions_processor": {"enabled": True, "action_names": ["a", "b", "gripper", "d", "e"]},
        "absolute_actions_processor": {"enabled": True},
    }
    for kind in ("pre", "post"):
        path = tmp_path / "checkpoint" / f"policy_{kind}processor.json"
        path.chmod(0o644)
        values = json.loads(path.read_text())
        for step in values["steps"]:
            step["config"] |= changes.get(step["registry_name"], {})
        path.write_text(json.dumps(values))
    _, processor = load_policy_and_processor(tmp_path / "checkpoint", **golden.loading)
    assert processor.relative_to == [0, 1, None, 3, 4]
    state = golden.observation["observation.state"]
    chunk = torch.zeros(2, 6, 8)
    chunk[..., :5] = golden.outputs["chunk_normalized"]
    expected = golden.outputs["chunk"] + torch.where(torch.arange(5) == 2, 0, state)[:, None]
    close(processor.decode_actions(chunk, state=state), expected)


def test_chunk_without_its_padding_is_refused(golden, pipeline):
    with pytest.raises(
        FeatureShapeError, match=r"shape \(2, 6, 5\); expected a last dimension of 8, padding included"
    ):
        pipeline.processor.decode_actions(golden.outputs["chunk_normalized"])


def test_checkpoint_of_the_first_generation(golden, pipeline, tmp_path, monkeypatch):
    """LeRobot 0.1 to 0.3: transformers' older names, statistics among the weights, pictures padded top left."""
    config = json.loads((golden.checkpoint / "config.json").read_text())
    config["resize_imgs_with_padding"], config["num_steps"] = config.pop("image_resolution"), 10
    for name in ("paligemma_variant", "action_expert_variant", "dtype", "num_inference_steps"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    inner = "model.paligemma_with_expert.paligemma."
    weights = {
        name.replace(f"{inner}model.language_model.", f"{inner}language_model.model.")
        .replace(f"{inner}model.", inner)
        .replace(f"{inner}lm_head.", f"{inner}language_model.lm_head."): weight
        for name, weight in load_file(golden.checkpoint / "model.safetensors").items()
    }
    statistics = load_file(golden.checkpoint / "policy_preprocessor_step_6_normalizer_processor.safetensors")
    for which in ("mean", "std"):
        state, action = statistics[f"observation.state.{which}"], statistics[f"action.{which}"]
        weights[f"normalize_inputs.buffer_observation_state.{which}"] = state
        for module in ("normalize_targets", "unnormalize_outputs"):
            weights[f"{module}.buffer_action.{which}"] = action.clone()
    save_file(weights, tmp_path / "model.safetensors")

    old = PolicyPipeline.from_pretrained(tmp_path, device="cpu", **golden.loading)
    assert all(torch.equal(a, b) for a, b in zip(old.policy.parameters(), pipeline.policy.parameters(), strict=True))
    request = {"task": golden.tasks, "noise": golden.inputs["noise"]}
    chunk = old.predict_chunk(golden.observation, **request)
    assert not torch.allclose(chunk, golden.outputs["chunk"], atol=1e-3)
    monkeypatch.setattr(pipeline.processor.pictures, "image_padding", "top_left")
    assert torch.equal(chunk, pipeline.predict_chunk(golden.observation, **request))
