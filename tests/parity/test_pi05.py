"""LeRobot's π0.5 (0.6.1, in float32) gives its numbers here: the network alone, and a whole checkpoint."""

import json
import runpy
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from manipulators import PI05FlowMatching, PI05Policy, PI05PolicyConfig, PolicyPipeline
from manipulators.conversion.pi0 import rename_pi0_weights
from manipulators.errors import CheckpointError, WeightsMismatchError

PI0 = runpy.run_path(str(Path(__file__).parent / "test_pi0.py"))
VARIANTS, close = PI0["VARIANTS"], PI0["close"]
network, sampler = PI0["network"], PI0["sampler"]  # fixtures: what `core` builds, with every switch that there is


@pytest.fixture(scope="module")
def core(shared):
    """Inputs and outputs of LeRobot's network, and a function that builds ours with its weights."""
    folder = shared / "golden" / "pi05_core"
    case = json.loads((folder / "case.json").read_text())["config"]
    weights, inputs, outputs = (load_file(folder / f"{x}.safetensors") for x in ("weights", "inputs", "outputs"))
    config = PI05PolicyConfig(
        **PI0["sizes"](case),
        **PI0["FEATURES"],
        image_resolution=(28, 28),
        chunk_size=case["chunk_size"],
        max_state_dim=case["max_state_dim"],
        max_action_dim=case["max_action_dim"],
        max_instruction_tokens=7,
    )

    def build(attention="eager"):
        config.attention_implementation = attention
        network = PI05FlowMatching(config)
        renamed = {name.removeprefix("model."): x for name, x in rename_pi0_weights(weights).items()}
        network.load_state_dict(renamed)
        return network.eval()

    def observation(variant: str) -> tuple:
        images = [inputs[f"images.{i}"] for i in range(3)]
        masks = [inputs[f"{variant}.img_masks.{i}"] for i in range(3)]
        return images, masks, inputs["lang_tokens"], inputs[f"{variant}.lang_masks"], None

    labels = tuple(inputs[name] for name in ("actions", "noise", "time"))
    return SimpleNamespace(build=build, config=config, observation=observation, labels=labels, outputs=outputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens(core, network, variant):
    images, masks, tokens, real, _ = core.observation(variant)
    actions, noise, time = core.labels
    with torch.no_grad():
        prefix, mask = network.embed_prefix(images, masks, tokens, real)
        close(prefix, core.outputs[f"{variant}.prefix_embs"])
        assert torch.equal(mask, core.outputs[f"{variant}.prefix_pad_masks"])
        noisy = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
        close(network.embed_suffix(None, noisy, time), core.outputs[f"{variant}.suffix_embs"])
        close(network.embed_condition(time), core.outputs[f"{variant}.adarms_cond"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_velocity_and_loss(core, network, variant, monkeypatch):
    actions, noise, time = core.labels
    found = []
    velocity = network._velocity
    monkeypatch.setattr(network, "_velocity", lambda x: found.append(velocity(x)) or found[-1])
    with torch.no_grad():
        loss = network(*core.observation(variant), actions, noise, time)
    close(found[0], core.outputs[f"{variant}.velocity"])
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
    actions = sampler.sample_actions(*core.observation(variant), noise=core.labels[1], num_steps=steps)
    close(actions, core.outputs[f"{variant}.sampled_{steps}"])


def test_modulations_are_computed_once_per_chunk(core):
    """Of all steps in one pass of each linear layer that reads the time: two of the time itself, 7 of the norms."""
    network, rows = core.build(), Counter()
    parts = (network.time_mlp_in, network.time_mlp_out, *network.paligemma_with_expert.expert_modulation.modules())
    linears = [part for part in parts if isinstance(part, torch.nn.Linear)]
    for linear in linears:
        linear.register_forward_hook(lambda layer, args, output: rows.update({id(layer): len(args[0])}))
    network.sample_actions(*core.observation("all_present"), noise=core.labels[1], num_steps=10)
    assert list(rows.values()) == [10] * 9 and len(linears) == 9


def test_gradients(core):
    """Every parameter that is trained has one, the same when layers are recomputed."""
    actions, noise, time = core.labels
    norms = []
    for recomputed in (False, True):
        network = core.build().train()
        for layer in network.paligemma_with_expert.layers:
            layer.gradient_checkpointing = recomputed
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        network(*core.observation("camera_and_lang_masked"), actions, noise, time).mean().backward()
        norms.append({name: p.grad.norm().item() for name, p in network.named_parameters() if p.requires_grad})
    # A bias of the keys adds the same to every score of a query.
    assert all(norm > 1e-6 for name, norm in norms[0].items() if not name.endswith("k_proj.bias"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5, abs=1e-8)


def test_weights_of_the_other_one_do_not_fit(core, shared):
    """π0's and π0.5's share most names; strict loading tells them apart."""
    weights = rename_pi0_weights(load_file(shared / "golden" / "pi0_core" / "weights.safetensors"))
    network = core.build()
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*time_mlp_in.*Unexpected.*state_proj"):
        network.load_state_dict({name.removeprefix("model."): x for name, x in weights.items()})


# --- a whole checkpoint -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(shared):
    """LeRobot's checkpoint folder, its inputs and outputs, and how it is loaded."""
    folder = shared / "golden" / "pi05_lerobot_ckpt"
    case = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    return SimpleNamespace(
        checkpoint=folder / "checkpoint",
        loading=PI0["sizes"](case["config"]) | {"tokenizer": folder / "tokenizer"},
        case=case,
        tasks=case["tasks"],
        inputs=inputs,
        observation={name: x for name, x in inputs.items() if name.startswith("observation.")},
        outputs=load_file(folder / "outputs.safetensors"),
    )


@pytest.fixture(scope="module")
def pipeline(golden):
    return PolicyPipeline.from_pretrained(golden.checkpoint, device="cpu", **golden.loading)


def test_prompts(golden, pipeline):
    """Bins of the normalised state, and the instruction without underscores and line breaks."""
    state = pipeline.processor(golden.observation, task=golden.tasks)["state"]
    assert pipeline.processor.instruction.prompts(golden.tasks, {"state": state}) == golden.case["prompts"]


def test_processed_inputs(golden, pipeline):
    found = pipeline.processor(golden.observation, task=golden.tasks, actions=golden.inputs["action"])
    for view in range(2):
        close(found["pixel_values"][:, view], golden.outputs[f"processed.images.{view}"], atol=1e-6)
    close(found["state"][:, :5], golden.outputs["processed.state"])
    close(found["actions"], golden.outputs["processed.action"])
    assert torch.equal(found["input_ids"], golden.outputs["processed.lang_tokens"])
    assert torch.equal(found["attention_mask"].bool(), golden.outputs["processed.lang_masks"])


@pytest.mark.parametrize("fused", [False, True])
def test_chunk(golden, pipeline, fused):
    if fused:
        pipeline = PolicyPipeline.from_pretrained(golden.checkpoint, device="cpu", **golden.loading)
        pipeline.policy.fuse()
    inputs = pipeline.processor(golden.observation, task=golden.tasks)
    normalised = pipeline.policy.predict_action_chunk(**inputs, noise=golden.inputs["noise"])
    close(normalised, golden.outputs["sampled"])
    close(normalised[..., :6], golden.outputs["chunk_normalized"])
    chunk = pipeline.predict_chunk(golden.observation, task=golden.tasks, noise=golden.inputs["noise"])
    close(chunk, golden.outputs["chunk"])


def test_queue_over_two_refills(golden, pipeline):
    """One robot, ten steps; four actions of each chunk are executed."""
    pipeline.reset()
    prefix, found = "select.observation.", []
    for step in range(10):
        names = [name for name in golden.inputs if name.startswith(prefix)]
        observation = {name.removeprefix("select."): golden.inputs[name][step] for name in names}
        noise = golden.inputs["select.noise"][step // 4][None]
        found.append(pipeline(observation, task=golden.case["select_task"], noise=noise))
    pipeline.reset()
    close(torch.stack(found), golden.outputs["select_action"])


def test_training_loss_and_gradients(golden):
    policy = PolicyPipeline.from_pretrained(golden.checkpoint, device="cpu", **golden.loading)
    policy, processor = policy.policy, policy.processor
    batch = processor(golden.observation, task=golden.tasks, actions=golden.inputs["action"])
    output = policy(**batch, **{name: golden.inputs[name] for name in ("noise", "time")})
    close(output.loss, golden.outputs["loss"][0])
    output.loss.backward()
    expected = rename_pi0_weights({name: torch.tensor(x) for name, x in golden.case["grad_norms"].items()})
    found = {name: p.grad.norm() for name, p in policy.named_parameters() if p.requires_grad}
    assert set(expected) - set(found) == {f"model.paligemma_with_expert.{PI0['UNUSED']}"}
    for name, norm in found.items():
        assert norm.item() == pytest.approx(expected[name].item(), rel=1e-3, abs=2e-6), name


def test_written_as_ours(golden, pipeline, tmp_path):
    """Tokenizer and sizes included: nothing else is needed to load it."""
    pipeline.save_pretrained(tmp_path)
    again = PolicyPipeline.from_pretrained(tmp_path, device="cpu")
    assert type(again.policy) is PI05Policy and again.processor.to_dict() == pipeline.processor.to_dict()
    chunk = again.predict_chunk(golden.observation, task=golden.tasks, noise=golden.inputs["noise"])
    close(chunk, golden.outputs["chunk"])


def test_a_pi0_file_is_refused(golden, shared, tmp_path):
    """Most names are the same: half of the network would be random."""
    for path in golden.checkpoint.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    other = shared / "golden" / "pi0_lerobot_ckpt" / "checkpoint" / "model.safetensors"
    shutil.copyfile(other, tmp_path / "model.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"time_mlp_in"):
        PolicyPipeline.from_pretrained(tmp_path, device="cpu", **golden.loading)


def test_a_preprocessor_without_the_state_is_refused(golden, tmp_path):
    for path in golden.checkpoint.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    steps = json.loads((tmp_path / "policy_preprocessor.json").read_text())
    steps["steps"] = [step for step in steps["steps"] if "prepare_state" not in step["registry_name"]]
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(steps))
    with pytest.raises(CheckpointError, match="lacks pi05_prepare_state_tokenizer_processor_step"):
        PolicyPipeline.from_pretrained(tmp_path, device="cpu", **golden.loading)
