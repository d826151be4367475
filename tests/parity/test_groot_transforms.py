"""NVIDIA's transforms before GR00T, in evaluation, give their pictures, states and actions here; and back."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from manipulators.processing.gr00t import GR00TN1_5Processor
from manipulators.processing.pictures import crop_and_resize
from manipulators.processing.word_tokenizer import word_tokenizer

ORDER = {"state": ["arm", "grip"], "action": ["arm", "rot", "grip"]}
FEATURES = {"state": "observation.state", "action": "action"}


@pytest.fixture(scope="module")
def golden(shared):
    """Inputs, outputs and a processor with the reference's modes and statistics, which are by part."""
    folder = shared / "golden" / "groot_transforms_eval"
    modes = json.loads((folder / "case.json").read_text())["normalization_modes"]
    inputs, outputs = (load_file(folder / f"{which}.safetensors") for which in ("inputs", "outputs"))
    parts = {
        kind: {n: {"width": inputs[f"{kind}.{n}"].shape[1], "mode": modes[f"{kind}.{n}"]} for n in ORDER[kind]}
        for kind in ORDER
    }
    statistics = {
        name: {w: inputs[f"stats.{name}.{w}"] for w in ("min", "max", "mean", "std", "q01", "q99")} for name in modes
    }
    camera = {"type": "VISUAL", "shape": (3, 240, 320)}
    processor = GR00TN1_5Processor(
        tokenizer=word_tokenizer(["press it"]),
        input_features={
            "observation.images.a": camera,
            "observation.images.b": camera,
            "observation.state": {"type": "STATE", "shape": (7,)},
        },
        output_features={"action": {"type": "ACTION", "shape": (10,)}},
        normalization_mapping={"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
        statistics=statistics,
        state_parts=parts["state"],
        action_parts=parts["action"],
    )
    raw = {kind: torch.cat([inputs[f"{kind}.{name}"] for name in ORDER[kind]], dim=-1) for kind in ORDER}
    observation = {f"observation.images.{name}": inputs[f"video.{name}"][0] for name in "ab"}
    observation |= {f"state.{name}": inputs[f"state.{name}"][0] for name in ORDER["state"]}
    return SimpleNamespace(
        processor=processor, inputs=inputs, outputs=outputs, raw=raw, observation=observation, parts=parts
    )


def test_pictures(golden):
    """Equal to the level: what lies between two is cut off there and here."""
    pixels = golden.processor(golden.observation, task="press it")["pixel_values"]
    expected = golden.outputs["images_uint8"].movedim(-1, -3)  # (1, 2, 3, 224, 224)
    assert torch.equal(((pixels + 1) * 127.5).round().to(torch.uint8), expected)
    torch.testing.assert_close(pixels, (expected.float() / 255 - 0.5) / 0.5, atol=0, rtol=0)


def test_pictures_before_their_truncation(golden):
    """The float video was kept for the first camera, in half precision."""
    picture = golden.inputs["video.a"].permute(0, 3, 1, 2).float() / 255
    cropped = picture[..., 6:234, 8:312]  # 0.95 of 240 × 320, from the middle
    expected = golden.outputs["video_float"][0].float()
    resized = F.interpolate(cropped, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(resized, expected, atol=5e-4, rtol=0)
    torch.testing.assert_close(crop_and_resize(picture, 0.95, 224), (resized * 255).to(torch.uint8), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ORDER)
def test_vectors_in_double_precision(golden, kind):
    normalizer = golden.processor.normalizer(FEATURES[kind])
    found = normalizer.normalize(golden.raw[kind])
    torch.testing.assert_close(found, golden.outputs[kind], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ORDER)
def test_way_back(golden, kind):
    """Where the map has an inverse; a constant dimension takes its recorded value, a binary one 0 or 1."""
    normalizer, raw = golden.processor.normalizer(FEATURES[kind]), golden.raw[kind]
    back = normalizer.unnormalize(golden.outputs[kind])
    start = 0
    for name, part in golden.parts[kind].items():
        here = slice(start, start := start + part["width"])
        stats = {w: golden.inputs[f"stats.{kind}.{name}.{w}"] for w in ("min", "max", "mean", "std", "q01", "q99")}
        expected = raw[:, here]
        if part["mode"] == "binary":
            expected = (expected > 0.5).double()
        elif part["mode"] == "q99":
            expected = expected.clamp(stats["q01"], stats["q99"])
        elif part["mode"] == "min_max":
            expected = torch.where(stats["min"] == stats["max"], stats["min"], expected)
        else:
            expected = torch.where(stats["std"] == 0, stats["mean"], expected)
        torch.testing.assert_close(back[:, here], expected, atol=1e-12, rtol=0)


def test_processor_pads_and_takes_it_off(golden):
    inputs = golden.processor(golden.observation, task="press it", actions=golden.raw["action"])
    expected = golden.outputs
    torch.testing.assert_close(inputs["state"][:, :7], expected["state"].float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(inputs["actions"][0, :, :10], expected["action"].float(), atol=1e-6, rtol=1e-6)
    assert inputs["state"].shape == (1, 64) and not inputs["state"][:, 7:].any()
    assert inputs["actions"].shape == (1, 16, 32) and not inputs["actions"][..., 10:].any()
    assert torch.equal(inputs["action_mask"], (torch.arange(32) < 10).expand(1, 16, 32))
    decoded = golden.processor.decode_actions(inputs["actions"])[0]
    unnormalized = golden.processor.normalizer("action").unnormalize(expected["action"])
    torch.testing.assert_close(decoded, unnormalized.float(), atol=1e-5, rtol=1e-6)
    assert [tuple(x.shape) for x in golden.processor.split_actions(decoded).values()] == [(16, 6), (16, 3), (16, 1)]
