"""LeRobot 0.6.1's and InternManip's Diffusion Policy give their numbers here."""

import json
import runpy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from manipulators import (
    AutoPolicy,
    DiffusionActionHead,
    DiffusionConfig,
    DiffusionPolicy,
    DiffusionRgbEncoder,
    PolicyPipeline,
    load_published,
)
from manipulators.auto import load_policy_and_processor
from manipulators.conversion.diffusion import rename_diffusion_weights
from manipulators.errors import WeightsMismatchError

LEROBOT = ("diffusion_envstate", "diffusion_ddim", "diffusion_crop")
CLIP = ("dp_clip_head_ddpm", "dp_clip_head_ddim")


def close(found, expected, atol=2e-5, rtol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


# --- LeRobot's checkpoints --------------------------------------------------------------------------------


@pytest.fixture(params=LEROBOT)
def golden(request, shared):
    """A golden case: its folder, inputs and outputs by group, and the policy and processor loaded from it."""
    folder = shared / "golden" / request.param
    arrays = {kind: load_file(folder / f"{kind}.safetensors") for kind in ("inputs", "outputs")}

    def group(*prefixes: str) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(f"{prefix}/"): value
            for prefix in prefixes
            for name, value in arrays["inputs"].items()
            if name.startswith(f"{prefix}/")
        }

    policy, processor = load_policy_and_processor(folder / "checkpoint")
    return SimpleNamespace(
        checkpoint=folder / "checkpoint",
        case=json.loads((folder / "case.json").read_text()),
        group=group,
        observation=lambda *prefixes: observation_of(group(*prefixes)),
        inputs=arrays["inputs"],
        outputs=arrays["outputs"],
        draws={"noise": arrays["inputs"]["chunk/noise_init"], "step_noise": arrays["inputs"].get("chunk/noise_steps")},
        policy=policy.eval(),
        processor=processor,
    )


def observation_of(values):
    return {name: value for name, value in values.items() if name.startswith("observation.")}


def labelled(golden):
    """Return the golden's training batch as model inputs."""
    raw = golden.group("train", "train_u8")
    return golden.processor(observation_of(raw), actions=raw["action"], action_is_pad=raw["action_is_pad"])


@pytest.fixture
def training(golden):
    """One training step on the golden's batch, gradients included."""
    batch, inputs = labelled(golden), golden.inputs
    draws = {"noise": inputs["train/eps"], "time": inputs["train/timesteps"]}
    seen = {}
    handle = golden.policy.diffusion.unet.register_forward_hook(
        lambda module, args, output: seen.update(noisy=args[0], prediction=output)
    )
    output = golden.policy.train()(**batch, **draws, crop_offsets=inputs.get("train/crop_ij"))
    handle.remove()
    output.loss.backward()
    return SimpleNamespace(batch=batch, output=output, **seen)


def test_loads_as_diffusion_policy(golden):
    assert type(AutoPolicy.from_pretrained(golden.checkpoint)) is DiffusionPolicy
    assert sum(p.numel() for p in golden.policy.parameters()) == golden.case["n_params"]
    assert golden.policy.dtype == torch.float32


def test_normalized_inputs(golden):
    found = golden.processor(golden.observation("chunk"))
    names = {"observation.state": "state", "observation.environment_state": "environment_state"}
    cameras = list(golden.policy.config.image_features)
    expected = {n.removeprefix("chunk_norm/"): v for n, v in golden.outputs.items() if n.startswith("chunk_norm/")}
    assert set(expected) == set(golden.policy.config.input_features)
    for name, value in expected.items():
        x = found["pixel_values"][:, :, cameras.index(name)] if name in cameras else found[names[name]]
        close(x[: len(value)], value)


def test_condition_and_first_prediction(golden):
    inputs = golden.processor(golden.observation("chunk"))
    head = golden.policy.diffusion
    with torch.no_grad():
        condition = head.encode_observation(**inputs)
        close(condition, golden.outputs["debug/global_cond"])
        first = golden.outputs["chunk/timesteps"][:1].expand(2)
        close(head.unet(golden.draws["noise"], first, condition), golden.outputs["debug/unet_first"])


def test_timesteps(golden):
    head = golden.policy.diffusion
    timesteps, _ = head.noise_schedule.times(golden.policy.config.denoising_steps, torch.device("cpu"))
    assert torch.equal(timesteps, golden.outputs["chunk/timesteps"])


@pytest.mark.parametrize("images", ["chunk", "chunk_u8"])
def test_chunk(golden, images):
    """From float CHW images, and from the same as uint8 HWC."""
    inputs = golden.processor(golden.observation("chunk", images))
    with torch.no_grad():
        sequence = golden.policy.diffusion.generate_all_actions(inputs, **golden.draws)
    close(sequence, golden.outputs["chunk/trajectory_norm"])
    chunk = golden.policy.predict_action_chunk(**inputs, **golden.draws)
    close(chunk, golden.outputs["chunk/action_norm"])
    close(golden.processor.decode_actions(chunk), golden.outputs["chunk/action"])


