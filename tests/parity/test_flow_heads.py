"""InternManip's and NVIDIA's flow-matching heads give their numbers here, and have the published weights."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from manipulators import (
    FlowmatchingActionHead,
    FlowmatchingActionHead_1_5,
    FlowmatchingActionHeadConfig,
    FlowmatchingActionHeadConfig_1_5,
    load_published,
)
from manipulators.modeling.seam import Draws, Features, PolicyInputs

CASES = (
    "flow_head_n1_single",
    "flow_head_n1_5_future",
    "flow_head_n1_5_internmanip",
    "flow_head_n1_5_internmanip_expand",
)


@pytest.fixture(scope="module", params=CASES)
def golden(shared, request):
    """The head with the case's weights, what went in, what came out, and a comparison within its tolerance."""
    folder = shared / "golden" / request.param
    case = json.loads((folder / "case.json").read_text())
    weights, inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs"))
    if "n1_5" in request.param:
        # InternManip's code knows no future tokens.
        config = FlowmatchingActionHeadConfig_1_5(**({"num_target_vision_tokens": 0} | case["config"]))
        head = FlowmatchingActionHead_1_5(config)
    else:
        head = FlowmatchingActionHead(FlowmatchingActionHeadConfig(**case["config"]))
    load_published(head, weights)
    assert len(weights) == case["n_weight_tensors"]

    def close(found, name):
        torch.testing.assert_close(found, outputs[name], **case["tolerance"])

    features = {name: inputs[name] for name in ("backbone_features", "backbone_attention_mask")}
    given = {name: inputs[name] for name in ("state", "action", "action_mask", "embodiment_id")}
    return SimpleNamespace(
        head=head.eval(),
        config=head.config,
        times=case["config"].get("expand_batch") or 1,
        inputs=inputs,
        outputs=outputs,
        close=close,
        door=(features, given),
    )


def recorded(module, into, name, argument=None):
    """Append to `into[name]` what a module returns, or one of its positional arguments."""

    def record(_, arguments, output):
        into.setdefault(name, []).append(output if argument is None else arguments[argument])

    return module.register_forward_hook(record)


def test_every_step_of_a_loss(golden):
    head, inputs = golden.head, golden.inputs
    time = (golden.config.noise_s - inputs["beta_sample"]) / golden.config.noise_s
    golden.close(time, "time")
    seen = {}
    hooks = [
        recorded(head.state_encoder, seen, "state_features"),
        recorded(head.action_encoder, seen, "noisy_trajectory", argument=0),
        recorded(head.action_encoder, seen, "action_features_no_pos"),
        recorded(head.model, seen, "t_discretized", argument=2),
        recorded(head.model.timestep_encoder, seen, "dit_temb"),
        recorded(head.model.transformer_blocks[0], seen, "dit_block0_out"),
        recorded(head.model.transformer_blocks[1], seen, "dit_block1_out"),
        recorded(head.model, seen, "dit_out"),
    ]
    if "vlln_out" in golden.outputs:
        hooks.append(recorded(head.vlln, seen, "vlln_out"))
        hooks.append(recorded(head.vl_self_attention, seen, "vl_self_attention_out"))
    with torch.no_grad():
        found = head(*golden.door, noise=inputs["noise"], time=time)
    for hook in hooks:
        hook.remove()
    for name, (value,) in seen.items():
        golden.close(value, name)
    # Only what the actions need is decoded; the reference decodes every token.
    ids = inputs["embodiment_id"].repeat(golden.times)
    golden.close(head.action_decoder(seen["dit_out"][0], ids), "decoder_out")
    golden.close(found["loss"].reshape(1), "loss")
    golden.close(found["predictions"], "pred_velocity")


def test_every_step_of_sampling(golden):
    head = golden.head
    seen = {}
    hooks = [
        recorded(head.action_encoder, seen, "actions", argument=0),
        recorded(head.model.timestep_encoder, seen, "timesteps", argument=0),
    ]
    found = head.get_action(*golden.door, noise=golden.inputs["inference_init_noise"])
    for hook in hooks:
        hook.remove()
    golden.close(torch.stack(seen["actions"]), "inference_actions_before_each_step")
    (timesteps,) = seen["timesteps"]  # encoded once, for all steps and samples
    assert torch.equal(timesteps[:, None].expand(4, len(found.action_pred)), golden.outputs["inference_timesteps"])
    golden.close(found.action_pred, "action_pred")


