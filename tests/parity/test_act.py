"""LeRobot 0.6.1's ACT checkpoints give LeRobot's numbers, and nothing of them is loaded half."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from manipulators import ACTActionHead, ACTBackbone, ACTPolicy, AutoPolicy, PolicyPipeline, load_published
from manipulators.auto import load_policy_and_processor
from manipulators.conversion.act import rename_act_weights
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    MissingFileError,
    MissingStatisticsError,
    UnknownPolicyError,
    WeightsMismatchError,
)

CASES = ("act_vae_2cam_tiny", "act_prenorm_novae", "act_envstate")
WEIGHTS = "model.safetensors"
STATISTICS = "policy_preprocessor_step_3_normalizer_processor.safetensors"
ACTION_STATISTICS = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def close(found, expected, atol=2e-5, rtol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


@pytest.fixture(scope="module", params=CASES)
def golden(request, shared):
    """A golden case: its folder, inputs and outputs by group, and the policy and processor loaded from it."""
    folder = shared / "golden" / request.param
    arrays = {kind: load_file(folder / f"{kind}.safetensors") for kind in ("inputs", "outputs")}

    def group(kind: str, *prefixes: str) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(f"{prefix}/"): value
            for prefix in prefixes
            for name, value in arrays[kind].items()
            if name.startswith(f"{prefix}/")
        }

    policy, processor = load_policy_and_processor(folder / "checkpoint")
    return SimpleNamespace(
        checkpoint=folder / "checkpoint",
        case=json.loads((folder / "case.json").read_text()),
        inputs=lambda *prefixes: group("inputs", *prefixes),
        outputs=arrays["outputs"],
        policy=policy.eval(),
        processor=processor,
    )


@pytest.fixture
def training(golden):
    """One training step on the golden's batch, gradients included; the policy is back in eval mode afterwards."""
    raw = golden.inputs("train", "train_u8")
    noise = raw.pop("eps", None)
    batch = golden.processor(raw, actions=raw["action"], action_is_pad=raw["action_is_pad"])
    golden.policy.zero_grad()
    output = golden.policy.train()(**batch, noise=noise)
    output.loss.backward()
    yield SimpleNamespace(batch=batch, noise=noise, output=output)
    golden.policy.eval()


# --- prediction -------------------------------------------------------------------------------------------


def test_loads_as_act(golden):
    assert type(AutoPolicy.from_pretrained(golden.checkpoint)) is ACTPolicy
    assert sum(p.numel() for p in golden.policy.parameters()) == golden.case["n_params"]


def test_normalized_inputs(golden):
    found = golden.processor(golden.inputs("chunk"))
    names = {"observation.state": "state", "observation.environment_state": "environment_state"}
    cameras = list(golden.policy.config.image_features)
    expected = {n.removeprefix("chunk_norm/"): v for n, v in golden.outputs.items() if n.startswith("chunk_norm/")}
    assert set(expected) == set(golden.policy.config.input_features)
    for name, value in expected.items():
        x = found["pixel_values"][:, cameras.index(name)] if name in cameras else found[names[name]]
        close(x[: len(value)], value)


@pytest.mark.parametrize("images", ["chunk", "chunk_u8"])
def test_chunk(golden, images):
    """From float CHW images, and from the same as uint8 HWC."""
    observation = golden.inputs("chunk", images)
    chunk = golden.policy.predict_action_chunk(**golden.processor(observation))
    close(chunk, golden.outputs["chunk/action_norm"])
    close(golden.processor.decode_actions(chunk), golden.outputs["chunk/action"])


def test_select_action(golden):
    pipeline = PolicyPipeline(model=golden.policy, processor=golden.processor, device="cpu")
    rows = golden.inputs("select", "select_u8")
    actions = [pipeline({name: value[step] for name, value in rows.items()}) for step in range(12)]
    close(torch.stack(actions), golden.outputs["select/action"])


