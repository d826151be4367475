"""The Eagle backbones: variants, what is trained, buffers after loading and casting, and what is refused."""

import re

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from manipulators import EagleBackbone, EagleBackbone1_5
from manipulators.errors import (
    FeatureShapeError,
    ImageTokenError,
    InvalidConfigError,
    MissingFeatureError,
    UnknownConfigFieldError,
)

IMAGE = 60  # the image token
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}
both = pytest.mark.parametrize("kind", [EagleBackbone, EagleBackbone1_5])


def tiny(kind, eagle_config=None, **fields):
    """Return a tiny backbone: two of four language layers, features projected to a width of 20."""
    torch.manual_seed(0)
    if kind is EagleBackbone:
        config = {"vision_config": VISION, "llm_config": LANGUAGE}
        own = {"img_context_token_id": IMAGE, "projector_dim": 32}
    else:
        config = {"vision_config": VISION, "text_config": LANGUAGE, "image_token_index": IMAGE}
        own = {}
    fields = {"select_layer": 2, "project_to_dim": 20, "eagle_config": config | (eagle_config or {})} | own | fields
    return kind(**fields)


def inputs_for(backbone, pictures=(2, 1), padding=(0, 3), words=5, scale=1):
    """Return pictures, and prompts with their image tokens, padded on the left."""
    each = backbone.config.image_tokens(scale)
    side = 28 * scale
    generator = torch.Generator().manual_seed(1)
    length = max(pad + each * count + words for pad, count in zip(padding, pictures, strict=True))
    ids = torch.randint(3, 50, (len(pictures), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, (pad, count) in enumerate(zip(padding, pictures, strict=True)):
        mask[row, :pad] = 0
        ids[row, pad + 1 : pad + 1 + each * count] = IMAGE
    return torch.randn(sum(pictures), 3, side, side, generator=generator), ids, mask


# --- variants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shuffle", "layers", "parts", "width", "tokens"),
    [
        (False, 1, ["Linear"], 24, 16),
        (False, 2, ["LayerNorm", "Linear", "GELU", "Linear"], 24, 16),
        (True, 1, ["Linear"], 96, 4),
        (True, 2, ["LayerNorm", "Linear", "GELU", "Linear"], 96, 4),
    ],
)
def test_connectors(shuffle, layers, parts, width, tokens):
    backbone = tiny(EagleBackbone1_5, {"use_pixel_shuffle": shuffle, "mlp_connector_layers": layers})
    connector = backbone.eagle_model.mlp1
    assert [type(part).__name__ for part in connector] == parts
    assert connector[0].weight.shape[-1] == width
    pictures, ids, mask = inputs_for(backbone)
    assert backbone.eagle_model.embed_pictures(pictures).shape == (3, tokens, 32)
    assert backbone.encode_prompts(pictures, ids, mask).shape == (2, ids.shape[1], 20)


@both
def test_the_first_layers_are_kept(kind):
    backbone = tiny(kind, select_layer=3)
    language = backbone.vision_language_model.language_model
    assert len(language.layers) == language.config.num_hidden_layers == 3
    for wrong in (-1, 0, 5):
        with pytest.raises(InvalidConfigError, match=f"select_layer={wrong}: .*Pass select_layer=4"):
            tiny(kind, select_layer=wrong)


@both
def test_projection(kind):
    assert tiny(kind).width == 20
    unprojected = tiny(kind, project_to_dim=None)
    assert isinstance(unprojected.projection, nn.Identity) and unprojected.width == 32
    inputs = inputs_for(unprojected)
    assert unprojected.encode_prompts(*inputs).shape == (*inputs[1].shape, 32)


def test_the_projector_has_the_language_models_width():
    assert tiny(EagleBackbone, projector_dim=-1).width == 32
    with pytest.raises(InvalidConfigError, match=r"projector_dim=2048.*width is 32"):
        tiny(EagleBackbone, projector_dim=2048)


def test_reprojected_pictures():
    backbone = tiny(EagleBackbone, project_to_dim=None, reproject_vision=True).eval()
    pictures, ids, mask = inputs_for(backbone)
    features = backbone.encode_prompts(pictures, ids, mask)
    is_image = ids == IMAGE
    assert torch.equal(features[is_image], backbone.model.embed_pictures(pictures).flatten(0, 1))
    backbone.reproject_vision = False
    plain = backbone.encode_prompts(pictures, ids, mask)
    assert torch.equal(features[~is_image], plain[~is_image]) and not torch.equal(features, plain)
    with pytest.raises(InvalidConfigError, match="reproject_vision=True"):
        tiny(EagleBackbone1_5, reproject_vision=True)


def test_larger_pictures():
    """Position embeddings are interpolated: where they are all alike, so are those of a larger picture."""
    backbone = tiny(EagleBackbone, scale_image_resolution=2).eval()
    assert backbone.state_dict().keys() == tiny(EagleBackbone).state_dict().keys()
    pictures, ids, mask = inputs_for(backbone, scale=2)
    assert pictures.shape == (3, 3, 56, 56) and (ids == IMAGE).sum() == 3 * 16
    assert backbone.encode_prompts(pictures, ids, mask).shape == (2, ids.shape[1], 20)
    with torch.no_grad():
        backbone.model.vision_model.embeddings.position_embedding.weight.fill_(0.3)
        embeddings = backbone.model.vision_model.embeddings
        found = embeddings(pictures, interpolate_pos_encoding=True) - embeddings.patch_embedding(pictures).flatten(
            2
        ).transpose(1, 2)
    torch.testing.assert_close(found, torch.full_like(found, 0.3))
    for wrong in (0, 1.5):
        with pytest.raises(InvalidConfigError, match=f"scale_image_resolution={wrong}"):
            tiny(EagleBackbone, scale_image_resolution=wrong)


# --- padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_padding_attends_to_nothing(kind, dtype):
    """As in the reference, whose flash attention leaves these rows out; without a bias the rest adds nothing."""
    backbone = tiny(kind).eval().to(dtype)
    inputs = inputs_for(backbone)
    attended = []
    for layer in backbone.vision_language_model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: attended.append(output[0]))
    backbone.encode_prompts(*inputs)
    padded = inputs[2] == 0
    assert len(attended) == 2 and padded.sum() == 3
    for output in attended:
        assert output[padded].abs().max() == 0 and output[~padded].abs().amax(dim=-1).min() > 0


