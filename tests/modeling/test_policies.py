"""What every policy promises, checked for every entry of policy_cases.py."""

import copy
import inspect
import json
import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModel

from manipulators import AutoPolicy, PolicyPipeline
from manipulators.errors import (
    CheckpointError,
    DivergedWeightsError,
    FeatureShapeError,
    FeatureValueError,
    InvalidConfigError,
    MissingFeatureError,
)
from manipulators.inference.speed import example_request
from manipulators.processing.word_tokenizer import word_tokenizer
from manipulators.training.global_mean import GlobalMean

LABELS = ("actions", "action_is_pad", "action_mask")
NAMES = {"state": "observation.state", "environment_state": "observation.environment_state"}


def observation_inputs(config, batch_size=2, **absent):
    return {name: value for name, value in config.example_inputs(batch_size, **absent).items() if name not in LABELS}


def mapped(value, function):
    return [function(item) for item in value] if isinstance(value, list) else function(value)


def predict(policy, inputs, seed=0):
    return policy.predict_action_chunk(**inputs, generator=torch.Generator().manual_seed(seed))


def sample(inputs, i):
    """Return sample i of a batch, still as a batch."""
    batch_dimension = {"step_noise": 1, "crop_offsets": None}  # per step (steps, b, …); one for the whole batch

    def of(name, value):
        dimension = batch_dimension.get(name, 0)
        return value if dimension is None else mapped(value, lambda x: x.narrow(dimension, i, 1))

    return {name: of(name, value) for name, value in inputs.items()}


# --- forward and prediction -------------------------------------------------------------------------------


def test_example_inputs_fit_forward(policy):
    config = policy.config
    output = policy(**config.example_inputs(3))
    assert output.loss.shape == () and torch.isfinite(output.loss)
    assert output.losses and all(part.shape == () for part in output.losses.values())
    chunk = policy(**observation_inputs(config, 3)).actions
    assert chunk.shape == (3, config.action_horizon, config.model_action_dim)
    # A policy that samples its actions does not sample them to compute a loss.
    assert output.actions is None if config.example_draws(3) else output.actions.shape == chunk.shape


def test_example_draws_make_everything_a_function_of_the_inputs(policy):
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2)
    assert torch.equal(policy.predict_action_chunk(**inputs, **draws), policy.predict_action_chunk(**inputs, **draws))
    observation = observation_inputs(policy.config)
    assert torch.equal(policy(**observation, **draws).actions, policy(**observation, **draws).actions)
    draws = policy.config.example_draws(2, training=True)
    assert torch.equal(policy(**inputs, **draws).loss, policy(**inputs, **draws).loss)


@pytest.mark.parametrize("training", [False, True])
def test_each_draw_matters(policy, training):
    inputs, draws = policy.config.example_inputs(2), policy.config.example_draws(2, training)
    policy.train(training)

    def result(draws):
        torch.manual_seed(0)  # of what cannot be given: dropout
        return policy(**inputs, **draws).loss if training else policy.predict_action_chunk(**inputs, **draws)

    before = result(draws)
    for name, value in draws.items():
        other = value.flip(0) + 1 if value.is_floating_point() else (value - 1).abs()
        assert not torch.allclose(result(draws | {name: other}), before, atol=1e-6), name


def test_example_inputs_fit_prediction(policy):
    config = policy.config
    chunk = policy.predict_action_chunk(**config.example_inputs(1))
    assert chunk.shape[0] == 1 and chunk.shape[2] == config.model_action_dim
    assert config.n_action_steps <= chunk.shape[1] <= config.action_horizon
    assert not chunk.requires_grad and torch.isfinite(chunk).all()


def test_example_inputs_are_always_the_same(case):
    first, second = case.config().example_inputs(2), case.config().example_inputs(2)
    assert first.keys() == second.keys()
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            assert torch.equal(a, b), name


def test_every_input_is_named_in_the_signature(policy):
    parameters = inspect.signature(policy.forward).parameters
    assert policy.config.example_inputs(1).keys() <= parameters.keys()
    assert parameters["return_loss"].default is True
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def test_main_input_is_one_that_the_policy_has(policy):
    assert policy.main_input_name in policy.config.example_inputs(1)


def test_no_labels_no_loss(policy):
    output = policy(**observation_inputs(policy.config))
    assert output.loss is None and output.losses is None
    assert policy(**policy.config.example_inputs(2), return_loss=False).loss is None


