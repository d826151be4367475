"""A folder as openpi's converter writes it: weights, statistics, and how its processor differs from LeRobot's."""

import json
import logging
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from manipulators import AutoPolicy, PI05Policy, PolicyPipeline
from manipulators.checkpoint import find_layout
from manipulators.errors import (
    CheckpointError,
    CorruptFileError,
    InvalidConfigError,
    MissingFileError,
    MissingStatisticsError,
)
from manipulators.processing.word_tokenizer import word_tokenizer

CONFIG = {
    "action_dim": 8,
    "action_horizon": 6,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "precision": "float32",
}
STATISTICS = {
    "norm_stats": {
        "state": {"mean": [1.0, 2.0, 3.0], "std": [2.0, 1.0, 4.0], "q01": [0.0] * 3, "q99": None},
        "actions": {"mean": [1.0, -1.0], "std": [10.0, 2.0], "q01": None, "q99": None},
    }
}
GEMMA = {"num_hidden_layers": 3, "head_dim": 16, "vocab_size": 320}
LOADING = {
    "image_resolution": (28, 28),
    "paligemma_config": {
        "projection_dim": 64,
        "text_config": GEMMA | {"hidden_size": 64, "intermediate_size": 96},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    },
    "gemma_expert_config": GEMMA | {"hidden_size": 32, "intermediate_size": 64},
}


def write_statistics(folder, asset_id, statistics=STATISTICS):
    (folder / "assets" / asset_id).mkdir(parents=True)
    (folder / "assets" / asset_id / "norm_stats.json").write_text(json.dumps(statistics))


@pytest.fixture
def checkpoint(shared, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(shared / "golden" / "pi0_core" / "weights.safetensors", tmp_path / "model.safetensors")
    write_statistics(tmp_path, "lab/franka")
    return tmp_path


@pytest.fixture
def tokenizer():
    return word_tokenizer(["press the button"])


def test_layout_is_told_by_its_fields():
    assert find_layout(CONFIG) is not None
    assert find_layout(CONFIG | {"model_type": "pi0_policy"}) is None
    assert find_layout({"action_dim": 8, "action_horizon": 6}) is None


def test_whole_checkpoint(checkpoint, tokenizer, shared):
    pipeline = PolicyPipeline.from_pretrained(checkpoint, device="cpu", tokenizer=tokenizer, **LOADING)
    policy, processor = pipeline.policy, pipeline.processor
    assert (policy.config.chunk_size, policy.config.max_action_dim) == (6, 8)
    assert processor.normalization_eps == 1e-6 and processor.clean_instructions
    observation = {
        "observation.images.base_0_rgb": torch.ones(3, 28, 28),
        "observation.state": torch.tensor([3.0, 2.0, 3.0]),
    }
    inputs = processor(observation, task="press_the button")
    torch.testing.assert_close(inputs["state"], torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]]))
    assert inputs["pixel_mask"].tolist() == [[True, False, False]]
    assert inputs["input_ids"].tolist() == processor(observation, task="press the button")["input_ids"].tolist()
    noise = torch.randn(1, 6, 8)
    normalised = policy.predict_action_chunk(**inputs, noise=noise)[0, :, :2]
    chunk = pipeline.predict_chunk(observation, task="press_the button", noise=noise)
    torch.testing.assert_close(chunk, normalised * torch.tensor([10.0, 2.0]) + torch.tensor([1.0, -1.0]))


