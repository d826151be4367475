"""Torchvision's ResNets: names and sizes."""

import re

import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from manipulators.conversion.rename import rename
from manipulators.conversion.resnet import resnet_fields, resnet_renames
from manipulators.errors import WeightsMismatchError

TRUNK = "backbone.image_encoder."


def trunk_weights(stem, stages, convolutions, channels=3):
    """Weights of a ResNet with `stages` of (width, depth) and that many convolutions per block, without memory."""
    layer_type = "basic" if convolutions == 2 else "bottleneck"
    widths, depths = zip(*stages, strict=True)
    sizes = {"hidden_sizes": list(widths), "depths": list(depths), "embedding_size": stem, "num_channels": channels}
    with torch.device("meta"):
        trunk = ResNetModel(ResNetConfig(layer_type=layer_type, **sizes))
    return {TRUNK + name: value for name, value in trunk.state_dict().items()}


def test_resnet_sizes_are_read_off_the_weights():
    tiny = trunk_weights(16, [(16, 2), (32, 2), (64, 2), (128, 2)], 2)
    assert resnet_fields("resnet_tiny16", tiny, TRUNK) == {
        "layer_type": "basic",
        "hidden_sizes": [16, 32, 64, 128],
        "depths": [2, 2, 2, 2],
        "embedding_size": 16,
    }


@pytest.mark.parametrize(
    ("name", "stages", "convolutions"),
    [
        ("resnet18", [(64, 2), (128, 2), (256, 2), (512, 2)], 2),
        ("resnet34", [(64, 3), (128, 4), (256, 6), (512, 3)], 2),
        ("resnet50", [(256, 3), (512, 4), (1024, 6), (2048, 3)], 3),
    ],
)
def test_usual_resnets_need_no_fields(name, stages, convolutions):
    assert resnet_fields(name, trunk_weights(64, stages, convolutions), TRUNK) is None


def test_only_what_differs_from_the_named_resnet_is_given():
    weights = trunk_weights(64, [(64, 2), (128, 2), (256, 2), (512, 3)], 2, channels=4)
    assert resnet_fields("resnet18", weights, TRUNK) == {"depths": [2, 2, 2, 3], "num_channels": 4}


def test_no_camera_no_fields():
    assert resnet_fields("resnet18", {"backbone.encoder_latent_input_proj.bias": torch.zeros(3)}, TRUNK) is None


def test_trunk_with_a_missing_convolution_is_an_error_of_the_checkpoint():
    weights = trunk_weights(16, [(16, 1), (32, 1)], 2)
    del weights[TRUNK + "encoder.stages.1.layers.0.layer.1.convolution.weight"]
    fields = resnet_fields("resnet_tiny16", weights, TRUNK)  # the strict load that follows names the missing weight
    assert fields["hidden_sizes"][0] == 16


STAGE = f"{TRUNK}encoder.stages.1.layers.0."


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{STAGE}layer.1.convolution.weight", (9_000_000, 1, 1, 1)),  # others have the width of its stage
        (f"{STAGE}layer.1.convolution.weight", (9_000_000,)),
        (f"{TRUNK}embedder.embedder.convolution.weight", (16,)),
    ],
)
def test_one_tensor_of_another_shape_makes_no_other_network(name, shape):
    """The strict load that follows names it."""
    weights = trunk_weights(16, [(16, 1), (32, 2)], 2)
    weights[name] = torch.zeros(shape, device="meta")
    assert resnet_fields("any", weights, TRUNK)["hidden_sizes"] == [16, 32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                f"{STAGE}layer.1.convolution.weight": (90_000, 1, 1, 1),
                f"{STAGE}layer.1.normalization.weight": (90_000,),
            },
            r"stages\.1\.layers\.0\.layer\.1\.convolution\.weight: found \(90000, 1, 1, 1\), expected \(90000, 90000",
        ),
        ({f"{TRUNK}embedder.embedder.convolution.weight": (16, 90_000, 1, 1)}, r"expected \(16, 90000, 7, 7\)"),
        ({f"{TRUNK}encoder.stages.1.layers.90000.layer.1.convolution.weight": (1,)}, "1.layers.90000.layer.1"),
    ],
)
def test_a_trunk_far_larger_than_its_weights_is_never_built(changes, message):
    weights = trunk_weights(16, [(16, 1), (32, 1)], 2)
    weights |= {name: torch.zeros(shape, device="meta") for name, shape in changes.items()}
    with pytest.raises(WeightsMismatchError) as error:
        resnet_fields("any", weights, TRUNK)
    assert re.search(message, str(error.value))


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("pic.0.weight", "mine.embedder.embedder.convolution.weight"),
        ("pic.1.bias", "mine.embedder.embedder.normalization.bias"),
        ("pic.4.0.conv1.weight", "mine.encoder.stages.0.layers.0.layer.0.convolution.weight"),
        ("pic.7.1.bn2.bias", "mine.encoder.stages.3.layers.1.layer.1.normalization.bias"),
        ("pic.5.0.downsample.0.weight", "mine.encoder.stages.1.layers.0.shortcut.convolution.weight"),
        ("pic.5.0.downsample.1.bias", "mine.encoder.stages.1.layers.0.shortcut.normalization.bias"),
    ],
)
def test_names_of_a_trunk_that_became_a_sequence(published, ours):
    assert rename({published: 3}, resnet_renames(r"pic\.", "mine.", stem=("0", "1"), stages="")) == {ours: 3}