def test_labels_do_not_change_the_prediction(policy):
    inputs = policy.config.example_inputs(2)
    assert torch.equal(predict(policy, inputs), predict(policy, observation_inputs(policy.config)))


def test_each_input_matters(policy):
    inputs = observation_inputs(policy.config)
    before = predict(policy, inputs)
    assert inputs
    for name, value in inputs.items():
        if name in ("pixel_values", "pixel_mask"):  # see the two tests below
            continue
        if name == "state" and policy.config.state_in_prompt:
            torch.testing.assert_close(predict(policy, inputs | {name: value + 1.0}), before, atol=0, rtol=0)
            continue
        if name == "attention_mask":
            other = value.clone()
            other[:, 0] = 0
        elif value.is_floating_point():
            other = value + 1.0
        else:
            other = ~value if value.dtype == torch.bool else value.flip(0)
        if name == "embodiment_id" and torch.equal(other, value):  # the only robot
            continue
        changed = inputs | {name: other}
        assert not torch.allclose(predict(policy, changed), before, atol=1e-5), name


def test_each_camera_matters(policy):
    inputs = observation_inputs(policy.config)
    before = predict(policy, inputs)
    for view in range(len(policy.config.image_features)):
        pixels = copy.deepcopy(inputs["pixel_values"])
        (pixels[view] if isinstance(pixels, list) else pixels.select(-4, view)).add_(1.0)
        after = predict(policy, inputs | {"pixel_values": pixels})
        assert not torch.allclose(after, before, atol=1e-5), f"camera {view}"


def test_absent_cameras_do_not_matter(policy):
    """Whatever stands in the place of a camera that is masked: another picture, or none."""
    inputs = observation_inputs(policy.config)
    for view, name in enumerate(policy.config.image_features):
        if name in policy.config.optional_cameras:
            without = observation_inputs(policy.config, absent_cameras=[name])
            assert not without["pixel_mask"][:, view].any()
            pixels = without["pixel_values"].clone()
            pixels.select(-4, view).fill_(7.0)
            absent = predict(policy, without)
            torch.testing.assert_close(predict(policy, without | {"pixel_values": pixels}), absent)
            assert not torch.allclose(absent, predict(policy, inputs), atol=1e-5)


def test_each_label_matters(policy):
    inputs = policy.config.example_inputs(2)
    torch.manual_seed(0)
    before = policy.train()(**inputs).loss
    for step in range(policy.config.action_horizon):
        actions = inputs["actions"].clone()
        actions[:, step] += 3.0
        torch.manual_seed(0)
        assert (policy(**inputs | {"actions": actions}).loss - before).abs() > 1e-4, step


def test_sample_of_a_batch_equals_the_sample_alone(policy):
    inputs = observation_inputs(policy.config, 3) | policy.config.example_draws(3)
    together = policy(**inputs).actions
    for i in range(3):
        torch.testing.assert_close(policy(**sample(inputs, i)).actions, together[i : i + 1], atol=1e-5, rtol=0)


def test_same_seed_same_chunk(policy):
    inputs = observation_inputs(policy.config)
    assert torch.equal(predict(policy, inputs, seed=3), predict(policy, inputs, seed=3))


def test_prediction_leaves_the_global_random_state_alone(policy):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    predict(policy, observation_inputs(policy.config))
    assert torch.equal(torch.rand(3), expected)


def test_pipeline_of_a_policy_in_training_predicts_as_in_evaluation(policy, processor_of):
    config = policy.config
    processor = processor_of(config)
    pipeline = PolicyPipeline(model=policy, processor=processor, device="cpu")
    observation, task = example_request(pipeline, 2)
    draws = config.example_draws(2)

    def chunk():
        torch.manual_seed(0)
        return pipeline.predict_chunk(observation, task and ["push the red button"] * 2, **draws)

    expected = chunk()
    policy.train()
    modes = {name: module.training for name, module in policy.named_modules()}
    with torch.inference_mode():  # nothing that is cached inside may be in the way of training
        assert torch.equal(chunk(), expected)
    assert {name: module.training for name, module in policy.named_modules()} == modes
    policy(**config.example_inputs(2)).loss.backward()


def refused_instruction(policy, processor, task):
    with pytest.raises(FeatureValueError) as caught:
        processor.encode_instruction(task, 1, {})
    return str(caught.value)


