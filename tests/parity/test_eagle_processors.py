"""Eagle's own processors (as GR00T N1.5 and N1 call them) give their token ids, masks and pictures here."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from manipulators._tokenizers import load_tokenizer
from manipulators.processing.eagle import IMAGE_TOKEN, require_special_tokens
from manipulators.processing.gr00t import GR00TN1_5Processor, GR00TN1Processor

RED_APPLE, DRAWER = "pick the red apple and place it in the bowl", "Open the drawer."
TWO = ["img224_a", "img224_b"]
# Case → instructions, and the pictures that each of them comes with. Pictures of another shape than the network's are
# resized by a policy's processor before the prompt is written, so the reference's tiles have no counterpart.
N1_5 = {
    "one_img": ([RED_APPLE], ["img224_a"]),
    "two_img": ([RED_APPLE], TWO),
    "batch2": ([RED_APPLE, DRAWER], TWO),
}
N1 = {
    "one_img": ([RED_APPLE], ["img224_a"]),
    "two_img": ([RED_APPLE], TWO),
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


def build(processor_class, reference, pictures):
    """Return a policy's processor of 224 × 224 pictures that are not cropped."""
    cameras = {f"observation.images.{name}": {"type": "VISUAL", "shape": (3, 224, 224)} for name in pictures}
    return processor_class(
        tokenizer=reference.tokenizer,
        input_features=cameras,
        output_features={"action": {"type": "ACTION", "shape": (2,)}},
        normalization_mapping={"VISUAL": "IDENTITY", "ACTION": "IDENTITY"},
        image_crop_scale=1.0,
    )


def processed(processor_class, reference, texts, pictures):
    """Return what it gives."""
    batch = {f"observation.images.{name}": reference.inputs[name].expand(len(texts), -1, -1, -1) for name in pictures}
    return build(processor_class, reference, pictures)(batch, task=texts)


def test_n1_5_prompt_is_the_reference_text(n1_5):
    """Every place of a picture is written out; the rest is what the chat template gave."""
    for case, (texts, pictures) in N1_5.items():
        for text, template in zip(texts, n1_5.case["cases"][case]["texts_after_template"], strict=True):
            expected = template
            for number in range(1, len(pictures) + 1):
                place = f"<image {number}><img>{IMAGE_TOKEN * 256}</img>"
                expected = expected.replace(f"<image-{number}>", place)
            processor = build(GR00TN1_5Processor, n1_5, pictures)
            assert processor.instruction.prompt(text, len(pictures)) == expected


@pytest.mark.parametrize("case", N1_5)
def test_n1_5_processor(n1_5, case):
    inputs = processed(GR00TN1_5Processor, n1_5, *N1_5[case])
    check_tokens(inputs, n1_5, case)
    if case == "two_img":
        expected = n1_5.outputs["two_img.pixel_values"]
        torch.testing.assert_close(inputs["pixel_values"][0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", N1)
def test_n1_processor(n1, case):
    inputs = processed(GR00TN1Processor, n1, *N1[case])
    check_tokens(inputs, n1, case)
    if case != "collate":
        assert torch.equal(inputs["pixel_values"][0].bfloat16(), n1.outputs[f"{case}.pixel_values_bf16"])


@pytest.mark.parametrize("model", ["n1", "n1_5"])
def test_special_tokens_are_read_from_the_tokenizer(request, model):
    reference = request.getfixturevalue(model)
    assert require_special_tokens(reference.tokenizer) is reference.tokenizer
    specials = reference.case["info"]["specials"]
    ids = {token: reference.tokenizer.convert_tokens_to_ids(token) for token in specials}
    assert ids == specials
    assert reference.tokenizer.pad_token_id == reference.case["info"]["pad_id" if model == "n1_5" else "pad_token_id"]
