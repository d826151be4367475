"""Diffusion Policy's components by themselves, and what is special about it."""

import copy
import logging

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from manipulators import (
    AutoPolicy,
    DiffusionActionHead,
    DiffusionConfig,
    DiffusionPolicy,
    DiffusionRgbEncoder,
    LeRobotDataset,
    LeRobotWriter,
    PolicyPipeline,
    PolicyProcessor,
    PolicyTrainer,
    PolicyTrainingArguments,
)
from manipulators.errors import (
    CheckpointError,
    FeatureShapeError,
    FeatureValueError,
    InvalidConfigError,
    MissingFeatureError,
    MissingTokenizerError,
    UnknownInputError,
)
from manipulators.modeling.layers.text_encoder import build_text_encoder
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer

TWO_CAMERAS = {"wrist": (3, 32, 32), "above": (3, 32, 32)}


@pytest.fixture
def tiny(tiny_diffusion):
    """Return a function: config arguments → the policy in eval mode."""

    def build(*args, **fields):
        torch.manual_seed(0)
        return DiffusionPolicy(tiny_diffusion(*args, **fields)).eval()

    return build


# --- images -----------------------------------------------------------------------------------------------


def test_one_random_crop_for_all_images(tiny):
    encoder = tiny(TWO_CAMERAS).diffusion.rgb_encoder.train()
    rows = torch.arange(32.0)[:, None].expand(32, 32)
    images = torch.stack([rows, rows.T])[:, None].expand(2, 3, 32, 32)
    seen = set()
    for _ in range(40):
        crop = encoder.crop(images)
        assert crop.shape == (2, 3, 28, 24)
        top, left = int(crop[0, 0, 0, 0]), int(crop[1, 0, 0, 0])
        torch.testing.assert_close(crop, images[..., top : top + 28, left : left + 24])
        assert torch.equal(encoder.crop(images, torch.tensor([top, left])), crop)
        seen.add((top, left))
    assert {top for top, _ in seen} == set(range(5)) and max(left for _, left in seen) <= 8 and len(seen) > 10


def test_crop_is_at_the_centre_in_evaluation_and_when_not_random(tiny):
    images = torch.arange(32.0).expand(1, 3, 32, 32)
    assert tiny(TWO_CAMERAS).diffusion.rgb_encoder.crop(images)[0, 0, 0, 0] == 4  # (32 − 24) / 2
    fixed = tiny(TWO_CAMERAS, crop_is_random=False).diffusion.rgb_encoder.train()
    assert fixed.crop(images)[0, 0, 0, 0] == 4