def test_instructions_are_not_ignored(policy, processor_of, caplog, monkeypatch):
    """Other tokens than the network's, no words, unknown ones and too many are refused or said."""
    if not policy.config.reads_instruction:
        return
    processor = processor_of(policy.config)
    for task in ("", "  ", ["\n"]):
        assert "The instruction is empty" in refused_instruction(policy, processor, task)
    for task in (3, [None], b"push"):
        assert "An instruction is a str" in refused_instruction(policy, processor, task)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    state = torch.zeros(2, policy.config.model_state_dim or 1)
    for _ in range(2):  # said once
        processor.instruction.tokens(["push the rde button", "push the red button"], 2, {"state": state})
    assert caplog.text.count("'push the rde button' has words that the tokenizer does not know") == 1
    assert "It knows: button, push, red, the" in caplog.text and "'push the red button'" not in caplog.text
    processor.instruction.tokens("push " * 300, 1, {"state": state[:1]})
    assert f"it is cut to max_instruction_tokens={policy.config.max_instruction_tokens}" in caplog.text
    tokenizer = word_tokenizer([" ".join(f"word{i}" for i in range(70))])
    with pytest.raises(CheckpointError, match=r"has ids up to 7\d, the policy's language model \d\d tokens"):
        processor.tokenizer = tokenizer
        processor.check_agreement(policy.config)


def test_pictures_of_another_size(policy, processor_of):
    """They are resized where the policy does so with every picture, and refused elsewhere."""
    cameras, processor = policy.config.image_features, processor_of(policy.config)
    if not cameras:
        return
    pipeline = PolicyPipeline(model=policy, processor=processor, device="cpu")
    observation, task = example_request(pipeline, 1)
    name = next(iter(cameras))
    task = task and ["push the red button"]
    for shape in ((1, 3, 20, 46), (1, 46, 20, 3)):
        bigger = observation | {name: np.full(shape, 90, dtype=np.uint8)}
        if policy.config.resizes_pictures:
            if processor.pictures.resizes:
                pixels = processor(bigger, task=task)["pixel_values"]
                assert pixels.shape == processor(observation, task=task)["pixel_values"].shape
            assert torch.isfinite(pipeline.predict_chunk(bigger, task)).all()
        else:
            with pytest.raises(FeatureShapeError, match=name):
                pipeline.predict_chunk(bigger, task)


def test_embedding_of_the_language_model(policy):
    if policy.config.reads_instruction:
        embedding = policy.get_input_embeddings()
        assert embedding.num_embeddings == policy.config.vocabulary_size
        assert any(module is embedding for module in policy.modules())
    else:
        assert policy.get_input_embeddings() is None  # accelerate asks every policy that FSDP2 splits


def test_resized_vocabulary_is_saved_and_loaded(policy, tmp_path):
    """Or refused by name, with nothing changed: without a language model, or with one that learns no tokens."""
    before = policy.config.to_dict()
    reason = "a text encoder that is frozen" if policy.config.reads_instruction else "it has no language model"
    if not policy.config.reads_instruction or "diffusion_policy" in policy.config.model_type:
        with pytest.raises(InvalidConfigError, match=f"cannot be resized: {reason}"):
            policy.resize_token_embeddings(80)
        assert policy.config.to_dict() == before
        return
    rows = policy.config.vocabulary_size
    inputs, draws = observation_inputs(policy.config), policy.config.example_draws(2)
    expected = policy.predict_action_chunk(**inputs, **draws)
    assert policy.resize_token_embeddings() is policy.get_input_embeddings()
    assert policy.config.to_dict() == before
    assert policy.resize_token_embeddings(rows + 5, pad_to_multiple_of=8).num_embeddings == rows + 8
    assert policy.config.vocabulary_size == rows + 8
    assert torch.equal(policy.predict_action_chunk(**inputs, **draws), expected)
    inputs["input_ids"][:, -1] = rows + 7  # a new token
    expected = policy.predict_action_chunk(**inputs, **draws)
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path)
    assert loaded.config.vocabulary_size == loaded.get_input_embeddings().num_embeddings == rows + 8
    assert torch.equal(loaded.predict_action_chunk(**inputs, **draws), expected)
    assert loaded.config.name_or_path == str(tmp_path)
    loaded.resize_token_embeddings(rows + 16)
    assert loaded.config.name_or_path == ""  # it is no longer that checkpoint