def test_features_and_positions(golden):
    inputs = golden.processor(golden.inputs("chunk"))
    latent = torch.zeros(2, golden.policy.config.latent_dim)
    backbone, head = golden.policy.backbone, golden.policy.action_head
    seen = {}
    handle = head.decoder.register_forward_hook(lambda module, args, output: seen.update(decoder_out=output))
    with torch.no_grad():
        close(backbone.encoder_latent_input_proj(latent), golden.outputs["debug/latent_in"])
        features, positions = backbone.encode_features(inputs, latent, return_positions=True)
        head.decode_actions(features, 2, "cpu", positions)
        handle.remove()
        close(features, golden.outputs["debug/encoder_out"])
        close(seen["decoder_out"].transpose(0, 1), golden.outputs["debug/decoder_out"])
        if golden.policy.config.image_features:
            feature_map = backbone.encode_images(inputs["pixel_values"])[0]
            close(feature_map, golden.outputs["debug/cam0_feat"])
            _, d, h, w = feature_map.shape
            vectors = len(backbone.encoder_1d_feature_pos_embed.weight)
            pixels = positions[vectors : vectors + h * w, 0].T.reshape(1, d, h, w)
            close(pixels, golden.outputs["debug/cam0_pos"])


# --- training ---------------------------------------------------------------------------------------------


def test_training_loss_and_its_parts(golden, training):
    outputs = golden.outputs
    close(training.output.loss, outputs["train/loss"])
    close(training.output.losses["l1"], outputs["train/l1_loss"])
    close(training.output.actions, outputs["train/pred"])
    close(training.batch["actions"], outputs["train/action_norm"])
    assert ("kl" in training.output.losses) == ("train/kld_loss" in outputs)
    if "train/kld_loss" in outputs:
        close(training.output.losses["kl"], outputs["train/kld_loss"])
        _, mu, log_sigma_x2 = golden.policy.action_head.encode_latent(training.batch, training.noise)
        close(mu, outputs["train/mu"])
        close(log_sigma_x2, outputs["train/log_sigma_x2"])


def test_gradients(golden, training):
    expected = rename_act_weights(golden.case["grad_norms"])
    found = {name: p.grad.norm().item() for name, p in golden.policy.named_parameters()}
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        assert found[name] == pytest.approx(norm, rel=1e-3, abs=2e-6), name
    total = torch.nn.utils.get_total_norm([p.grad for p in golden.policy.parameters()])
    close(total, golden.outputs["train/grad_norm"])


def test_evaluation_loss(golden, training):
    close(golden.policy.eval()(**training.batch).loss, golden.outputs["eval/loss"])


# --- converting -------------------------------------------------------------------------------------------


def test_saved_as_ours_it_predicts_the_same_to_the_bit(golden, tmp_path):
    observation = golden.inputs("chunk")
    pipeline = PolicyPipeline.from_pretrained(golden.checkpoint, device="cpu")
    pipeline.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "processor_config.json"} <= {p.name for p in tmp_path.iterdir()}
    reloaded = PolicyPipeline.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(reloaded.predict_chunk(observation), pipeline.predict_chunk(observation))
    for kind in ("input_features", "output_features", "statistics", "normalization_mapping", "normalization_eps"):
        assert getattr(reloaded.processor, kind) == getattr(pipeline.processor, kind), kind