def test_images_are_resized_before_they_are_cropped(tiny):
    encoder = tiny(TWO_CAMERAS, resize_shape=(16, 20), crop_shape=(12, 16)).diffusion.rgb_encoder
    images = torch.ones(1, 3, 32, 32)
    torch.testing.assert_close(encoder.resize(images), torch.ones(1, 3, 16, 20))
    assert encoder.pool.size == (2, 2)  # 12 × 16, halved three times, rounded up
    assert encoder(images).shape == (1, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_are_resized_in_their_own_type_or_in_a_wider_one(tiny, dtype):
    encoder = tiny(TWO_CAMERAS, resize_shape=(16, 20), crop_shape=None).diffusion.rgb_encoder
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    resized = encoder.resize(images)
    assert resized.dtype is dtype
    exact = torch.nn.functional.interpolate(images.double(), (16, 20), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized.double(), exact, atol=1e-14 if dtype is torch.float64 else 4e-3, rtol=0)


def test_any_size_of_image(tiny):
    encoder = tiny(TWO_CAMERAS, crop_shape=None).diffusion.rgb_encoder
    assert encoder(torch.randn(2, 3, 64, 48)).shape == (2, 8)


def test_lone_encoder_needs_a_camera():
    with pytest.raises(InvalidConfigError, match=r"image_features=\(3, 480, 640\)"):
        DiffusionRgbEncoder(DiffusionConfig())


def test_crops_of_each_encoder_call_can_be_given(tiny):
    policy = tiny(TWO_CAMERAS, use_separate_rgb_encoder_per_camera=True).train()
    inputs = policy.config.example_inputs(2) | policy.config.example_draws(2, training=True)
    assert inputs.pop("crop_offsets").shape == (2, 2)
    offsets = torch.tensor([[0, 0], [4, 8]])
    loss = policy(**inputs, crop_offsets=offsets).loss
    assert torch.equal(policy(**inputs, crop_offsets=offsets).loss, loss)
    assert not torch.equal(policy(**inputs, crop_offsets=offsets.flip(0)).loss, loss)
    with pytest.raises(FeatureShapeError, match=r"crop_offsets has shape \(1, 2\); expected \(2, 2\)"):
        policy(**inputs, crop_offsets=offsets[:1])


# --- the condition ----------------------------------------------------------------------------------------


def test_condition_holds_one_observation_after_the_other(tiny):
    policy = tiny(TWO_CAMERAS, environment=4)
    inputs = policy.config.example_inputs(2)
    with torch.no_grad():
        condition = policy.diffusion.encode_observation(
            inputs["state"], inputs["environment_state"], inputs["pixel_values"]
        )
        features = policy.diffusion.rgb_encoder(inputs["pixel_values"][:, 1, 1])  # now, second camera
    now = condition.view(2, 2, 3 + 2 * 8 + 4)[:, 1]
    torch.testing.assert_close(now[:, :3], inputs["state"][:, 1])
    torch.testing.assert_close(now[:, 11:19], features)
    torch.testing.assert_close(now[:, 19:], inputs["environment_state"][:, 1])


@pytest.mark.parametrize("form", ["stacked", "list", "named"])
def test_dataset_names(tiny, form):
    policy = tiny(TWO_CAMERAS)
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2)
    views = list(inputs["pixel_values"].unbind(2))
    images = {"observation.images": inputs["pixel_values"] if form == "stacked" else views}
    if form == "named":
        images = dict(zip(policy.config.image_features, views, strict=True))
    batch = {"observation.state": inputs["state"], **images}
    with torch.no_grad():
        found = policy.diffusion.generate_actions(batch, **draws)
    torch.testing.assert_close(found, policy.predict_action_chunk(**inputs, **draws))


def test_history_is_checked(tiny):
    policy = tiny()
    inputs = policy.config.example_inputs(2)
    for state in (inputs["state"][:, 0], inputs["state"][:, :1]):
        with pytest.raises(FeatureShapeError, match="n_obs_steps=2 observations each"):
            policy.predict_action_chunk(state=state)


def test_one_observation_with_and_without_its_dimension(tiny):
    policy = tiny(TWO_CAMERAS, n_obs_steps=1)
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2)
    longer = {name: inputs[name].unsqueeze(1) for name in ("state", "pixel_values")}
    expected = policy.predict_action_chunk(**inputs, **draws)
    torch.testing.assert_close(policy.predict_action_chunk(**longer, **draws), expected)


# --- prediction -------------------------------------------------------------------------------------------


def test_chunk_starts_at_the_current_step(tiny):
    policy = tiny()
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2)
    sequence = policy(**inputs, **draws, return_loss=False).actions
    assert sequence.shape == (2, 8, 2)
    torch.testing.assert_close(policy.predict_action_chunk(**inputs, **draws), sequence[:, 1:5])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["DDPM", "DDIM"])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_steps_are_those_of_diffusers(tiny, scheduler, prediction_type, steps):
    policy = tiny(
        noise_scheduler_type=scheduler,
        prediction_type=prediction_type,
        num_inference_steps=steps,
        beta_schedule="squaredcos_cap_v2",
    )
    head, inputs = policy.diffusion, policy.config.example_inputs(2)
    reference = copy.deepcopy(head.noise_schedule._scheduler)
    reference.set_timesteps(steps)
    sample = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(5))
    found = policy(state=inputs["state"], noise=sample.clone(), step_noise=_zeros(policy, steps)).actions
    with torch.no_grad():
        condition = head.encode_observation(inputs["state"])
        for t in reference.timesteps:
            prediction = head.unet(sample, t.expand(2), condition)
            sample = _without_noise(reference, prediction, t, sample)
    torch.testing.assert_close(found, sample, atol=2e-5, rtol=1e-4)


