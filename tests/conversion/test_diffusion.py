"""Published names and configs of Diffusion Policy become ours."""

import pytest
import torch

from manipulators import DiffusionConfig
from manipulators.conversion.diffusion import diffusion_fields, rename_diffusion_weights
from manipulators.errors import InvalidConfigError

FEATURES = {
    "input_features": {"observation.image": {"type": "VISUAL", "shape": [3, 96, 96]}},
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
}
# What LeRobot 0.1 to 0.3 write, as far as it matters here; later releases have other defaults and more fields.
OLD = {
    "type": "diffusion",
    "n_obs_steps": 2,
    "horizon": 16,
    "n_action_steps": 8,
    "crop_shape": [84, 84],
    "use_group_norm": True,
    "use_separate_rgb_encoder_per_camera": False,
    "drop_n_last_frames": 7,
    "vision_backbone": "resnet18",
    "pretrained_backbone_weights": None,
    "optimizer_lr": 1e-4,
}


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("backbone.0.weight", "backbone.embedder.embedder.convolution.weight"),
        ("rgb_encoder.backbone.1.bias", "diffusion.rgb_encoder.backbone.embedder.embedder.normalization.bias"),
        (
            "diffusion.rgb_encoder.1.backbone.5.0.conv2.weight",
            "diffusion.rgb_encoder.1.backbone.encoder.stages.1.layers.0.layer.1.convolution.weight",
        ),
        (
            "diffusion.rgb_encoder.backbone.7.0.downsample.1.running_mean",
            "diffusion.rgb_encoder.backbone.encoder.stages.3.layers.0.shortcut.normalization.running_mean",
        ),
        ("diffusion._orig_mod.unet.final_conv.1.bias", "diffusion.unet.final_conv.1.bias"),
        ("diffusion.rgb_encoder.pool.pos_grid", "diffusion.rgb_encoder.pool.pos_grid"),
        ("language_encoder.text_projection.weight", "diffusion.language_encoder.text_projection.weight"),
        ("unet.final_conv.1.bias", "diffusion.unet.final_conv.1.bias"),
        ("backbone.encoder.stages.0.stray", "backbone.encoder.stages.0.stray"),
    ],
)
def test_names(published, ours):
    assert rename_diffusion_weights({published: 1}) == {ours: 1}


@pytest.mark.parametrize("name", ["language_encoder.vision_model.post_layernorm.bias", "language_encoder.logit_scale"])
def test_vision_half_of_clip_is_left_out(name):
    assert rename_diffusion_weights({name: 1}) == {}


def test_config_of_the_first_releases():
    config = DiffusionConfig.from_dict(diffusion_fields(OLD | FEATURES, {}))
    assert (config.horizon, config.n_action_steps, config.crop_shape) == (16, 8, (84, 84))
    assert config.resize_shape is None and config.frames_without_start == 7


@pytest.mark.parametrize(("masked", "over"), [(True, "real"), (1, "real"), (False, "steps"), (None, "steps")])
def test_whether_padding_counts_in_the_loss(masked, over):
    fields = diffusion_fields(OLD | FEATURES | {"do_mask_loss_for_padding": masked}, {})
    assert DiffusionConfig.from_dict(fields).loss_over == over


@pytest.mark.parametrize("name", ["features_width", "denoising_steps", "validate"])
def test_a_field_that_only_bears_the_name_of_something_here_is_refused(name):
    with pytest.raises(InvalidConfigError, match=f"has {name}=3, which this library does not know"):
        diffusion_fields(OLD | FEATURES | {name: 3}, {})


@pytest.mark.parametrize(("ratio", "crop"), [(1.0, None), (0.9, (90, 81))])
def test_crop_that_follows_from_the_size(ratio, crop):
    fields = diffusion_fields(OLD | FEATURES | {"resize_shape": [100, 90], "crop_ratio": ratio}, {})
    config = DiffusionConfig.from_dict(fields)
    assert (config.resize_shape, config.crop_shape) == ((100, 90), crop)


@pytest.mark.parametrize("name", ["horizon", "use_group_norm"])
def test_partial_config_is_ambiguous(name):
    partial = {field: value for field, value in (OLD | FEATURES).items() if field != name}
    with pytest.raises(InvalidConfigError, match=f"lacks {name}, whose defaults LeRobot changed"):
        diffusion_fields(partial, {})


@pytest.mark.parametrize("separate", [False, True])
def test_sizes_of_the_vision_backbone_are_read_off_its_weights(separate):
    encoder = "diffusion.rgb_encoder.0." if separate else "diffusion.rgb_encoder."
    weights = {encoder + "backbone.0.weight": torch.zeros(16, 3, 7, 7)}
    for stage in range(4):
        for conv in (1, 2):
            name = f"{encoder}backbone.{stage + 4}.0.conv{conv}.weight"
            width = 16 * 2**stage
            weights[name] = torch.zeros(width, width if conv == 2 or stage == 0 else width // 2, 3, 3)
    config = OLD | FEATURES | {"use_separate_rgb_encoder_per_camera": separate, "vision_backbone": "resnet_tiny16"}
    fields = diffusion_fields(config, rename_diffusion_weights(weights))
    assert fields["vision_config"] == {
        "layer_type": "basic",
        "hidden_sizes": [16, 32, 64, 128],
        "depths": [1, 1, 1, 1],
        "embedding_size": 16,
    }
