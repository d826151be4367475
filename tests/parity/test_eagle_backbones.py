"""InternManip's Eagle backbones give their numbers here, on padding too, and have the published sizes."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from manipulators import EagleBackbone, EagleBackbone1_5, load_published
from manipulators.conversion.gr00t import rename_gr00t_weights

CLASSES = {"n1": EagleBackbone, "n1_5": EagleBackbone1_5}


def close(found, expected, atol=2e-5, rtol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


@pytest.fixture(scope="module", params=["n1", "n1_5"])
def golden(shared, request):
    """Inputs and outputs of one reference backbone, and a function that builds ours with its weights."""
    folder = shared / "golden" / f"eagle_backbone_{request.param}"
    case = json.loads((folder / "case.json").read_text())["config"]
    arrays = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    backbone_cfg = case.pop("backbone_cfg")

    def build(**fields):
        backbone = CLASSES[request.param](**(backbone_cfg | case | fields)).eval()
        return load_published(backbone, arrays["weights"])

    return SimpleNamespace(name=request.param, build=build, inputs=arrays["inputs"], outputs=arrays["outputs"])


def intermediates(backbone, inputs) -> dict[str, torch.Tensor]:
    """Return what flows between the parts, and the features."""
    model, seen = backbone.vision_language_model, {}
    language = model.language_model

    def keep(name, of):
        def hook(module, args, kwargs, output):
            seen[name] = of(args, kwargs, output)

        return hook

    hooks = [
        (model.vision_model, "vision_last_hidden_state", lambda args, kwargs, out: out.last_hidden_state),
        (model.mlp1, "mlp1_in", lambda args, kwargs, out: args[0]),
        (model.mlp1, "mlp1_out", lambda args, kwargs, out: out),
        (language, "inputs_embeds", lambda args, kwargs, out: kwargs["inputs_embeds"]),
        (language.norm, "llm_before_final_norm", lambda args, kwargs, out: args[0]),
        (language.norm, "llm_after_final_norm", lambda args, kwargs, out: out),
    ]
    handles = [part.register_forward_hook(keep(name, of), with_kwargs=True) for part, name, of in hooks]
    with torch.no_grad():
        seen |= backbone(inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(scope="module")
def seen(golden):
    return intermediates(golden.build(), golden.inputs)


# --- numbers ----------------------------------------------------------------------------------------------


def test_every_part(golden, seen):
    """The reference ran with eager attention when it recorded these: rows of padding are compared apart."""
    names = {"pixel_shuffled": "mlp1_in", "llm_hidden_before_linear": "llm_after_final_norm"}
    compared = [name for name in golden.outputs if not name.startswith("backbone_")]
    real = seen["backbone_attention_mask"].bool()
    for name in compared:
        found, expected = seen[names.get(name, name)], golden.outputs[name]
        if name.startswith("llm"):
            found, expected = found[real], expected[real]
        close(found, expected)
    assert len(compared) == {"n1": 5, "n1_5": 6}[golden.name]


def test_features_of_words_pictures_and_padding(golden, seen):
    real = seen["backbone_attention_mask"].bool()
    assert torch.equal(seen["backbone_attention_mask"], golden.outputs["backbone_attention_mask"])
    assert real.any(dim=1).all() and not real.all()
    features = seen["backbone_features"]
    close(features[real], golden.outputs["backbone_features_fa2_emulated"][real])
    close(features[~real], golden.outputs["backbone_features_fa2_emulated"][~real])


def test_eager_attention_differs_on_padding_only(golden):
    with torch.no_grad():
        features = golden.build(attention_implementation="eager")(golden.inputs)["backbone_features"]
    close(features, golden.outputs["backbone_features_eager"])
    padded = golden.outputs["backbone_attention_mask"] == 0
    difference = (features - golden.outputs["backbone_features_fa2_emulated"]).abs()
    assert difference[padded].max() > 1 and difference[~padded].max() < 1e-4


def test_pixel_shuffle_and_projection_of_n1_5(shared):
    """N1.5's variant with stacked patches, a connector of two layers and a projection computes what N1 does."""
    folder = shared / "golden" / "eagle_backbone_n1"
    case = json.loads((folder / "case.json").read_text())["config"]
    arrays = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    eagle_config = {
        "vision_config": case["eagle_config"]["vision_config"],
        "text_config": case["eagle_config"]["llm_config"],
        "image_token_index": case["img_context_token_id"],
        "use_pixel_shuffle": True,
        "mlp_connector_layers": 2,
    }
    backbone = EagleBackbone1_5(select_layer=3, eagle_config=eagle_config).eval()
    weights = rename_gr00t_weights(arrays["weights"])
    backbone.load_state_dict({f"eagle_{name}": value for name, value in weights.items()})
    with torch.no_grad():
        output = backbone({f"eagle_{name}": value for name, value in arrays["inputs"].items()})
    close(output["backbone_features"], arrays["outputs"]["backbone_features_fa2_emulated"])


# --- names and sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "prefix", "backbone_cfg", "unused"),
    [
        ("gr00t_n1_keys.json", "backbone.", {"projector_dim": 2048}, 0),
        ("gr00t_n1_5_keys.json", "backbone.", {"project_to_dim": None}, 12),
    ],
    ids=CLASSES,
)
def test_published_names_and_shapes(shared, request, table, prefix, backbone_cfg, unused):
    """Unused are the 11 tensors of the vision pooling head and the language model's head over words, in N1.5."""
    published = json.loads((shared / "specs" / table).read_text())
    of_backbone = {name.removeprefix(prefix): shape for name, shape in published.items() if name.startswith(prefix)}
    expected = {name: tuple(shape) for name, shape in rename_gr00t_weights(of_backbone).items()}
    with torch.device("meta"):
        backbone = CLASSES[request.node.callspec.id](**backbone_cfg)
    assert {name: tuple(value.shape) for name, value in backbone.state_dict().items()} == expected
    assert len(of_backbone) - len(expected) == unused


@pytest.mark.parametrize(("name", "folder"), [("n1", "eagle2_hg_model"), ("n1_5", "eagle2_hg_model_15")])
def test_defaults_are_the_published_config(shared, name, folder):
    published = json.loads((shared / "data" / folder / "config.json").read_text())
    with torch.device("meta"):
        backbones = [CLASSES[name](eagle_config=config) for config in (published, None)]
    # bfloat16 and flash attention stand in the published file: matters of the weights and of the machine.
    assert {parameter.dtype for backbone in backbones for parameter in backbone.parameters()} == {torch.float32}
    assert backbones[0].vision_language_model.language_model.config._attn_implementation == "sdpa"
    given, default = (backbone.config.fields() for backbone in backbones)
    language = {"n1": "llm_config", "n1_5": "text_config"}[name]
    for token in ("bos_token_id", "eos_token_id"):  # nothing here writes words
        given[language].pop(token), default[language].pop(token, None)
    for generation in ("use_cache", "tie_word_embeddings"):
        del given[language][generation], default[language][generation]
    assert given == default


def test_the_image_token_is_the_published_tokenizers(shared):
    with torch.device("meta"):
        named = EagleBackbone(processor_cfg={"model_path": str(shared / "data" / "eagle2_hg_model")})
        assert named.img_context_token_id == EagleBackbone().img_context_token_id == 49154
        assert EagleBackbone1_5().image_token_id == 151669
