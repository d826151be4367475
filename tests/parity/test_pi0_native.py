"""transformers' own π0, with its weights loaded under its names, computes what ours computes."""

import json

import pytest
import torch

from manipulators import AutoPolicy, PI0Policy, PI0PolicyConfig, PolicyPipeline, load_published
from manipulators.errors import InvalidConfigError, MissingStatisticsError
from manipulators.modeling.action_heads.pi0 import encode_time
from manipulators.processing.word_tokenizer import word_tokenizer

GEMMA = {
    "model_type": "gemma",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
}
PALIGEMMA = {
    "projection_dim": 32,
    "text_config": GEMMA,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
EXPERT = GEMMA | {"hidden_size": 16, "intermediate_size": 24}
WIDTHS = {"chunk_size": 5, "max_state_dim": 6, "max_action_dim": 7}
FEATURES = {
    "input_features": {
        "observation.images.left": {"type": "VISUAL", "shape": (3, 28, 28)},
        "observation.images.right": {"type": "VISUAL", "shape": (3, 28, 28)},
        "observation.state": {"type": "STATE", "shape": (6,)},
    },
    "output_features": {"action": {"type": "ACTION", "shape": (7,)}},
}
IMAGE = 59  # the token in whose place a picture's features go


@pytest.fixture(scope="module")
def native():
    from transformers import PI0Config, PI0ForConditionalGeneration

    torch.manual_seed(0)
    config = PI0Config(
        vlm_config=PALIGEMMA | {"image_token_id": IMAGE}, dit_config=EXPERT, loss_reduction="none", **WIDTHS
    )
    model = PI0ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    # Its sines are computed in float32, which moves a velocity by 1e-4.
    model.embed_action_time.sinusoid_embeds.forward = lambda time: encode_time(time, 16, 4e-3, 4.0)
    return model


@pytest.fixture(scope="module")
def ours(native):
    config = PI0PolicyConfig(
        paligemma_config=PALIGEMMA,
        gemma_expert_config=EXPERT,
        image_resolution=(28, 28),
        max_instruction_tokens=5,
        **FEATURES,
        **WIDTHS,
    )
    return load_published(PI0Policy(config), native.state_dict()).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {
        "pixel_values": torch.rand(2, 2, 3, 28, 28) * 2 - 1,
        "input_ids": torch.randint(0, IMAGE, (2, 5)),
        "attention_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        "state": torch.randn(2, 6),
    }


def with_image_tokens(inputs: dict) -> dict:
    """Return the same inputs as transformers' π0 takes them: four tokens per picture among the words."""
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    return inputs | {
        "input_ids": torch.cat([torch.full((2, 8), IMAGE), ids], dim=1),
        "attention_mask": torch.cat([torch.ones(2, 8, dtype=torch.bool), real], dim=1),
        "pixel_attention_mask": torch.ones(2, 2, dtype=torch.bool),
    }


def test_sampled_actions(native, ours, inputs):
    noise = torch.randn(2, 5, 7)
    expected = native.sample_actions(**with_image_tokens(inputs), noise=noise.clone(), num_steps=4)
    found = ours.predict_action_chunk(**inputs, noise=noise, num_steps=4)
    assert (found - noise).abs().mean() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_loss(native, ours, inputs):
    noise, actions, time = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = native(**with_image_tokens(inputs), noise=noise, actions=actions, timestep=time).loss
        found = ours(**inputs, noise=noise, actions=actions, time=time).loss
    torch.testing.assert_close(found, expected.mean(), atol=2e-5, rtol=1e-4)


# --- a whole checkpoint -----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(native, tmp_path):
    native.save_pretrained(tmp_path)
    return tmp_path


def test_policy_of_a_saved_checkpoint(checkpoint, ours):
    loaded = AutoPolicy.from_pretrained(checkpoint, **FEATURES)
    assert type(loaded) is PI0Policy
    assert (loaded.config.chunk_size, loaded.config.image_resolution) == (5, (28, 28))
    assert loaded.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_processor_of_a_saved_checkpoint(checkpoint):
    statistics = {"state_mean": [1.0] * 6, "state_std": [2.0] * 6, "actions_mean": [3.0] * 7, "actions_std": [4.0] * 7}
    loading = {"device": "cpu", "tokenizer": word_tokenizer(["press it"])} | FEATURES
    with pytest.raises(MissingStatisticsError, match=r"observation\.state"):
        PolicyPipeline.from_pretrained(checkpoint, **loading)
    (checkpoint / "processor_config.json").write_text(json.dumps(statistics))
    processor = PolicyPipeline.from_pretrained(checkpoint, **loading).processor
    assert processor.statistics["observation.state"] == {"mean": [1.0] * 6, "std": [2.0] * 6}
    assert processor.statistics["action"] == {"mean": [3.0] * 7, "std": [4.0] * 7}


def test_features_must_be_given(checkpoint):
    with pytest.raises(InvalidConfigError, match=r"names neither cameras nor the widths.*input_features="):
        AutoPolicy.from_pretrained(checkpoint)


def test_a_config_that_is_not_understood(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    vision = config["vlm_config"]["vision_config"]
    for change, message in (
        ({"causal_prefix": True}, "causal_prefix=True, which this library does not know"),
        ({"dit_config": None}, "dit_config=None; its sizes stand there"),
        ({"vlm_config": config["vlm_config"] | {"vision_config": None}}, "without the size of pictures"),
        (
            {"vlm_config": config["vlm_config"] | {"vision_config": vision | {"hidden_act": "softer"}}},
            "PI0Policy cannot be built and loaded from .*KeyError: 'softer'",
        ),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(InvalidConfigError, match=message):
            AutoPolicy.from_pretrained(checkpoint, **FEATURES)