def test_executed_actions_are_by_default_all_that_can_be(case):
    config = case.config()
    if config.model_type == "diffusion_policy":  # whose number has no such default
        with pytest.raises(InvalidConfigError, match="n_action_steps"):
            config.n_action_steps = None
        return
    config.n_action_steps = 1
    config.n_action_steps = None
    assert config.n_action_steps == config.action_horizon
    config.validate()


def test_inputs_are_not_changed(policy):
    inputs = policy.config.example_inputs(2)
    before = copy.deepcopy(inputs)
    policy.train()(**inputs).loss.backward()
    for name in inputs:
        for a, b in zip(inputs[name], before[name], strict=True):
            assert torch.equal(a, b), name


def test_dropout_is_off_in_evaluation_and_on_in_training(policy):
    """With everything given that can be; without, training draws anew at every step."""
    inputs = policy.config.example_inputs(2)
    given = inputs | policy.config.example_draws(2, training=True)
    assert torch.equal(policy(**given).loss, policy(**given).loss)
    policy.train()
    if any(isinstance(module, torch.nn.Dropout) and module.p for module in policy.modules()):
        assert not torch.equal(policy(**given).loss, policy(**given).loss)
    assert not torch.equal(policy(**inputs).loss, policy(**inputs).loss)


def test_runs_in_bfloat16(policy):
    policy.to(torch.bfloat16)
    inputs = {
        name: mapped(value, lambda x: x.to(torch.bfloat16) if x.is_floating_point() else x)
        for name, value in policy.config.example_inputs(2).items()
    }
    assert predict(policy, inputs).dtype == torch.bfloat16
    loss = policy.train()(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_weights_in_bfloat16_read_batches_in_float32(policy):
    policy.to(torch.bfloat16)
    inputs = policy.config.example_inputs(2)
    assert predict(policy, inputs).dtype == torch.bfloat16
    loss = policy.train()(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_compiles_as_one_graph(graph_case, build):
    torch._dynamo.reset()
    policy = build(graph_case)
    inputs = observation_inputs(policy.config) | policy.config.example_draws(2)
    compiled = torch.compile(policy.predict_action_chunk, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs), policy.predict_action_chunk(**inputs))


def test_exports(graph_case, build):
    policy = build(graph_case)
    inputs = observation_inputs(policy.config) | policy.config.example_draws(2)
    program = torch.export.export(policy, (), inputs)
    torch.testing.assert_close(program.module()(**inputs).actions, policy(**inputs).actions)


# --- speed ------------------------------------------------------------------------------------------------


def test_fused_policy_predicts_the_same(policy, tmp_path):
    """Where a policy has nothing to join, nothing happens; what is saved is in any case what was loaded."""
    inputs, before = observation_inputs(policy.config), {n: x.clone() for n, x in policy.state_dict().items()}
    expected = predict(policy, inputs)
    torch.testing.assert_close(predict(policy.fuse(), inputs), expected, atol=1e-5, rtol=1e-5)
    policy.save_pretrained(tmp_path)
    reloaded = AutoPolicy.from_pretrained(tmp_path)
    assert reloaded.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in reloaded.state_dict().items())
    assert torch.equal(predict(reloaded, inputs), expected)


# --- training ---------------------------------------------------------------------------------------------


def test_gradients_reach_every_trained_parameter(case, policy):
    policy.train()(**policy.config.example_inputs(4)).loss.backward()
    norms = {
        name: 0.0 if parameter.grad is None else parameter.grad.norm().item()
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    }
    untouched = {name for name, norm in norms.items() if norm <= 1e-7 * max(norms.values())}
    assert untouched == case.untrained


