"""Torchvision's ResNets: names and sizes."""

import pytest
import torch

from manipulators.conversion.rename import rename
from manipulators.conversion.resnet import resnet_fields, resnet_renames

TRUNK = "backbone.image_encoder."


def trunk_weights(stem, stages, convolutions, channels=3):
    """Weights of a ResNet with `stages` of (width, depth) and that many convolutions per block."""
    weights = {TRUNK + "embedder.embedder.convolution.weight": torch.zeros(stem, channels, 7, 7)}
    for stage, (width, depth) in enumerate(stages):
        for block in range(depth):
            for conv in range(convolutions):
                name = f"{TRUNK}encoder.stages.{stage}.layers.{block}.layer.{conv}.convolution.weight"
                narrow = width // 4 if convolutions == 3 and conv < 2 else width
                weights[name] = torch.zeros(narrow, 1, 1, 1)
    return weights


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