@both
def test_real_tokens_do_not_see_padding(kind):
    backbone = tiny(kind).eval()
    pictures, ids, mask = inputs_for(backbone)
    before = backbone.encode_prompts(pictures, ids, mask)
    changed = torch.where(mask == 0, 7, ids)
    after = backbone.encode_prompts(pictures, changed, mask)
    real = mask.bool()
    assert torch.equal(before[real], after[real]) and not torch.equal(before, after)


# --- the façade -------------------------------------------------------------------------------------------


def test_prefixed_inputs():
    backbone = tiny(EagleBackbone1_5).eval()
    pictures, ids, mask = inputs_for(backbone)
    given = {"eagle_pixel_values": pictures, "eagle_input_ids": ids, "eagle_attention_mask": mask}
    extra = {"eagle_image_sizes": torch.full((3, 2), 28), "state": torch.zeros(2, 1, 8)}
    prepared = backbone.prepare_input(given | extra)
    assert prepared.keys() == given.keys()
    for batch in (given, given | extra, prepared):
        output = backbone(batch)
        assert torch.equal(output.backbone_features, backbone.encode_prompts(pictures, ids, mask))
        assert output["backbone_attention_mask"] is mask


@both
def test_model_inputs_with_absent_cameras(kind):
    backbone = tiny(kind).eval()
    pictures, ids, mask = inputs_for(backbone)
    batch = {
        "pixel_values": torch.stack([pictures[:2], torch.stack([pictures[2], torch.full((3, 28, 28), torch.nan)])]),
        "pixel_mask": torch.tensor([[True, True], [True, False]]),
        "input_ids": ids,
        "attention_mask": mask,
        "actions": torch.zeros(2, 4, 7),
    }
    prepared = backbone.prepare_input(batch)
    assert "actions" not in prepared
    assert torch.equal(backbone(prepared).backbone_features, backbone.encode_prompts(pictures, ids, mask))


@both
def test_prompts_without_pictures(kind):
    backbone = tiny(kind).eval()
    ids = torch.arange(5)[None]
    assert backbone.encode_prompts(torch.zeros(0, 3, 28, 28), ids, torch.ones_like(ids)).shape == (1, 5, 20)


@both
def test_inputs_that_do_not_fit(kind):
    backbone = tiny(kind).eval()
    pictures, ids, mask = inputs_for(backbone)
    with pytest.raises(ImageTokenError, match=r"expected \d+ for each picture"):
        backbone.encode_prompts(pictures[:2], ids, mask)
    with pytest.raises(ImageTokenError):
        backbone.encode_prompts(torch.cat([pictures, pictures[:1]]), ids, mask)
    with pytest.raises(FeatureShapeError, match=r"\(3, 3, 28, 27\); expected \(pictures, 3, 28, 28\)"):
        backbone.encode_prompts(pictures[..., :-1], ids, mask)
    with pytest.raises(FeatureShapeError, match="attention_mask"):
        backbone.encode_prompts(pictures, ids, mask[:, 1:])
    with pytest.raises(MissingFeatureError, match=f"lacks {backbone.prefix}attention_mask"):
        backbone({"pixel_values": pictures, "input_ids": ids})


