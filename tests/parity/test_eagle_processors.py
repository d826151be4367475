"""Eagle's own processors (as GR00T N1.5 and N1 call them) give their token ids, masks and pictures here."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from manipulators._tokenizers import load_tokenizer
from manipulators.errors import InvalidConfigError
from manipulators.processing.eagle import (
    IMAGE_TOKEN,
    EagleFormatN1,
    EagleFormatN1_5,
    require_special_tokens,
    tokenize,
)
from manipulators.processing.gr00t import GR00TN1_5Processor, GR00TN1Processor

RED_APPLE, DRAWER = "pick the red apple and place it in the bowl", "Open the drawer."
TWO = ["img224_a", "img224_b"]
# Case → instructions, and the pictures that each of them comes with.
N1_5 = {
    "one_img": ([RED_APPLE], ["img224_a"]),
    "two_img": ([RED_APPLE], TWO),
    "batch2": ([RED_APPLE, DRAWER], TWO),
    "nonsquare": ([RED_APPLE], ["img_180x320"]),
}
N1 = {
    "one_img": ([RED_APPLE], ["img224_a"]),
    "two_img": ([RED_APPLE], TWO),
    "one_nonsquare": ([DRAWER], ["img_180x320"]),
    "collate": ([RED_APPLE, DRAWER], TWO),
}


@pytest.fixture(scope="module")
def reference(shared):
    """Return a function: model → inputs, outputs, what case.json says, and the published tokenizer."""

    def read(golden: str, tokenizer: str) -> SimpleNamespace:
        folder = shared / "golden" / golden
        return SimpleNamespace(
            inputs={n: x.permute(2, 0, 1) for n, x in load_file(folder / "inputs.safetensors").items()},
            outputs=load_file(folder / "outputs.safetensors"),
            case=json.loads((folder / "case.json").read_text()),
            tokenizer=load_tokenizer(shared / "data" / tokenizer),
        )

    return read


@pytest.fixture(scope="module")
def n1_5(reference):
    return reference("eagle_processor_n1_5", "eagle2_hg_model_15")


@pytest.fixture(scope="module")
def n1(reference):
    return reference("eagle_processor_n1", "eagle2_hg_model")


def check_tokens(encoded, reference, case):
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(encoded[name], reference.outputs[f"{case}.{name}"]), name


def formatted(layout, reference, texts, pictures):
    """Return the encoded prompts of a format, and the tiles of one sample."""
    tiles = [layout.tile(reference.inputs[name]) for name in pictures]
    prompts = [layout.prompt(text, [len(x) for x in tiles]) for text in texts]
    return tokenize(reference.tokenizer, prompts), torch.cat(tiles)


def processed(processor_class, reference, texts, pictures):
    """Return what a policy's processor gives for 224 × 224 pictures that are not cropped."""
    cameras = {f"observation.images.{name}": {"type": "VISUAL", "shape": (3, 224, 224)} for name in pictures}
    processor = processor_class(
        tokenizer=reference.tokenizer,
        input_features=cameras,
        output_features={"action": {"type": "ACTION", "shape": (2,)}},
        normalization_mapping={"VISUAL": "IDENTITY", "ACTION": "IDENTITY"},
        image_crop_scale=1.0,
    )
    batch = {f"observation.images.{name}": reference.inputs[name].expand(len(texts), -1, -1, -1) for name in pictures}
    return processor(batch, task=texts)


@pytest.mark.parametrize("case", N1_5)
def test_n1_5_format(n1_5, case):
    encoded, tiles = formatted(EagleFormatN1_5(256), n1_5, *N1_5[case])
    check_tokens(encoded, n1_5, case)
    count, *size = n1_5.outputs[f"{case}.pixel_values_shape"].tolist()
    assert [len(tiles) * len(N1_5[case][0]), *tiles.shape[1:]] == [count, *size]


def test_n1_5_prompt_is_the_reference_text(n1_5):
    """Every place of a picture is written out; the rest is what the chat template gave."""
    for case, (texts, pictures) in N1_5.items():
        for text, template in zip(texts, n1_5.case["cases"][case]["texts_after_template"], strict=True):
            expected = template
            for number in range(1, len(pictures) + 1):
                place = f"<image {number}><img>{IMAGE_TOKEN * 256}</img>"
                expected = expected.replace(f"<image-{number}>", place)
            assert EagleFormatN1_5(256).prompt(text, [1] * len(pictures)) == expected


def test_n1_5_pictures(n1_5):
    _, tiles = formatted(EagleFormatN1_5(256), n1_5, *N1_5["two_img"])
    torch.testing.assert_close(tiles, n1_5.outputs["two_img.pixel_values"], atol=1e-6, rtol=0)


def test_n1_5_tiles_of_a_wide_picture(n1_5):
    """180 × 320 becomes two tiles and the whole picture made small."""
    tiles = EagleFormatN1_5(256).tile(n1_5.inputs["img_180x320"])
    outputs = {name.removeprefix("nonsquare.pixel_values_"): x for name, x in n1_5.outputs.items()}
    assert tiles.shape == (3, 3, 224, 224)
    torch.testing.assert_close(tiles[:1], outputs["first_tile"], atol=1e-6, rtol=0)
    torch.testing.assert_close(tiles.mean(dim=(2, 3)), outputs["tile_means"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["one_img", "two_img", "batch2"])
def test_n1_5_processor(n1_5, case):
    inputs = processed(GR00TN1_5Processor, n1_5, *N1_5[case])
    check_tokens(inputs, n1_5, case)
    if case == "two_img":
        expected = n1_5.outputs["two_img.pixel_values"]
        torch.testing.assert_close(inputs["pixel_values"][0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", N1)
def test_n1_format(n1, case):
    encoded, tiles = formatted(EagleFormatN1(64), n1, *N1[case])
    check_tokens(encoded, n1, case)
    if f"{case}.pixel_values_bf16" in n1.outputs:
        assert torch.equal(tiles.bfloat16(), n1.outputs[f"{case}.pixel_values_bf16"])


@pytest.mark.parametrize("case", ["one_img", "two_img", "collate"])
def test_n1_processor(n1, case):
    inputs = processed(GR00TN1Processor, n1, *N1[case])
    check_tokens(inputs, n1, case)
    if case != "collate":
        assert torch.equal(inputs["pixel_values"][0].bfloat16(), n1.outputs[f"{case}.pixel_values_bf16"])


def test_n1_refuses_several_tiles(n1):
    """The reference gives three tiles and the tokens of one, which no model can take."""
    assert n1.outputs["tiles4.pixel_values_shape"][0] == 3
    assert n1.case["cases"]["tiles4"]["n_img_context"] == 64
    with pytest.raises(InvalidConfigError, match="max_tiles=4: GR00T N1 works with one tile"):
        EagleFormatN1(64, max_tiles=4)


@pytest.mark.parametrize("model", ["n1", "n1_5"])
def test_special_tokens_are_read_from_the_tokenizer(request, model):
    reference = request.getfixturevalue(model)
    assert require_special_tokens(reference.tokenizer) is reference.tokenizer
    specials = reference.case["info"]["specials"]
    ids = {token: reference.tokenizer.convert_tokens_to_ids(token) for token in specials}
    assert ids == specials
    assert reference.tokenizer.pad_token_id == reference.case["info"]["pad_id" if model == "n1_5" else "pad_token_id"]