def test_steps_of_sampling_predict_what_training_does(golden):
    """Sampling caches what the loss computes anew: keys and values, modulations."""
    head, inputs = golden.head, golden.inputs
    features, ids, times = Features(inputs["backbone_features"]), inputs["embodiment_id"], golden.times
    observation = PolicyInputs(state=inputs["state"], embodiment_id=ids)
    x, state = inputs["inference_init_noise"], inputs["state"].view(len(ids), 1, -1)
    prepared = head.prepare(features.tokens, None, state, ids, torch.tensor([0, 333, 666]))
    with torch.no_grad():
        for i in range(3):
            noise, time = x.repeat(times, 1, 1) / (1 - i / 3), torch.full((len(x) * times,), i / 3)
            velocity, _ = head.velocity(features, observation, inputs["action"], Draws(noise, time))
            mixed = x + i / 3 * inputs["action"]
            torch.testing.assert_close(head.step(mixed, prepared.at(i)), velocity[: len(x)], atol=1e-5, rtol=1e-5)


def published_head(version: str):
    """Return the published model's head, on no device."""
    transformer = {
        "attention_head_dim": 48,
        "dropout": 0.2,
        "final_dropout": True,
        "interleave_self_attention": True,
        "norm_type": "ada_norm",
        "num_attention_heads": 32,
        "num_layers": 16,
        "output_dim": 1024,
        "positional_embeddings": None,
    }
    common = {
        "action_dim": 32,
        "action_horizon": 16,
        "add_pos_embed": True,
        "hidden_size": 1024,
        "input_embedding_dim": 1536,
        "max_action_dim": 32,
        "max_state_dim": 64,
        "model_dtype": "float32",
        "noise_beta_alpha": 1.5,
        "noise_beta_beta": 1.0,
        "noise_s": 0.999,
        "num_timestep_buckets": 1000,
        "tune_projector": True,
        "tune_diffusion_model": True,
    }
    with torch.device("meta"):
        if version == "n1":
            config = FlowmatchingActionHeadConfig(
                diffusion_model_cfg=transformer, num_inference_timesteps=16, **common
            )
            return FlowmatchingActionHead(config)
        vl = {
            "attention_head_dim": 64,
            "dropout": 0.2,
            "final_dropout": True,
            "num_attention_heads": 32,
            "num_layers": 4,
            "positional_embeddings": None,
        }
        config = FlowmatchingActionHeadConfig_1_5(
            backbone_embedding_dim=2048,
            diffusion_model_cfg=transformer | {"cross_attention_dim": 2048},
            num_inference_timesteps=4,
            num_target_vision_tokens=32,
            use_vlln=True,
            vl_self_attention_cfg=vl,
            **common,
        )
        return FlowmatchingActionHead_1_5(config)


def shapes(head):
    return {f"action_head.{name}": list(value.shape) for name, value in head.state_dict().items()}


@pytest.mark.parametrize("version", ["n1", "n1_5"])
def test_published_names_and_shapes(shared, version):
    table = json.loads((shared / "specs" / f"gr00t_{version}_keys.json").read_text())
    expected = {name: shape for name, shape in table.items() if name.startswith("action_head.")}
    assert len(expected) == {"n1": 247, "n1_5": 314}[version]
    assert shapes(published_head(version)) == expected


def test_defaults_are_the_published_models():
    with torch.device("meta"):
        n1 = FlowmatchingActionHead(FlowmatchingActionHeadConfig())
        n1_5 = FlowmatchingActionHead_1_5(FlowmatchingActionHeadConfig_1_5(backbone_embedding_dim=2048))
    assert shapes(n1) == shapes(published_head("n1"))
    assert shapes(n1_5) == shapes(published_head("n1_5"))
