"""The usage blocks of InternManip's document run as printed; only their import lines name another package."""

import re
from functools import partial

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import manipulators
from manipulators import DiffusionConfig
from manipulators.processing.word_tokenizer import word_tokenizer

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def blocks(shared):
    """Return a function: component → the code blocks of its section."""
    text = (shared / "specs" / "internmanip_model_document.md").read_text(encoding="utf-8")

    def of(component: str) -> list[str]:
        (section,) = re.findall(rf"^### {component}\n(.*?)(?=^#{{2,3}} |\Z)", text, re.DOTALL | re.MULTILINE)
        found = BLOCK.findall(section.split("<!--")[0])
        rewritten = [
            re.sub(r"^from internmanip\.\S+ import", "from manipulators import", b, flags=re.M) for b in found
        ]
        assert not any("internmanip" in block for block in rewritten)
        return rewritten

    return of


TINY_EAGLE = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    },
    "language": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
    },
}
PROMPTS = torch.tensor([[0, 0, 7, *[60] * 4, 8], [9, *[60] * 4, 7, 8, 9]])
PROMPT_MASK = (PROMPTS > 0).long()


def trained(module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def test_eagle_backbone(blocks, monkeypatch):
    config = {"vision_config": TINY_EAGLE["vision_config"], "llm_config": TINY_EAGLE["language"]}
    tiny = partial(manipulators.EagleBackbone, eagle_config=config, img_context_token_id=60)
    monkeypatch.setattr(manipulators, "EagleBackbone", tiny)
    initialization, forward = blocks("EagleBackbone")
    scope = {
        "batch_dict": {
            "pixel_values": torch.randn(2, 3, 28, 28),
            "input_ids": PROMPTS,
            "attention_mask": PROMPT_MASK,
            "state": torch.randn(2, 1, 8),
        }
    }
    exec(initialization, scope)  # its model_path is a placeholder, and needed for the image token's id only
    model = scope["backbone"].model
    assert len(model.language_model.layers) == 12
    assert not trained(model.language_model) and trained(model.vision_model)
    exec(forward, scope)
    assert scope["output"]["backbone_features"].shape == (2, 8, 32)
    assert torch.equal(scope["output"]["backbone_attention_mask"], PROMPT_MASK)


def test_eagle_backbone_1_5(blocks, monkeypatch):
    config = {
        "vision_config": TINY_EAGLE["vision_config"],
        "text_config": TINY_EAGLE["language"],
        "image_token_index": 60,
        "use_pixel_shuffle": True,
    }
    tiny = partial(manipulators.EagleBackbone1_5, eagle_config=config)
    monkeypatch.setattr(manipulators, "EagleBackbone1_5", tiny)
    initialization, forward = blocks("EagleBackbone1_5")
    scope = {}
    exec(initialization, scope)
    model = scope["backbone"].eagle_model
    assert len(model.language_model.layers) == 16
    assert trained(model.language_model) and not trained(model.vision_model)
    values = {
        "input_ids": PROMPTS,
        "attention_mask": PROMPT_MASK,
        "pixel_values": torch.randn(2, 3, 28, 28),
        "image_sizes": torch.full((2, 2), 28),
    }
    for name in values:  # the block's four placeholders
        forward = forward.replace(f'"eagle_{name}": tensor', f'"eagle_{name}": {name}')
    scope |= values
    exec(forward, scope)
    assert scope["output"]["backbone_features"].shape == (2, 8, 1536)
    assert torch.equal(scope["output"]["backbone_attention_mask"], PROMPT_MASK)


def test_act_backbone(blocks):
    initialization, forward = blocks("ACTBackbone")
    scope = {"torch": torch, "batch_size": 2}
    exec(initialization, scope)
    exec(forward, scope)
    assert scope["encoder_out"].shape == (3, 2, 256)  # latent, state, environment state


def test_act_action_head(blocks):
    initialization, forward, inference = blocks("ACTActionHead")
    scope = {"torch": torch, "batch_size": 2, "seq_len": 7, "device": "cpu"}
    exec(blocks("ACTBackbone")[0], scope)  # the inference block uses the backbone of the section before
    exec(initialization, scope)
    exec(forward, scope)
    assert scope["latent_sample"].shape == (2, 64) and scope["mu"] is None and scope["log_sigma_x2"] is None
    assert scope["actions"].shape == (2, 16, 8)
    del scope["actions"]
    exec(inference, scope)
    assert torch.equal(scope["latent_sample"], torch.zeros(2, 64))
    assert scope["encoder_out"].shape == (3, 2, 256)
    assert scope["actions"].shape == (2, 16, 8)


def test_diffusion_rgb_encoder(blocks):
    initialization, forward = blocks("DiffusionRgbEncoder")
    scope = {"torch": torch}
    exec(initialization, scope)
    with torch.no_grad():
        exec(forward, scope)
    assert scope["features"].shape == (8, 128)  # 64 keypoints of two numbers each: its comment errs


@pytest.fixture
def _made_small(tmp_path, monkeypatch):
    """Put a tiny CLIP where the block's Hub id is looked up first, a folder of that name; narrow the U-Net."""
    monkeypatch.setattr(manipulators, "DiffusionConfig", partial(DiffusionConfig, down_dims=(16, 32, 64)))
    folder = tmp_path / "openai" / "clip-vit-base-patch32"
    tokenizer = word_tokenizer(["pick up the red block", "open the drawer"])
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    CLIPTextModelWithProjection(text).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("language", ["open the drawer", ["open the drawer", "pick up the red block"]])
@pytest.mark.usefixtures("_made_small")
def test_diffusion_action_head(blocks, language):
    initialization, training, inference = blocks("DiffusionActionHead")
    scope = {
        "robot_states": torch.randn(2, 2, 14),
        "rgb_images": torch.rand(2, 2, 1, 3, 96, 96),
        "language_instructions": language,
        "target_actions": torch.randn(2, 16, 7),
        "padding_mask": torch.zeros(2, 16, dtype=torch.bool),
        "torch": torch,
    }
    exec(initialization, scope)
    exec(training, scope)
    assert scope["loss"].shape == () and scope["action_head"].unet.final_conv[1].weight.grad.abs().sum() > 0
    exec(inference, scope)
    assert scope["all_actions"].shape == (2, 16, 7)
    assert scope["executable_actions"].shape == (2, 8, 7)


def filled(block, **values):
    """Return a block whose `name=...` and `name={...}` arguments, which the document leaves open, read `name=name`."""
    left_open = re.compile(r"(\w+)=(?:\.\.\.|\{\.\.\.\})")
    names = left_open.findall(block)
    assert names and set(names) <= values.keys()
    return left_open.sub(r"\1=\1", block)


def test_paligemma_with_expert_model(blocks, tiny_pi0):
    initialization, forward = blocks("PaliGemmaWithExpertModel")
    tiny = tiny_pi0()
    sizes = {name: getattr(tiny, name) for name in ("paligemma_config", "gemma_expert_config")}
    scope = dict(sizes)
    exec(filled(initialization, **sizes), scope)
    assert scope["config"].attention_implementation == "eager" and scope["config"].freeze_vision_encoder
    arguments = {
        "attention_mask": torch.ones(2, 7, 7, dtype=torch.bool),
        "position_ids": torch.arange(7).expand(2, -1),
        "past_key_values": None,
    }
    # What the document calls language embeddings are the tokens of the expert, of its own width.
    scope |= arguments | {"vision_embeds": torch.randn(2, 4, 32), "language_embeds": torch.randn(2, 3, 16)}
    exec(filled(forward, **arguments), scope)
    assert [output.shape for output in scope["outputs"]] == [(2, 4, 32), (2, 3, 16)]
    assert scope["cache"] is None  # nothing was cached before, and nothing was to be


def test_pi0_flow_matching(blocks, tiny_pi0):
    from manipulators import PI0FlowMatching

    training, sampling = blocks("PI0FlowMatching")
    scope = {
        "policy": PI0FlowMatching(tiny_pi0()),
        "images": [torch.rand(2, 3, 28, 28) for _ in range(2)],
        "img_masks": [torch.ones(2, dtype=torch.bool) for _ in range(2)],
        "lang_tokens": torch.randint(0, 32, (2, 6)),
        "lang_masks": torch.ones(2, 6, dtype=torch.bool),
        "state": torch.randn(2, 1, 6),
        "actions": torch.randn(2, 5, 4),
    }
    exec(training, scope)
    assert scope["loss"].shape == (2, 5, 4)
    exec(sampling, scope)
    assert scope["actions"].shape == (2, 5, 4)


DIT = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "positional_embeddings": None}