def test_select_action(golden):
    pipeline = PolicyPipeline(model=golden.policy, processor=golden.processor, device="cpu")
    rows = golden.group("select", "select_u8")
    observations, steps = observation_of(rows), len(golden.outputs["select/action"])
    actions = []
    for step in range(steps):
        refill = step // golden.policy.config.n_action_steps
        draws = {"noise": rows["noise_init"][refill]}
        if "noise_steps" in rows:
            draws["step_noise"] = rows["noise_steps"][refill]
        actions.append(pipeline({name: value[step] for name, value in observations.items()}, **draws))
    close(torch.stack(actions), golden.outputs["select/action"])


def test_training_loss(golden, training):
    close(training.batch["actions"], golden.outputs["train/action_norm"])
    close(training.noisy, golden.outputs["train/noisy"])
    close(training.prediction, golden.outputs["train/pred"])
    close(training.output.loss, golden.outputs["train/loss"])
    close(training.output.losses["mse"], golden.outputs["train/loss"])


def test_gradients(golden, training):
    expected = rename_diffusion_weights(golden.case["grad_norms"])
    found = {name: p.grad.norm().item() for name, p in golden.policy.named_parameters()}
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        assert found[name] == pytest.approx(norm, rel=1e-3, abs=2e-6), name
    total = torch.nn.utils.get_total_norm([p.grad for p in golden.policy.parameters()])
    close(total, golden.outputs["train/grad_norm"])


def test_evaluation_loss(golden):
    draws = {"noise": golden.inputs["eval/eps"], "time": golden.inputs["eval/timesteps"]}
    close(golden.policy(**labelled(golden), **draws).loss, golden.outputs["eval/loss"])


def test_saved_as_ours_it_predicts_the_same_to_the_bit(golden, tmp_path):
    observation = golden.observation("chunk")
    pipeline = PolicyPipeline.from_pretrained(golden.checkpoint, device="cpu")
    pipeline.save_pretrained(tmp_path)
    reloaded = PolicyPipeline.from_pretrained(tmp_path, device="cpu")
    before = pipeline.predict_chunk(observation, **golden.draws)
    assert torch.equal(reloaded.predict_chunk(observation, **golden.draws), before)
    for kind in ("input_features", "output_features", "statistics", "normalization_mapping", "normalization_eps"):
        assert getattr(reloaded.processor, kind) == getattr(pipeline.processor, kind), kind


def test_every_published_tensor_is_needed(golden, break_all):
    weights = load_file(golden.checkpoint / "model.safetensors")
    head = DiffusionActionHead(golden.policy.config)
    load_published(head, weights)
    for name, value in head.state_dict().items():
        assert torch.equal(value, golden.policy.diffusion.state_dict()[name]), name

    def ours(name):
        return next(iter(rename_diffusion_weights({name: 0}))).removeprefix("diffusion.")

    for turn in range(4):
        broken = break_all(weights, turn, ours)
        with pytest.raises(WeightsMismatchError) as caught:
            load_published(head, broken.found)
        broken.check(caught.value)