def test_policy_alone_needs_no_tokenizer(checkpoint, shared):
    policy = AutoPolicy.from_pretrained(checkpoint, **LOADING)
    folder = shared / "golden" / "pi0_core"
    inputs, outputs = (load_file(folder / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    found = policy.predict_action_chunk(
        pixel_values=torch.stack([inputs[f"images.{i}"] for i in range(3)], dim=1),
        pixel_mask=torch.stack([inputs[f"camera_and_lang_masked.img_masks.{i}"] for i in range(3)], dim=1),
        input_ids=inputs["lang_tokens"],
        attention_mask=inputs["camera_and_lang_masked.lang_masks"],
        state=inputs["state"],
        noise=inputs["noise"],
    )
    torch.testing.assert_close(found, outputs["camera_and_lang_masked.sampled_10"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_precision(checkpoint, precision, dtype):
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"precision": precision}))
    policy = AutoPolicy.from_pretrained(checkpoint, **LOADING)
    assert policy.model.paligemma_with_expert.embed_tokens.weight.dtype == dtype


def test_statistics_of_several_robots(checkpoint):
    other = {"norm_stats": {"state": {"mean": [0.0] * 4}, "actions": {"mean": [0.0] * 5}}}
    write_statistics(checkpoint, "droid", other)
    with pytest.raises(CheckpointError, match=r"droid, lab/franka, and none is chosen.*asset_id='droid'"):
        AutoPolicy.from_pretrained(checkpoint, **LOADING)
    with pytest.raises(CheckpointError, match="there is no 'aloha'"):
        AutoPolicy.from_pretrained(checkpoint, asset_id="aloha", **LOADING)
    policy = AutoPolicy.from_pretrained(checkpoint, asset_id="droid", **LOADING)
    assert (policy.config.state_dim, policy.config.action_dim) == (4, 5)


def test_no_statistics(checkpoint):
    shutil.rmtree(checkpoint / "assets")
    with pytest.raises(MissingFileError, match=r"assets/<robot>/norm_stats\.json"):
        AutoPolicy.from_pretrained(checkpoint, **LOADING)


@pytest.mark.parametrize("statistics", [{}, {"norm_stats": {"state": {"mean": [0.0]}}}, {"norm_stats": 3}])
def test_broken_statistics(checkpoint, statistics):
    (checkpoint / "assets" / "lab" / "franka" / "norm_stats.json").write_text(json.dumps(statistics))
    with pytest.raises(CorruptFileError, match="norm_stats must hold state and actions"):
        AutoPolicy.from_pretrained(checkpoint, **LOADING)


@pytest.fixture
def pi05(checkpoint, shared):
    """π0.5's weights in the same folder: nothing else tells the two apart."""
    shutil.copy(shared / "golden" / "pi05_core" / "weights.safetensors", checkpoint / "model.safetensors")
    return checkpoint


def test_pi05_is_told_by_its_weights(pi05, tokenizer, shared):
    policy = AutoPolicy.from_pretrained(pi05, **LOADING)
    assert isinstance(policy, PI05Policy)
    folder = shared / "golden" / "pi05_core"
    inputs, outputs = (load_file(folder / f"{kind}.safetensors") for kind in ("inputs", "outputs"))
    found = policy.predict_action_chunk(
        pixel_values=torch.stack([inputs[f"images.{i}"] for i in range(3)], dim=1),
        pixel_mask=torch.stack([inputs[f"camera_and_lang_masked.img_masks.{i}"] for i in range(3)], dim=1),
        input_ids=inputs["lang_tokens"],
        attention_mask=inputs["camera_and_lang_masked.lang_masks"],
        state=torch.zeros(len(inputs["noise"]), 8),
        noise=inputs["noise"],
    )
    torch.testing.assert_close(found, outputs["camera_and_lang_masked.sampled_10"], atol=2e-5, rtol=1e-4)


def test_pi05_takes_quantiles_where_they_are(pi05, tokenizer, caplog, monkeypatch):
    """openpi adds 1e-6 to every range; without quantiles mean and deviation serve. The prompt is asked about."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load = partial(PolicyPipeline.from_pretrained, pi05, device="cpu", tokenizer=tokenizer, **LOADING)
    processor = load().processor
    assert "pi05_libero: prompt_state_dim=0" in caplog.text
    assert processor.normalization_mapping["STATE"] == "MEAN_STD" and processor.normalization_eps == 1e-6
    ranges = {"q01": [0.0, 1.0, 5.0], "q99": [1.0, 3.0, 5.0]}
    both = {
        "state": STATISTICS["norm_stats"]["state"] | ranges,
        "actions": STATISTICS["norm_stats"]["actions"] | {"q01": [0.0, 2.0], "q99": [4.0, 2.0]},
    }
    (pi05 / "assets" / "lab/franka" / "norm_stats.json").write_text(json.dumps({"norm_stats": both}))
    caplog.clear()
    processor = load(prompt_state_dim=None).processor
    assert not caplog.text
    state = processor.encode("observation.state", torch.tensor([[0.25, 2.0, 5.0]]))[:, :3]
    torch.testing.assert_close(state, torch.tensor([[-0.5 - 0.25e-6, 0.0, -1.0]]))
    actions = processor.decode_actions(torch.tensor([[0.5, 1.0, *[0.0] * 6]]))
    torch.testing.assert_close(actions, torch.tensor([[3.0, 2.000001]]))


def test_statistics_may_be_given(pi05, tokenizer):
    """In place of assets that nobody copied, and of some that are there."""
    given = {"observation.state": {"q01": [0.0] * 4, "q99": [1.0] * 4}, "action": {"q01": [0.0], "q99": [1.0]}}
    shutil.rmtree(pi05 / "assets")
    pipeline = PolicyPipeline.from_pretrained(pi05, device="cpu", tokenizer=tokenizer, statistics=given, **LOADING)
    assert (pipeline.policy.config.state_dim, pipeline.policy.config.action_dim) == (4, 1)
    with pytest.raises(MissingStatisticsError, match="needs those of action"):
        PolicyPipeline.from_pretrained(
            pi05, device="cpu", tokenizer=tokenizer, statistics={"observation.state": {"mean": [0.0]}}, **LOADING
        )


def test_weights_of_a_lora_training_are_refused(checkpoint):
    """openpi's converter leaves LoRA's weights out; the names of the variants are all that is left of them."""
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"paligemma_variant": "gemma_2b_lora"}))
    with pytest.raises(InvalidConfigError, match=r"gemma_2b_lora.*leaves LoRA's weights out.*write 'gemma_2b'"):
        AutoPolicy.from_pretrained(checkpoint, **LOADING)


def test_what_is_not_known_is_refused_by_name(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"pi05": False}))
    AutoPolicy.from_pretrained(checkpoint, **LOADING)
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"pi05": True}))
    with pytest.raises(InvalidConfigError, match="pi05=True, which this library does not know"):
        AutoPolicy.from_pretrained(checkpoint, **LOADING)
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    names = STATISTICS["norm_stats"] | {"velocity": {"mean": [1.0], "std": [1.0]}}
    path = checkpoint / "assets" / "lab/franka" / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": names}))
    with pytest.raises(InvalidConfigError, match=r"norm_stats\.json has velocity="):
        AutoPolicy.from_pretrained(checkpoint, **LOADING)
