"""transformers' own π0, with its weights loaded under its names, computes what ours computes."""

import pytest
import torch

from manipulators import PI0Policy, PI0PolicyConfig, load_published
from manipulators.modeling.action_heads.pi0 import encode_time

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
        input_features={
            "observation.images.left": {"type": "VISUAL", "shape": (3, 28, 28)},
            "observation.images.right": {"type": "VISUAL", "shape": (3, 28, 28)},
            "observation.state": {"type": "STATE", "shape": (6,)},
        },
        output_features={"action": {"type": "ACTION", "shape": (7,)}},
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