def test_loss_goes_down(policy):
    inputs = policy.config.example_inputs(2)
    optimizer = torch.optim.Adam(policy.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss = policy(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_padded_actions_change_neither_loss_nor_gradients(policy):
    """Whatever finite numbers stand there: NaN the processor refuses, padded or not."""
    inputs = policy.config.example_inputs(3)
    inputs["action_is_pad"][0, 2:] = True
    inputs["action_is_pad"][2, 4:] = True
    results = []
    for garbage in (0.0, 1e4):
        actions = inputs["actions"].masked_fill(inputs["action_is_pad"][:, :, None], garbage)
        policy.train().zero_grad()
        torch.manual_seed(0)
        loss = policy(**inputs | {"actions": actions}).loss
        loss.backward()
        results.append(
            (loss.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad})
        )
    (loss, expected), (garbage_loss, found) = results
    torch.testing.assert_close(garbage_loss, loss, atol=1e-6, rtol=1e-6)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_padded_steps_do_not_dilute_the_loss(policy):
    """Two half-padded samples weigh as much per real step as one without padding."""
    inputs = policy.config.example_inputs(2) | policy.config.example_draws(2, training=True)
    inputs["action_is_pad"][1] = True
    torch.testing.assert_close(policy(**inputs).loss, policy(**sample(inputs, 0)).loss, atol=1e-5, rtol=1e-5)


def test_batches_of_a_step_are_weighed_as_one_mean(policy):
    """Three batches with 4, 1 and all real steps give the loss and the gradients of one batch of all three."""
    inputs = policy.config.example_inputs(3) | policy.config.example_draws(3, training=True)
    inputs["action_is_pad"][0, 4:] = True
    inputs["action_is_pad"][1, 1:] = True
    batches = [sample(inputs, i) for i in range(3)]
    mean = GlobalMean(Accelerator(cpu=True))
    mean.begin(policy, batches)

    def gradients(batches_of_step, weigh):
        policy.zero_grad()
        losses = [weigh(batch, policy(**batch)) / len(batches_of_step) for batch in batches_of_step]
        sum(losses).backward()
        return sum(losses).detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    loss, expected = gradients([inputs], lambda batch, output: output.loss)
    found_loss, found = gradients(
        batches, lambda batch, output: mean.loss(policy, batch, output.loss, output.losses)[0]
    )
    torch.testing.assert_close(found_loss, loss, atol=1e-6, rtol=1e-5)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3, msg=name)


# --- refusals ---------------------------------------------------------------------------------------------


def test_labels_of_another_shape_are_refused(policy):
    inputs = policy.config.example_inputs(2)
    actions = inputs["actions"]
    for wrong in (actions[:, 1:], actions[:, :, 1:], actions[0]):  # horizon, width, no batch
        inputs |= {"actions": wrong, "action_is_pad": torch.zeros(wrong.shape[:2], dtype=torch.bool)}
        for training in (False, True):
            with pytest.raises(FeatureShapeError, match="actions has shape"):
                policy.train(training)(**inputs)


def test_padding_of_another_shape_is_refused(policy):
    inputs = policy.config.example_inputs(2)
    inputs["action_is_pad"] = inputs["action_is_pad"][:, 1:]
    with pytest.raises(FeatureShapeError, match="action_is_pad"):
        policy.train()(**inputs)


@pytest.mark.parametrize("training", [False, True])
def test_draws_that_do_not_fit_are_refused(policy, training):
    """Of another shape, without a batch, of another dtype, NaN, no tensor: by name, before anything is computed."""
    config = policy.train(training).config
    inputs, draws = config.example_inputs(2) | {"return_loss": training}, config.example_draws(2, training)
    for name, value in draws.items():
        kind = bool if name in ("crop_offsets", "time") and not value.is_floating_point() else torch.int64
        for wrong in (value[..., :1, :-1] if value.ndim > 1 else value[:-1], value[0], torch.cat([value, value])):
            with pytest.raises(FeatureShapeError, match=f"^{name} has shape"):
                policy(**inputs | draws | {name: wrong})
        with pytest.raises(FeatureValueError, match=f"^{name} is torch"):
            policy(**inputs | draws | {name: value.to(kind)})
        if value.is_floating_point():
            broken = value.clone()
            broken.view(-1)[-1] = float("nan")
            with pytest.raises(FeatureValueError, match=f"^{name} holds NaN or infinity"):
                policy(**inputs | draws | {name: broken})
        elif name == "time":
            for wrong in (value - 100, value + 100):
                with pytest.raises(
                    FeatureValueError, match=r"^time=\[.*\] holds others than the timesteps from 0 to \d"
                ):
                    policy(**inputs | draws | {name: wrong})
        with pytest.raises(InvalidConfigError, match=f"^{name}="):
            policy(**inputs | draws | {name: value.tolist()})


def test_missing_inputs_are_named(policy):
    inputs = observation_inputs(policy.config)
    for name in inputs.keys() - {"pixel_mask"}:
        with pytest.raises(MissingFeatureError, match=name):
            policy.predict_action_chunk(**{n: value for n, value in inputs.items() if n != name})
        with pytest.raises(MissingFeatureError, match=name):
            policy(**inputs | {name: None})