@both
def test_fields_that_do_not_exist(kind):
    with pytest.raises(UnknownConfigFieldError, match="vision_config has no field 'image_sise'"):
        tiny(kind, {"vision_config": {"image_sise": 28}})
    with pytest.raises(InvalidConfigError, match="attention_implementation='quick'"):
        tiny(kind, attention_implementation="quick")


def test_the_image_token_is_looked_up_when_it_is_needed(tmp_path):
    from manipulators.processing.word_tokenizer import word_tokenizer

    backbone = tiny(EagleBackbone, img_context_token_id=None, processor_cfg={"model_path": str(tmp_path / "absent")})
    with pytest.raises(InvalidConfigError, match=r"absent'.*img_context_token_id=49154"):
        backbone.img_context_token_id
    word_tokenizer(["pick up the block"]).save_pretrained(tmp_path)
    backbone.processor_cfg["model_path"] = tmp_path
    with pytest.raises(InvalidConfigError, match="does not know <IMG_CONTEXT>"):
        backbone.img_context_token_id
    tokenizer = word_tokenizer(["pick up the block"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>"]})
    tokenizer.save_pretrained(tmp_path)
    assert backbone.img_context_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == len(tokenizer) - 1


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune_visual", [False, True])
@pytest.mark.parametrize("tune_llm", [False, True])
@both
def test_gradients_reach_what_is_trained_and_only_that(kind, tune_llm, tune_visual):
    backbone = tiny(kind, tune_llm=tune_llm, tune_visual=tune_visual).train()
    pictures, ids, mask = inputs_for(backbone)
    (backbone.encode_prompts(pictures, ids, mask) ** 2).sum().backward()
    parts = {"language_model": tune_llm, "vision_model": tune_visual, "mlp1": tune_visual, "linear": True}
    reached = dict.fromkeys(parts, 0.0)
    for name, parameter in backbone.named_parameters():
        (part,) = (part for part in parts if re.search(rf"\b(eagle_)?{part}\.", name))
        assert parameter.requires_grad == (parameter.grad is not None) == parts[part], name
        reached[part] += 0.0 if parameter.grad is None else float(parameter.grad.abs().sum())
    assert {part: total > 0 for part, total in reached.items()} == parts
    model = backbone.vision_language_model
    assert [model.language_model.training, model.vision_model.training, model.mlp1.training] == [
        tune_llm,
        tune_visual,
        tune_visual,
    ]
    assert backbone.training and backbone.projection.training
    assert not any(module.training for module in backbone.eval().modules())


@both
def test_what_is_unfrozen_trains(kind):
    backbone = tiny(kind)
    backbone.vision_language_model.vision_model.requires_grad_(True)
    assert backbone.train().vision_language_model.vision_model.training
    assert not backbone.vision_language_model.language_model.training


# --- loading and casting ----------------------------------------------------------------------------------


class Config(PreTrainedConfig):
    model_type = "around_a_backbone"
    kind: str = "EagleBackbone"


class Around(PreTrainedModel):
    config_class = Config
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.backbone = tiny(getattr(__import__("manipulators"), config.kind), tune_llm=True, tune_visual=True)
        self.post_init()


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_reloaded_buffers(kind, dtype, tmp_path):
    """No file holds them, and transformers builds on the meta device."""
    model = Around(Config(kind=kind.__name__))
    expected = buffers(model)
    assert sorted(name.rpartition(".")[2] for name in expected) == ["inv_freq", "original_inv_freq", "position_ids"]
    model.save_pretrained(tmp_path)
    loaded = Around.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.backbone.projection.weight.dtype == dtype
    assert buffers(loaded).keys() == expected.keys()
    for name, buffer in buffers(loaded).items():
        assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name]), name


@both
def test_built_on_the_meta_device(kind):
    backbone = tiny(kind).eval()
    with torch.device("meta"):
        other = tiny(kind)
    other.to_empty(device="cpu")
    other.load_state_dict(backbone.state_dict())
    inputs = inputs_for(backbone)
    assert torch.equal(other.eval().encode_prompts(*inputs), backbone.encode_prompts(*inputs))


@both
def test_casting_keeps_the_rotary_frequencies(kind):
    backbone = tiny(kind)
    expected = buffers(backbone)
    back = buffers(nn.Sequential(backbone).to(torch.bfloat16).float()[0])
    for name, buffer in back.items():
        assert torch.equal(buffer, expected[name]), name


@both
def test_gradient_checkpointing_changes_no_gradient(kind):
    model = Around(Config(kind=kind.__name__)).train()
    inputs = inputs_for(model.backbone)

    def gradients() -> dict:
        model.zero_grad()
        (model.backbone.encode_prompts(*inputs) ** 2).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable()
    layers = [*model.backbone.vision_language_model.language_model.layers]
    layers += [*model.backbone.vision_language_model.vision_model.encoder.layers]
    assert all(layer.gradient_checkpointing for layer in layers)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