@pytest.mark.parametrize("case", ["diffusion_envstate", "diffusion_crop"])
def test_statistics_among_the_weights(shared, tmp_path, case):
    """The layout of LeRobot 0.1 to 0.3, written from a later checkpoint, gives the later one's numbers."""
    source = shared / "golden" / case / "checkpoint"
    weights = load_file(source / "model.safetensors")
    statistics = load_file(source / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    config = json.loads((source / "config.json").read_text())
    for feature, kind in (config["input_features"] | config["output_features"]).items():
        mode = config["normalization_mapping"].get(kind["type"], "IDENTITY")
        for which in {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max")}.get(mode, ()):
            is_action = feature == "action"
            for module in ("normalize_targets", "unnormalize_outputs") if is_action else ("normalize_inputs",):
                name = f"{module}.buffer_{feature.replace('.', '_')}.{which}"
                weights[name] = statistics[f"{feature}.{which}"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    inputs = load_file(shared / "golden" / case / "inputs.safetensors")
    chunk = {n.removeprefix("chunk/"): v for n, v in inputs.items() if n.startswith("chunk/observation")}
    draws = {"noise": inputs["chunk/noise_init"], "step_noise": inputs["chunk/noise_steps"]}
    found = PolicyPipeline.from_pretrained(tmp_path, device="cpu").predict_chunk(chunk, **draws)
    close(found, load_file(shared / "golden" / case / "outputs.safetensors")["chunk/action"])


# --- InternManip's head -----------------------------------------------------------------------------------


def tokenizer_of(token_ids):
    """Return a tokenizer that knows the golden's texts only."""

    def tokenize(texts, padding, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == (True, True, "pt")
        rows = [token_ids[text] for text in texts]
        longest = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }

    return tokenize


@pytest.fixture(scope="module", params=CLIP)
def clip_golden(request, shared):
    folder = shared / "golden" / request.param
    case = json.loads((folder / "case.json").read_text())
    trunk = runpy.run_path(str(shared / "golden" / "resnet_trunk.py"))["load_recipe"](case)
    config = DiffusionConfig(**case["config"], language_config=case["clip_config"])
    head = DiffusionActionHead(config, tokenizer=tokenizer_of(case["token_ids"]))
    weights = load_file(folder / "weights.safetensors") | trunk
    inputs = load_file(folder / "inputs.safetensors")
    batch = {name: inputs[name] for name in ("observation.state", "observation.images", "action", "action_is_pad")}
    return SimpleNamespace(
        head=load_published(head, weights).eval(),
        weights=weights,
        batch=batch | {"language": case["texts"]},
        inputs=inputs,
        draws={"noise": inputs["inference_init_noise"], "step_noise": inputs.get("inference_step_noise")},
        outputs=load_file(folder / "outputs.safetensors"),
    )


def relatively_close(found, expected):
    """The unclipped sampler blows its first estimates up, so numbers are compared by their size."""
    scale = expected.abs().max()
    close(found / scale, expected / scale, atol=1e-4, rtol=1e-4)


def test_clip_condition(clip_golden):
    head, outputs = clip_golden.head, clip_golden.outputs
    inputs = head.read_batch(clip_golden.batch)
    observation = {name: value for name, value in inputs.items() if not name.startswith("action")}
    with torch.no_grad():
        sentence = head.language_encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds
        condition = head.encode_observation(**observation)
        prediction = head.unet(outputs["noisy_trajectory"], clip_golden.inputs["timesteps"], condition)
    close(sentence, outputs["text_features"])
    close(condition, outputs["global_cond"])
    relatively_close(prediction, outputs["unet_pred"])


def test_clip_loss(clip_golden):
    draws = {"noise": clip_golden.inputs["noise"], "time": clip_golden.inputs["timesteps"]}
    loss = clip_golden.head.compute_loss(clip_golden.batch, **draws)["loss"]
    relatively_close(loss[None], clip_golden.outputs["loss"])


def test_clip_actions(clip_golden):
    with torch.no_grad():
        sequence = clip_golden.head.generate_all_actions(clip_golden.batch, **clip_golden.draws)
        actions = clip_golden.head.generate_actions(clip_golden.batch, **clip_golden.draws)
    relatively_close(sequence, clip_golden.outputs["actions_full_horizon"])
    relatively_close(actions, clip_golden.outputs["actions"])


def test_clip_schedule(clip_golden):
    head, outputs = clip_golden.head, clip_golden.outputs
    timesteps, _ = head.noise_schedule.times(head.config.denoising_steps, torch.device("cpu"))
    assert torch.equal(timesteps, outputs["scheduler_timesteps"])


def test_clip_weights_are_all_needed_but_its_vision(clip_golden):
    weights = clip_golden.weights
    for name in ("language_projection.bias", "language_encoder.text_projection.weight", "unet.final_conv.1.bias"):
        with pytest.raises(WeightsMismatchError, match=name.replace(".", r"\.")):
            load_published(clip_golden.head, {n: v for n, v in weights.items() if n != name})
    without_vision = {name: value for name, value in weights.items() if "vision_model" not in name}
    load_published(clip_golden.head, without_vision)


def test_clip_weights_fill_a_whole_policy_and_a_lone_encoder(clip_golden):
    head, weights = clip_golden.head, clip_golden.weights
    policy = load_published(DiffusionPolicy(head.config), weights)
    for name, value in policy.diffusion.state_dict().items():
        assert torch.equal(value, head.state_dict()[name]), name
    if not head.config.use_separate_rgb_encoder_per_camera:
        encoder = load_published(DiffusionRgbEncoder(head.config), weights)
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, head.rgb_encoder.state_dict()[name]), name


# --- InternManip's encoder --------------------------------------------------------------------------------


def test_rgb_encoder(shared):
    folder = shared / "golden" / "diffusion_rgb_encoder_gn_crop"
    case = json.loads((folder / "case.json").read_text())
    trunk = runpy.run_path(str(shared / "golden" / "resnet_trunk.py"))["load_recipe"](case)
    encoder = DiffusionRgbEncoder(DiffusionConfig(**case["config"]))
    load_published(encoder, load_file(folder / "weights.safetensors") | trunk).eval()
    images = load_file(folder / "inputs.safetensors")["images"]
    outputs = load_file(folder / "outputs.safetensors")
    with torch.no_grad():
        cropped = encoder.crop(images)
        feature_map = encoder.backbone(cropped).last_hidden_state
        assert torch.equal(cropped, outputs["cropped_input"])
        close(feature_map, outputs["feature_map"], atol=1e-4)
        close(encoder.pool(feature_map), outputs["keypoints"], atol=1e-4)
        close(encoder(images), outputs["features"], atol=1e-4)
