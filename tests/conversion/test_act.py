"""ACT's published names and config, example by example; whole checkpoints are in tests/parity."""

import pytest

from manipulators.configuration.act import ACTConfig
from manipulators.conversion.act import act_fields, rename_act_weights

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