def _zeros(policy, steps):
    return torch.zeros(steps - 1, 2, 8, 2) if policy.config.noise_scheduler_type == "DDPM" else None


def _without_noise(scheduler, prediction, t, sample):
    """Return diffusers' next sample, with the noise it draws taken out again."""
    after = scheduler.step(prediction, t, sample, generator=torch.Generator().manual_seed(0)).prev_sample
    if scheduler.__class__.__name__ == "DDPMScheduler" and t > 0:
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0))
        after = after - scheduler._get_variance(t) ** 0.5 * noise
    return after


def test_drawn_noise_is_scaled_as_diffusers_does(tiny):
    """DDPM's fixed variance, with the draws of one generator in one order: start, then every step but the last."""
    policy = tiny(beta_schedule="squaredcos_cap_v2")
    inputs = policy.config.example_inputs(2)
    found = policy.predict_action_chunk(state=inputs["state"], generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(2, 8, 2, generator=generator) for _ in range(5)]
    given = policy.predict_action_chunk(state=inputs["state"], noise=draws[0], step_noise=torch.stack(draws[1:]))
    assert torch.equal(found, given)


def test_fewer_steps_on_request(tiny):
    policy = tiny(noise_scheduler_type="DDIM")
    inputs, noise = policy.config.example_inputs(2), torch.randn(2, 8, 2)
    fewer = policy.predict_action_chunk(**inputs, noise=noise, num_steps=2)
    assert not torch.allclose(fewer, policy.predict_action_chunk(**inputs, noise=noise))
    policy.config.num_inference_steps = 2
    torch.testing.assert_close(policy.predict_action_chunk(**inputs, noise=noise), fewer)
    for steps, bound in ((0, "be at least 1"), (6, "lie between 1 and .*=5")):
        with pytest.raises(InvalidConfigError, match=f"num_steps={steps} must {bound}"):
            policy.predict_action_chunk(**inputs, num_steps=steps)


def test_draws_of_another_shape_are_refused(tiny):
    policy = tiny()
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2)
    with pytest.raises(FeatureShapeError, match=r"noise has shape \(2, 7, 2\); expected \(2, 8, 2\)"):
        policy.predict_action_chunk(**inputs, noise=draws["noise"][:, 1:])
    with pytest.raises(FeatureShapeError, match=r"step_noise has shape .*expected \(4, 2, 8, 2\)"):
        policy.predict_action_chunk(**inputs, step_noise=draws["step_noise"][1:])


def test_unknown_inputs_are_refused(tiny):
    policy = tiny()
    with pytest.raises(UnknownInputError, match=r"pixel_maks.*pixel_mask"):
        policy.predict_action_chunk(**policy.config.example_inputs(1), pixel_maks=torch.ones(1, 1))


def test_what_does_not_change_is_computed_once(tiny, monkeypatch):
    """Per chunk: one pass of the encoders and one of the timestep encoder; per step: one of the convolutions."""
    policy = tiny(TWO_CAMERAS)
    calls = {"encoder": 0, "timesteps": 0, "convolutions": 0}

    def count(module, name):
        module.register_forward_hook(lambda *_: calls.update({name: calls[name] + 1}))

    count(policy.diffusion.rgb_encoder, "encoder")
    count(policy.diffusion.unet.diffusion_step_encoder[1], "timesteps")
    count(policy.diffusion.unet.final_conv[1], "convolutions")
    policy.predict_action_chunk(**policy.config.example_inputs(3))
    assert calls == {"encoder": 1, "timesteps": 1, "convolutions": 5}