def flow_matching_scope():
    small = {"input_embedding_dim": 8, "hidden_size": 6}
    return {
        "torch": torch,
        "diffusion_model_cfg": DIT,
        "vl_self_attention_cfg": DIT,
        "standard_config_params": small | {"diffusion_model_cfg": DIT, "backbone_embedding_dim": 8},
        "vl_embeddings": torch.randn(2, 9, 8),
        "mask": torch.ones(2, 16, 7),  # one name for two masks: that of the features is not read
        "actions": torch.randn(2, 16, 7),
        "states": torch.randn(2, 1, 64),
        "robot_ids": torch.tensor([0, 31]),
    }


def test_flow_matching_action_head(blocks, monkeypatch):
    initialization, training, inference = blocks("FlowmatchingActionHead")
    small = partial(manipulators.FlowmatchingActionHeadConfig, input_embedding_dim=8, hidden_size=6)
    monkeypatch.setattr(manipulators, "FlowmatchingActionHeadConfig", small)
    scope = flow_matching_scope()
    exec(filled(initialization, diffusion_model_cfg=DIT), scope)
    exec(training, scope)
    scope["output"]["loss"].backward()
    assert scope["output"]["predictions"].shape == (2, 16, 7)
    exec(inference, scope)
    assert scope["result"]["action_pred"].shape == (2, 16, 7)


def test_flow_matching_action_head_1_5(blocks):
    initialization, training, inference = blocks("FlowmatchingActionHead_1_5")
    scope = flow_matching_scope()
    exec(filled(initialization, vl_self_attention_cfg=DIT), scope)
    *inputs, _, _ = blocks("FlowmatchingActionHead")[1].splitlines()  # the section before prepares them
    exec("\n".join(inputs), scope)
    exec(training, scope)
    scope["output"]["loss"].backward()
    assert scope["output"]["predictions"].shape == (4, 16, 7)  # expand_batch=2
    exec(inference, scope)
    assert scope["result"]["action_pred"].shape == (2, 16, 7)
