"""DiffusionConfig: the paper's defaults, impossible values, and widths in place of features."""

import json

import pytest
from transformers import CLIPConfig, CLIPTextConfig

from manipulators import DiffusionConfig, NormalizationMode
from manipulators.errors import InvalidConfigError

CAMERA = {"observation.images.top": {"type": "VISUAL", "shape": [3, 96, 128]}}
LANGUAGE = {"use_language_conditioning": True, "language_config": {"projection_dim": 12}}

IMPOSSIBLE = [
    ({"horizon": 12}, r"horizon=12 must be a multiple of 8: 2\^len\(down_dims\), down_dims=\(512, 1024, 2048\)"),
    ({"horizon": 0}, "horizon=0"),
    ({"n_action_steps": 16}, "n_action_steps=16 must lie between 1 and 15: of horizon=16 actions, the first 1 belong"),
    ({"n_action_steps": 0}, "n_action_steps=0"),
    ({"n_obs_steps": 0}, "n_obs_steps=0"),
    ({"drop_n_last_frames": -1}, "drop_n_last_frames=-1"),
    ({"down_dims": ()}, r"down_dims=\(\)"),
    ({"down_dims": (512, 1020)}, r"down_dims=\(512, 1020\) must be multiples of n_groups=8"),
    ({"down_dims": (12, 24), "n_groups": 4}, "the first must be a multiple of 8"),
    ({"n_groups": 0}, "n_groups=0"),
    ({"kernel_size": 4}, "kernel_size=4 must be odd"),
    ({"diffusion_step_embed_dim": 7}, "diffusion_step_embed_dim=7 must be even"),
    ({"diffusion_step_embed_dim": 2}, "diffusion_step_embed_dim=2"),
    ({"noise_scheduler_type": "DDMP"}, "DDMP"),
    ({"beta_schedule": "cosine"}, "cosine"),
    ({"prediction_type": "noise"}, "noise"),
    ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
    ({"num_inference_steps": 101}, "num_inference_steps=101 must lie between 1 and num_train_timesteps=100"),
    ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ({"beta_start": 0.03}, "beta_start=0.03 and beta_end=0.02 must rise"),
    ({"clip_sample_range": 0}, "clip_sample_range=0"),
    ({"vision_backbone": "resnet17"}, "Did you mean 'resnet18'"),
    ({"pretrained_backbone_weights": "microsoft/resnet-18"}, "use_group_norm=True cannot use pretrained_backbone_w"),
    ({"spatial_softmax_num_keypoints": 0}, "spatial_softmax_num_keypoints=0"),
    ({"crop_shape": (0, 84)}, r"crop_shape=\(0, 84\) must be \(height, width\)"),
    ({"resize_shape": (0, 84)}, r"resize_shape=\(0, 84\)"),
    ({"crop_shape": (97, 84), "input_features": CAMERA}, r"\(97, 84\) does not fit into .*top, which is 96 × 128"),
    ({"resize_shape": (80, 90), "input_features": CAMERA}, r"crop_shape=\(84, 84\) does not fit .* 80 × 90 pixels"),
    ({"use_language_conditioning": True}, "language_model_name='openai/clip-vit-base-patch32'"),
    (LANGUAGE | {"language_embedding_dim": 8}, "language_embedding_dim=8 disagrees with .* projection_dim is 12"),
    (LANGUAGE | {"language_projection_dim": 0}, "language_projection_dim=0"),
    (LANGUAGE | {"language_dropout_prob": 1.0}, "language_dropout_prob=1.0"),
]


@pytest.mark.parametrize(("fields", "message"), IMPOSSIBLE)
def test_impossible_fields(fields, message):
    with pytest.raises(InvalidConfigError, match=message):
        DiffusionConfig(**fields)
    with pytest.raises(InvalidConfigError, match=message):
        DiffusionConfig.from_dict({"model_type": "diffusion_policy"} | json.loads(json.dumps(fields)))