def test_denoising_step_compiles_once(tiny):
    torch._dynamo.reset()
    policy = tiny()
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2)
    expected = policy.predict_action_chunk(**inputs, **draws)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    policy.diffusion.denoise_step = torch.compile(policy.diffusion.denoise_step, fullgraph=True, backend=backend)
    torch.testing.assert_close(policy.predict_action_chunk(**inputs, **draws), expected)
    assert len(graphs) == 2  # with noise to add, and without for the last step


# --- training ---------------------------------------------------------------------------------------------


def test_loss_is_the_squared_error_of_the_noise(tiny):
    policy = tiny(do_mask_loss_for_padding=False)
    inputs = policy.config.example_inputs(2)
    inputs["action_is_pad"][0, 4:] = True
    noise, time = torch.randn(2, 8, 2), torch.tensor([0, 3])
    output = policy(**inputs, noise=noise, time=time)
    kept = policy.diffusion.noise_schedule._scheduler.alphas_cumprod[time][:, None, None]
    noisy = kept.sqrt() * inputs["actions"] + (1 - kept).sqrt() * noise
    condition = policy.diffusion.encode_observation(inputs["state"])
    # Padded steps count, as the paper has them count.
    expected = F.mse_loss(policy.diffusion.unet(noisy, time, condition), noise)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.losses["mse"], expected)
    assert output.actions is None


def test_masked_loss_of_a_dataset_is_the_published_one(tiny):
    """There, padding repeats the last real action: then what is masked here is no more than the loss."""
    policy = tiny()
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2, training=True)
    inputs["action_is_pad"][0, 5:] = True
    inputs["action_is_pad"][1, 0] = True
    inputs["actions"][0, 5:] = inputs["actions"][0, 4]
    inputs["actions"][1, 0] = inputs["actions"][1, 1]
    noisy, noise = policy.diffusion.noise_schedule.mix(inputs["actions"], draws["noise"], draws["time"])
    condition = policy.diffusion.encode_observation(inputs["state"])
    error = (policy.diffusion.unet(noisy, draws["time"], condition) - noise) ** 2
    expected = error[~inputs["action_is_pad"]].mean()
    torch.testing.assert_close(policy(**inputs, **draws).loss, expected)


