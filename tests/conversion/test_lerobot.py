"""LeRobot's names and files, example by example; whole checkpoints are in tests/parity."""

import json

import pytest
import torch
from safetensors.torch import save_file

from manipulators.configuration.act import ACTConfig
from manipulators.conversion.lerobot import _read_processors, _resnet_fields, act_fields, rename_act_weights
from manipulators.conversion.published import published_layout
from manipulators.errors import CheckpointError, MissingFileError

TRUNK = "backbone.image_encoder.encoder.stages"


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("model.backbone.conv1.weight", "backbone.image_encoder.embedder.embedder.convolution.weight"),
        ("model.backbone.bn1.running_var", "backbone.image_encoder.embedder.embedder.normalization.running_var"),
        ("model.backbone.layer1.0.conv1.weight", f"{TRUNK}.0.layers.0.layer.0.convolution.weight"),
        ("model.backbone.layer4.1.bn2.bias", f"{TRUNK}.3.layers.1.layer.1.normalization.bias"),
        ("model.backbone.layer3.22.conv3.weight", f"{TRUNK}.2.layers.22.layer.2.convolution.weight"),
        ("model.backbone.layer2.0.downsample.0.weight", f"{TRUNK}.1.layers.0.shortcut.convolution.weight"),
        ("model.backbone.layer2.0.downsample.1.bias", f"{TRUNK}.1.layers.0.shortcut.normalization.bias"),
        ("model.encoder.layers.3.self_attn.in_proj_weight", "backbone.encoder.layers.3.self_attn.in_proj_weight"),
        ("model.encoder.norm.weight", "backbone.encoder.norm.weight"),
        ("model.encoder_latent_input_proj.bias", "backbone.encoder_latent_input_proj.bias"),
        ("model.encoder_img_feat_input_proj.weight", "backbone.encoder_img_feat_input_proj.weight"),
        ("model.encoder_1d_feature_pos_embed.weight", "backbone.encoder_1d_feature_pos_embed.weight"),
        ("model.vae_encoder.layers.0.norm1.weight", "action_head.vae_encoder.layers.0.norm1.weight"),
        ("model.vae_encoder_pos_enc", "action_head.vae_encoder_pos_enc"),
        (
            "model.decoder.layers.0.multihead_attn.in_proj_bias",
            "action_head.decoder.layers.0.multihead_attn.in_proj_bias",
        ),
        ("model.decoder_pos_embed.weight", "action_head.decoder_pos_embed.weight"),
        ("model.action_head.bias", "action_head.action_head.bias"),
        ("_orig_mod.model.action_head.bias", "action_head.action_head.bias"),
        ("model._orig_mod.decoder.norm.bias", "action_head.decoder.norm.bias"),
        ("somebody.elses.weight", "somebody.elses.weight"),
    ],
)
def test_names(published, ours):
    assert rename_act_weights({published: 3}) == {ours: 3}


def trunk_weights(stem, stages, convolutions, channels=3):
    """Weights of a ResNet with `stages` of (width, depth) and that many convolutions per block."""
    prefix = "backbone.image_encoder."
    weights = {prefix + "embedder.embedder.convolution.weight": torch.zeros(stem, channels, 7, 7)}
    for stage, (width, depth) in enumerate(stages):
        for block in range(depth):
            for conv in range(convolutions):
                name = f"{prefix}encoder.stages.{stage}.layers.{block}.layer.{conv}.convolution.weight"
                narrow = width // 4 if convolutions == 3 and conv < 2 else width
                weights[name] = torch.zeros(narrow, 1, 1, 1)
    return weights


def test_resnet_sizes_are_read_off_the_weights():
    tiny = trunk_weights(16, [(16, 2), (32, 2), (64, 2), (128, 2)], 2)
    assert _resnet_fields("resnet_tiny16", tiny) == {
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
    assert _resnet_fields(name, trunk_weights(64, stages, convolutions)) is None


def test_only_what_differs_from_the_named_resnet_is_given():
    weights = trunk_weights(64, [(64, 2), (128, 2), (256, 2), (512, 3)], 2, channels=4)
    assert _resnet_fields("resnet18", weights) == {"depths": [2, 2, 2, 3], "num_channels": 4}


def test_no_camera_no_fields():
    assert _resnet_fields("resnet18", {"backbone.encoder_latent_input_proj.bias": torch.zeros(3)}) is None


def test_trunk_with_a_missing_convolution_is_an_error_of_the_checkpoint():
    weights = trunk_weights(16, [(16, 1), (32, 1)], 2)
    del weights["backbone.image_encoder.encoder.stages.1.layers.0.layer.1.convolution.weight"]
    fields = _resnet_fields("resnet_tiny16", weights)  # the strict load that follows names the missing weight
    assert fields["hidden_sizes"][0] == 16


def test_fields():
    published = {
        "type": "act",
        "device": "cuda",
        "optimizer_lr": 1e-5,
        "repo_id": None,
        "chunk_size": 20,
        "n_action_steps": 10,
        "pretrained_backbone_weights": "ResNet18_Weights.IMAGENET1K_V1",
        "input_features": {
            "observation.state": {"type": "STATE", "shape": [3]},
            "observation.velocity": {"type": "STATE", "shape": [9]},
            "observation.environment_state": {"type": "ENV", "shape": [4]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    }
    config = ACTConfig.from_dict(act_fields(published, {}))
    assert (config.chunk_size, config.n_action_steps, config.pretrained_backbone_weights) == (20, 10, None)
    assert list(config.input_features) == ["observation.state", "observation.environment_state"]


def test_layout_is_told_by_the_config():
    assert published_layout({"type": "act"}) is not None
    assert published_layout({"model_type": "act_policy"}) is None
    assert published_layout({"model_type": "act_policy", "type": "act"}) is None


# --- processors -------------------------------------------------------------------------------------------


def write_processors(folder, index=3, file="statistics.safetensors", registry_name="normalizer_processor"):
    steps = [{"registry_name": "to_batch_processor", "config": {}} for _ in range(index)]
    steps.append({"registry_name": registry_name, "config": {"eps": 1e-6, "norm_map": {}}, "state_file": file})
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    after = [{"registry_name": "unnormalizer_processor", "config": {}, "state_file": file}]
    (folder / "policy_postprocessor.json").write_text(json.dumps({"steps": after}))
    save_file(
        {"observation.images.cam_high.mean": torch.tensor([[[0.1]], [[0.2]], [[0.3]]]), "action.q01": torch.ones(2)},
        folder / file,
    )


@pytest.mark.parametrize(("index", "file"), [(0, "a.safetensors"), (1, "step_7.safetensors"), (4, "x.y.safetensors")])
def test_state_file_is_followed_wherever_the_step_stands(tmp_path, index, file):
    write_processors(tmp_path, index, file)
    normalizer, unnormalizer, renames = _read_processors(tmp_path)
    assert normalizer["statistics"].keys() == {"observation.images.cam_high", "action"}  # split at the last dot
    assert normalizer["statistics"]["observation.images.cam_high"]["mean"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert unnormalizer["statistics"]["action"]["q01"].tolist() == [1, 1]
    assert (normalizer["eps"], renames) == (1e-6, {})


def test_normalizer_that_is_not_there(tmp_path):
    write_processors(tmp_path, registry_name="other_processor")
    with pytest.raises(CheckpointError, match="one normalizer among its processor steps; it has: to_batch_processor"):
        _read_processors(tmp_path)


def test_processors_that_are_not_there(tmp_path):
    with pytest.raises(MissingFileError, match="it holds nothing"):
        _read_processors(tmp_path)