def test_states_of_another_width_are_refused(policy):
    inputs = observation_inputs(policy.config)
    for name in NAMES.keys() & inputs.keys():
        with pytest.raises(FeatureShapeError, match=name):
            policy(**inputs | {name: inputs[name][..., 1:]})


def test_another_number_of_cameras_is_refused(policy):
    inputs = observation_inputs(policy.config)
    if "pixel_values" in inputs:
        views = inputs["pixel_values"]
        more = [*views, views[0]] if isinstance(views, list) else torch.cat([views, views], dim=-4)
        with pytest.raises(FeatureShapeError, match=next(iter(policy.config.image_features)).rpartition(".")[2]):
            policy(**inputs | {"pixel_values": more})


# --- saving and loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_reload_equals_to_the_bit(case, policy, processor_of, tmp_path, shards):
    weights = sum(tensor.nbytes for tensor in policy.state_dict().values())
    policy.save_pretrained(tmp_path, max_shard_size=weights // (2 * shards - 1) + 1)
    processor_of(policy.config).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if shards == 1 else len(list(tmp_path.glob("*-of-*"))) > 1
    inputs = observation_inputs(policy.config)
    expected = predict(policy, inputs)
    doors = {
        "class": type(policy).from_pretrained,
        "AutoPolicy": AutoPolicy.from_pretrained,
        "AutoModel": AutoModel.from_pretrained,
        "PolicyPipeline": lambda folder: PolicyPipeline.from_pretrained(folder, device="cpu").policy,
    }
    if shards > 1 and not case.complete:
        doors = {"AutoPolicy": doors["AutoPolicy"]}
    for door, load in doors.items():
        loaded = load(tmp_path)
        assert type(loaded) is type(policy), door
        assert not loaded.training, door
        assert torch.equal(predict(loaded, inputs), expected), door


def test_weights_that_are_no_numbers_are_not_saved(policy, tmp_path):
    name, weight = list(policy.named_parameters())[-1]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[-1] = float("inf")
    try:
        with pytest.raises(DivergedWeightsError, match="is not written") as error:
            policy.save_pretrained(tmp_path / "saved")
        assert name in error.value.not_finite
        assert not (tmp_path / "saved").exists()
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_every_buffer_and_parameter_survives_a_reload(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    loaded = AutoPolicy.from_pretrained(tmp_path)
    for kind in ("named_parameters", "named_buffers"):
        before, after = dict(getattr(policy, kind)()), dict(getattr(loaded, kind)())
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert not after[name].is_meta and torch.equal(after[name], value), name
            assert after[name].dtype == value.dtype, name


def test_types_of_weights_survive_a_reload(policy, tmp_path):
    """Also where a policy keeps a part of itself in float32."""
    policy.save_pretrained(tmp_path / "full")
    half = AutoPolicy.from_pretrained(tmp_path / "full", dtype=torch.bfloat16)
    assert torch.bfloat16 in {parameter.dtype for parameter in half.parameters()}
    half.save_pretrained(tmp_path / "half")
    again = AutoPolicy.from_pretrained(tmp_path / "half").state_dict()
    assert again.keys() == half.state_dict().keys()
    for name, value in half.state_dict().items():
        assert again[name].dtype == value.dtype and torch.equal(again[name], value), name


def test_fresh_buffers_are_filled(case):
    """What the constructor registers is what `post_init` leaves."""
    first, second = AutoPolicy.from_config(case.config()), AutoPolicy.from_config(case.config())
    for (name, a), (_, b) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all(), name


def test_camera_order_survives(policy, processor_of, tmp_path):
    cameras = list(policy.config.image_features)
    policy.save_pretrained(tmp_path)
    processor_of(policy.config).save_pretrained(tmp_path)
    for file in ("config.json", "processor_config.json"):
        saved = json.loads((tmp_path / file).read_text())["input_features"]
        assert list(saved) == list(policy.config.input_features), file
    pipeline = PolicyPipeline.from_pretrained(tmp_path, device="cpu")
    assert list(pipeline.policy.config.image_features) == cameras
    assert [name for name in pipeline.processor.input_features if name in cameras] == cameras


def test_config_survives_a_reload(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    config = type(policy.config).from_pretrained(tmp_path)
    assert config.to_dict() | {"architectures": None} == policy.config.to_dict() | {"architectures": None}
    assert config.input_features == policy.config.input_features
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 1


def test_two_builds_of_one_seed_are_equal(case, build_anew):
    first, second = build_anew(case).state_dict(), build_anew(case).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