def test_published_weights_are_read_in_float32(golden):
    assert golden.policy.dtype == torch.float32
    assert AutoPolicy.from_pretrained(golden.checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_fields_can_be_overridden(golden):
    policy = AutoPolicy.from_pretrained(golden.checkpoint, n_action_steps=1, temporal_ensemble_coeff=0.01)
    assert (policy.config.n_action_steps, policy.config.temporal_ensemble_coeff) == (1, 0.01)


@pytest.mark.parametrize("part", [ACTPolicy, ACTBackbone, ACTActionHead])
def test_load_published_fills_policy_and_components(golden, part):
    weights = load_file(golden.checkpoint / WEIGHTS)
    module = load_published(part(golden.policy.config), weights)
    trained = {ACTPolicy: golden.policy, ACTBackbone: golden.policy.backbone, ACTActionHead: golden.policy.action_head}
    expected = trained[part].state_dict()
    assert module.state_dict().keys() == expected.keys()
    for name, value in module.state_dict().items():
        close(value.float(), expected[name], atol=0, rtol=0)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def published(shared, tmp_path):
    """A copy of a published checkpoint to break."""
    source = shared / "golden" / "act_vae_2cam_tiny" / "checkpoint"
    folder = shutil.copytree(source, tmp_path / "published")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def our_name(name):
    return next(iter(rename_act_weights({name: 0})))


def test_every_published_tensor_is_needed_by_the_whole_checkpoint(published, break_all):
    weights = load_file(published / WEIGHTS)
    # The config is completed from the sizes of the trunk's convolutions: of them, some are broken one by one.
    sizes = {name: x for name, x in weights.items() if name.startswith("model.backbone.") and x.ndim == 4}
    others = {name: value for name, value in weights.items() if name not in sizes}

    def refusal(broken):
        save_file(broken, published / WEIGHTS)
        with pytest.raises(CheckpointError) as caught:
            PolicyPipeline.from_pretrained(published)
        assert isinstance(caught.value, WeightsMismatchError)
        return caught.value

    for turn in range(4):
        broken = break_all(others, turn, our_name)
        broken.check(refusal(sizes | broken.found))
    for name in ("model.backbone.layer2.0.conv2.weight", "model.backbone.layer3.0.conv1.weight"):
        for broken in (
            {n: v for n, v in weights.items() if n != name},
            {name + "_old" if n == name else n: v for n, v in weights.items()},
            weights | {name: torch.zeros(*weights[name].shape, 2)},
        ):
            assert our_name(name) in str(refusal(broken)), name


@pytest.mark.parametrize("part", [ACTPolicy, ACTBackbone, ACTActionHead])
def test_load_published_needs_every_tensor(golden, break_all, part):
    weights = load_file(golden.checkpoint / WEIGHTS)
    module = part(golden.policy.config)
    prefix = {ACTPolicy: "", ACTBackbone: "backbone.", ACTActionHead: "action_head."}[part]
    own = {name: value for name, value in weights.items() if our_name(name).startswith(prefix)}
    siblings = {name: value for name, value in weights.items() if name not in own}
    assert len(own) == len(module.state_dict())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for turn in range(4):
        broken = break_all(own, turn, lambda name: our_name(name).removeprefix(prefix))
        with pytest.raises(WeightsMismatchError) as caught:
            load_published(module, siblings | broken.found)
        broken.check(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("part", [ACTPolicy, ACTBackbone, ACTActionHead])
def test_load_published_refuses_strays(golden, part):
    weights = load_file(golden.checkpoint / WEIGHTS) | {"model.stray.weight": torch.zeros(1)}
    with pytest.raises(WeightsMismatchError, match=r"stray\.weight"):
        load_published(part(golden.policy.config), weights)


@pytest.mark.parametrize(
    "file",
    [WEIGHTS, STATISTICS, ACTION_STATISTICS, "policy_preprocessor.json", "policy_postprocessor.json", "config.json"],
)
def test_missing_file(published, file):
    (published / file).unlink()
    with pytest.raises(MissingFileError, match=file.partition("_step")[0]):
        PolicyPipeline.from_pretrained(published)


@pytest.mark.parametrize(
    "file",
    [WEIGHTS, STATISTICS, ACTION_STATISTICS, "policy_preprocessor.json", "policy_postprocessor.json", "config.json"],
)
def test_truncated_file(published, file):
    content = (published / file).read_bytes()
    (published / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match=file):
        PolicyPipeline.from_pretrained(published)


@pytest.mark.parametrize("text", ["[]", "{}", '{"steps": 3}', '{"steps": [{}]}'])
@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_processor_json_of_another_form(published, file, text):
    (published / file).write_text(text)
    with pytest.raises(CheckpointError, match=file):
        PolicyPipeline.from_pretrained(published)


@pytest.mark.parametrize("key", ["observation.state.mean", "observation.images.wrist_left.std"])
def test_missing_observation_statistics(published, key):
    statistics = load_file(published / STATISTICS)
    del statistics[key]
    save_file(statistics, published / STATISTICS)
    with pytest.raises(MissingStatisticsError, match=key.rpartition(".")[0]):
        PolicyPipeline.from_pretrained(published)


@pytest.mark.parametrize("files", [(ACTION_STATISTICS,), (STATISTICS,), (STATISTICS, ACTION_STATISTICS)])
def test_missing_action_statistics(published, files):
    for file in files:
        statistics = load_file(published / file)
        del statistics["action.std"]
        save_file(statistics, published / file)
    with pytest.raises((MissingStatisticsError, CheckpointError), match="action"):
        PolicyPipeline.from_pretrained(published)


def test_actions_normalised_one_way_and_back_another(published):
    statistics = load_file(published / ACTION_STATISTICS)
    statistics["action.mean"] = statistics["action.mean"] + 1
    save_file(statistics, published / ACTION_STATISTICS)
    with pytest.raises(CheckpointError, match="un-normalises actions with different mean"):
        PolicyPipeline.from_pretrained(published)


def test_unknown_policy_type(published):
    edit_json(published / "config.json", lambda config: config.update(type="acct"))
    for load in (AutoPolicy.from_pretrained, PolicyPipeline.from_pretrained):
        with pytest.raises(UnknownPolicyError, match=r"'acct'\. Did you mean 'act'"):
            load(published)


@pytest.mark.parametrize("field", ["input_features", "output_features"])
def test_config_without_features(published, field):
    edit_json(published / "config.json", lambda config: config.pop(field))
    with pytest.raises((CheckpointError, ValueError), match=field):
        PolicyPipeline.from_pretrained(published)


def test_config_of_wider_actions(published):
    edit_json(published / "config.json", lambda c: c["output_features"]["action"].update(shape=[9]))
    with pytest.raises(WeightsMismatchError, match=r"action_head\.action_head\.weight: found \(6, 32\), expected \(9"):
        PolicyPipeline.from_pretrained(published)


def test_statistics_are_found_through_state_file_only(published):
    """The step's index and the file's name may differ, as in migrated checkpoints."""
    renamed = "policy_preprocessor_step_1_normalizer_processor.safetensors"
    (published / STATISTICS).rename(published / renamed)

    def move(values):
        values["steps"].insert(1, values["steps"].pop(3) | {"state_file": renamed})

    edit_json(published / "policy_preprocessor.json", move)
    _, processor = load_policy_and_processor(published)
    stored = load_file(published / renamed)["observation.state.mean"]
    assert processor.statistics["observation.state"]["mean"] == stored.tolist()


def test_state_file_stays_inside_the_folder(published, tmp_path):
    shutil.copy(published / STATISTICS, tmp_path / "outside.safetensors")
    edit_json(
        published / "policy_preprocessor.json",
        lambda values: values["steps"][3].update(state_file="../outside.safetensors"),
    )
    with pytest.raises(MissingFileError, match=r"outside\.safetensors"):
        PolicyPipeline.from_pretrained(published)


def test_renamed_observations(published, shared):
    edit_json(
        published / "policy_preprocessor.json",
        lambda v: v["steps"][0]["config"].update(rename_map={"observation.images.hand": "observation.images.top"}),
    )
    inputs = load_file(shared / "golden" / "act_vae_2cam_tiny" / "inputs.safetensors")
    names = ("observation.images.top", "observation.images.wrist_left", "observation.state")
    observation = {name: inputs[f"chunk/{name}"] for name in names}
    observation["observation.images.hand"] = observation.pop("observation.images.top")
    expected = load_file(shared / "golden" / "act_vae_2cam_tiny" / "outputs.safetensors")["chunk/action"]
    close(PolicyPipeline.from_pretrained(published, device="cpu").predict_chunk(observation), expected)