def test_head_by_itself_trains_and_predicts(tiny_diffusion):
    torch.manual_seed(0)
    config = tiny_diffusion(environment=4)
    head = DiffusionActionHead(config)
    inputs = config.example_inputs(2)
    batch = {
        "observation.state": inputs["state"],
        "observation.environment_state": inputs["environment_state"],
        "action": inputs["actions"],
        "action_is_pad": inputs["action_is_pad"],
    }
    head.compute_loss(batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    with torch.no_grad():
        assert head.generate_all_actions(batch).shape == (2, 8, 2)
        assert head.generate_actions(batch).shape == (2, 4, 2)
    with pytest.raises(FeatureShapeError, match=r"actions has shape .*expected \(batch, 8, 2\)"):
        head.compute_loss(batch | {"action": inputs["actions"][:, 1:]})
    with pytest.raises(MissingFeatureError, match="environment_state"):
        head.generate_actions({"observation.state": inputs["state"]})


# --- language ---------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    return word_tokenizer(["push the red button", "open it"])


@pytest.fixture
def text_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=12,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.fixture
def clip_folder(tokenizer, text_config, tmp_path):
    torch.manual_seed(1)
    CLIPTextModelWithProjection(text_config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def language_fields(**fields):
    return {"use_language_conditioning": True, "language_projection_dim": 6} | fields


def test_texts_and_tokens_give_the_same(tiny_diffusion, clip_folder, tokenizer):
    torch.manual_seed(0)
    config = tiny_diffusion(**language_fields(language_model_name=str(clip_folder)))
    head = DiffusionActionHead(config).eval()
    state, draws = config.example_inputs(2)["state"], config.example_draws(2)
    texts = ["push the red button", "open it"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = head.generate_actions({"state": state, **tokens}, **draws)
        for name in ("language", "task"):
            batch = {"observation.state": state, name: texts}
            torch.testing.assert_close(head.generate_actions(batch, **draws), expected)
        one = head.generate_actions({"state": state, "language": "open it"}, **draws)
    torch.testing.assert_close(one[1:], expected[1:])
    with pytest.raises(FeatureShapeError, match="one instruction, or one for each of 2"):
        head.generate_actions({"state": state, "language": ["open it"] * 3}, **draws)
    assert not torch.allclose(one[:1], expected[:1], atol=1e-4)


def test_texts_are_checked_as_by_a_processor(tiny_diffusion, clip_folder, tokenizer, caplog):
    """Empty, of unknown words, too long, or of a tokenizer with another end than the encoder looks for."""
    head = DiffusionActionHead(tiny_diffusion(**language_fields(language_model_name=str(clip_folder)))).eval()
    state = {"observation.state": torch.zeros(2, 2, 3)}
    refused = (("  ", "instruction is empty"), ([3, "open it"], "is a str; got 3"), (3, "list of one for each"))
    for text, message in refused:
        with pytest.raises(FeatureValueError, match=message):
            head.generate_actions(state | {"language": text})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            head.generate_actions(state | {"language": "push the bule button " + "red " * 20})
    assert caplog.text.count("has words that the tokenizer does not know") == 1
    assert "it is cut to max_instruction_tokens=" in caplog.text
    tokenizer.eos_token = "<bos>"
    other = DiffusionActionHead(head.config, tokenizer)
    with pytest.raises(CheckpointError, match="would ignore every instruction"):
        other.generate_actions(state | {"language": "open it"})


def test_text_without_a_tokenizer(tiny_diffusion, text_config):
    config = tiny_diffusion(**language_fields(language_config=text_config))
    head = DiffusionActionHead(config)
    batch = {"state": config.example_inputs(1)["state"], "language": "open it"}
    with pytest.raises(MissingTokenizerError, match=r"tokenizer=AutoTokenizer\.from_pretrained\(folder\)"):
        head.generate_actions(batch)
    with pytest.raises(MissingFeatureError, match="input_ids"):
        head.generate_actions({"state": batch["state"]})


def test_text_encoder_is_frozen_and_stays_in_evaluation_mode(tiny, text_config):
    policy = tiny(**language_fields(language_config=text_config)).train()
    assert not any(module.training for module in policy.diffusion.language_encoder.modules())
    assert policy.diffusion.language_dropout.training
    policy(**policy.config.example_inputs(2)).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in policy.diffusion.language_encoder.parameters())
    assert policy.diffusion.language_projection.weight.grad.abs().sum() > 0


def test_checkpoint_needs_nothing_but_itself(tiny, clip_folder, tmp_path):
    policy = tiny(**language_fields(language_model_name=str(clip_folder)))
    policy.save_pretrained(tmp_path / "saved")
    clip_folder.rename(tmp_path / "gone")
    loaded = AutoPolicy.from_pretrained(tmp_path / "saved")
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2)
    assert torch.equal(loaded.predict_action_chunk(**inputs, **draws), policy.predict_action_chunk(**inputs, **draws))
    assert not any(p.requires_grad for p in loaded.diffusion.language_encoder.parameters())


def test_text_encoder_is_saved_only_where_language_is_used(tiny, text_config, tmp_path):
    for folder, fields in (("with", language_fields(language_config=text_config)), ("without", {})):
        tiny(**fields).save_pretrained(tmp_path / folder)
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            assert any("language" in name for name in file.keys()) == (folder == "with")  # noqa: SIM118


def test_start_weights_are_those_of_the_folder(clip_folder, text_config):
    encoder = build_text_encoder(str(clip_folder), None)
    torch.manual_seed(1)
    expected = CLIPTextModelWithProjection(text_config).state_dict()
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_text_encoder_that_cannot_be_had(clip_folder, text_config, tmp_path):
    with pytest.raises(InvalidConfigError, match=r"(?s)could not be read.*Set language_model_name to a folder"):
        build_text_encoder(str(tmp_path), None)
    with pytest.raises(InvalidConfigError, match="holds another text encoder than language_config describes"):
        build_text_encoder(str(clip_folder), text_config.to_dict() | {"projection_dim": 8})


def test_text_encoder_without_weights_says_so(text_config, caplog):
    with caplog.at_level(logging.WARNING):
        build_text_encoder(None, {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    assert "the frozen text encoder is random" in caplog.text


def test_embedding_of_another_width(tiny_diffusion, clip_folder):
    config = tiny_diffusion(**language_fields(language_model_name=str(clip_folder), language_embedding_dim=512))
    with pytest.raises(InvalidConfigError, match=r"language_embedding_dim=512, but .* gives 12"):
        DiffusionActionHead(config)


# --- pipeline and trainer ---------------------------------------------------------------------------------


def test_pipeline_reads_the_instruction(tiny, clip_folder, statistics_of, tmp_path):
    policy = tiny(**language_fields(language_model_name=str(clip_folder)))
    processor = processor_class(policy.config).from_config(policy.config, statistics_of(policy.config))
    PolicyPipeline(model=policy, processor=processor, device="cpu").save_pretrained(tmp_path / "saved")
    clip_folder.rename(tmp_path / "gone")  # tokenizer and text encoder are in the checkpoint
    pipeline = PolicyPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    draws = policy.config.example_draws(1)
    observation = {"observation.state": torch.zeros(3)}
    chunks = [pipeline.predict_chunk(observation, task=task, **draws) for task in ("open it", "push the red button")]
    assert chunks[0].shape == (4, 2) and not torch.allclose(*chunks, atol=1e-5)
    with pytest.raises(MissingFeatureError, match="task"):
        pipeline.predict_chunk(observation, **draws)


def test_trainer_trains_on_windows_with_history(tiny, clip_folder, statistics_of, tmp_path):
    """From recorded episodes: history and horizon of the config, no samples that start at an episode's end."""
    policy = tiny(**language_fields(language_model_name=str(clip_folder)))
    features = {"observation.state": {"dtype": "float32", "shape": [3]}, "action": {"dtype": "float32", "shape": [2]}}
    with LeRobotWriter(tmp_path / "data", 10, features) as writer:
        for task in ("open it", "push the red button"):
            for step in range(9):
                frame = {"observation.state": torch.full((3,), step / 10), "action": torch.full((2,), step / 10)}
                writer.add_frame({name: value.numpy() for name, value in frame.items()}, task=task)
            writer.end_episode()
    config = policy.config
    dataset = LeRobotDataset(
        tmp_path / "data",
        action_horizon=config.action_horizon,
        n_obs_steps=config.n_obs_steps,
        drop_n_last_frames=config.frames_without_start,
    )
    assert config.frames_without_start == 3 and len(dataset) == 2 * 6
    processor = processor_class(config).from_config(config, dataset.statistics)
    arguments = PolicyTrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    trainer = PolicyTrainer(policy, arguments, processor, train_dataset=dataset)
    trainer.train()
    assert all({"loss", "mse"} <= entry.keys() for entry in trainer.state.log_history[:3])
    assert frozen and all(torch.equal(policy.state_dict()[name], value) for name, value in frozen.items())


def test_pipeline_executes_n_action_steps_of_each_sequence(tiny, statistics_of):
    policy = tiny()
    processor = PolicyProcessor.from_config(policy.config, statistics_of(policy.config))
    pipeline = PolicyPipeline(model=policy, processor=processor, device="cpu")
    states = torch.randn(6, 3)
    draws = {"noise": torch.randn(1, 8, 2), "step_noise": torch.randn(4, 1, 8, 2)}
    actions = [pipeline({"observation.state": state}, **draws) for state in states]
    first = pipeline.predict_chunk({"observation.state": states[:1].expand(1, 2, 3)}, **draws)
    second = pipeline.predict_chunk({"observation.state": states[3:5][None]}, **draws)
    torch.testing.assert_close(torch.stack(actions[:4]), first[0])
    torch.testing.assert_close(torch.stack(actions[4:]), second[0, :2])