def test_defaults_are_the_papers():
    config = DiffusionConfig()
    assert (config.n_obs_steps, config.horizon, config.n_action_steps, config.frames_without_start) == (2, 16, 8, 7)
    assert (config.vision_backbone, config.crop_shape, config.crop_is_random) == ("resnet18", (84, 84), True)
    assert (config.use_group_norm, config.spatial_softmax_num_keypoints) == (True, 32)
    assert config.pretrained_backbone_weights is None and not config.use_separate_rgb_encoder_per_camera
    assert (config.down_dims, config.kernel_size, config.n_groups) == ((512, 1024, 2048), 5, 8)
    assert (config.noise_scheduler_type, config.num_train_timesteps, config.denoising_steps) == ("DDPM", 100, 100)
    assert (config.beta_schedule, config.prediction_type) == ("squaredcos_cap_v2", "epsilon")
    assert (config.clip_sample, config.clip_sample_range) == (True, 1.0)
    assert not config.do_mask_loss_for_padding and not config.reads_instruction
    modes = {kind: mode.value for kind, mode in config.normalization_mapping.items()}
    assert modes == {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"}


def test_a_given_mapping_keeps_the_other_types_defaults():
    config = DiffusionConfig(normalization_mapping={"STATE": "QUANTILES"})
    assert config.normalization_mapping["STATE"] is NormalizationMode.QUANTILES
    assert config.normalization_mapping["ACTION"] is NormalizationMode.MIN_MAX


def test_frames_without_start_follow_the_horizon():
    assert DiffusionConfig(n_action_steps=6, n_obs_steps=2).frames_without_start == 9
    assert DiffusionConfig(drop_n_last_frames=0).frames_without_start == 0


def test_widths_in_place_of_features(tmp_path):
    config = DiffusionConfig(action_dim=7, robot_state_dim=14, image_features=[2, 3, 96, 128])
    assert (config.action_dim, config.robot_state_dim, config.state_dim, config.action_horizon) == (7, 14, 14, 16)
    cameras = {f"observation.images.camera_{i}": (3, 96, 128) for i in (0, 1)}
    assert {name: feature.shape for name, feature in config.image_features.items()} == cameras
    config.save_pretrained(tmp_path)
    loaded = DiffusionConfig.from_pretrained(tmp_path)
    assert loaded.input_features == config.input_features and loaded.action_dim == 7
    single = DiffusionConfig(image_features=(3, 480, 640))
    assert [feature.shape for feature in single.image_features.values()] == [(3, 480, 640)]
    assert DiffusionConfig(robot_state_dim=0, image_features=[]).input_features == {}


def test_widths_that_agree_with_features():
    features = {"observation.images.top": {"type": "VISUAL", "shape": [3, 96, 96]}}
    config = DiffusionConfig(input_features=features, image_features=(3, 96, 96))
    assert list(config.image_features) == ["observation.images.top"]


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"action_dim": 8}, r"action_dim=8 disagrees with output_features: ACTION features of shape \[\(8,\)\]"),
        ({"robot_state_dim": 3}, r"robot_state_dim=3 disagrees with input_features: STATE .* against \[\]"),
        ({"image_features": (3, 90, 96)}, "image_features=.* disagrees with input_features: VISUAL"),
        ({"image_features": (90, 96)}, r"must be \(c, h, w\) or \(cameras, c, h, w\)"),
    ],
)
def test_widths_that_disagree_with_features(widths, message):
    with pytest.raises(InvalidConfigError, match=message):
        DiffusionConfig(input_features=CAMERA, output_features={"action": {"type": "ACTION", "shape": [7]}}, **widths)


@pytest.mark.parametrize("name", ["action_dim", "robot_state_dim", "image_features", "denoising_steps"])
def test_what_follows_from_other_fields_cannot_be_set(name):
    with pytest.raises(InvalidConfigError, match=f"{name} follows from the other fields"):
        setattr(DiffusionConfig(), name, 3)


def test_language_config_in_every_form():
    text = CLIPTextConfig(hidden_size=16, num_attention_heads=2, projection_dim=12, max_position_embeddings=20)
    forms = [
        text,
        text.to_dict(),
        CLIPConfig(text_config=text.to_dict()),
        CLIPConfig(text_config=text.to_dict()).to_dict(),
    ]
    for form in forms:
        config = DiffusionConfig(use_language_conditioning=True, language_config=form)
        again = CLIPTextConfig(**config.language_config)
        assert (again.hidden_size, again.projection_dim, config.max_instruction_tokens) == (16, 12, 20)
        assert DiffusionConfig.from_dict(config.to_dict()).language_config == config.language_config


def test_size_that_the_network_sees():
    features = {"input_features": CAMERA}
    camera = "observation.images.top"
    assert DiffusionConfig(**features).seen_shape(camera) == (3, 84, 84)
    assert DiffusionConfig(**features, crop_shape=None).seen_shape(camera) == (3, 96, 128)
    assert DiffusionConfig(**features, crop_shape=None, resize_shape=(90, 92)).seen_shape(camera) == (3, 90, 92)


def test_a_single_camera_may_be_called_as_lerobot_did():
    features = {"observation.image": {"type": "VISUAL", "shape": [3, 96, 96]}}
    assert list(DiffusionConfig(input_features=features).image_features) == ["observation.image"]
