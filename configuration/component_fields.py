"""Which fields of a policy's config are of no use to one of its components, in a policy that is composed of two."""

from __future__ import annotations

# What the composed policy says once, for backbone and head alike.
_OF_THE_POLICY = (
    *("input_features", "output_features", "normalization_mapping", "n_obs_steps", "optional_cameras", "loss_over"),
    *("chunk_size", "horizon", "n_action_steps", "drop_n_last_frames", "do_mask_loss_for_padding", "format_version"),
)
_PICTURES = ("vision_backbone", "vision_config", "pretrained_backbone_weights")
_ACT_PICTURES = (*_PICTURES, "vision_norm", "replace_final_stride_with_dilation")
_VAE = ("n_vae_encoder_layers", "kl_weight")  # composed, ACT has none
_DIFFUSION_ENCODERS = (
    *(*_PICTURES, "use_group_norm", "resize_shape", "crop_shape", "crop_is_random", "spatial_softmax_num_keypoints"),
    *("use_separate_rgb_encoder_per_camera", "use_language_conditioning", "language_model_name", "language_config"),
    *("language_embedding_dim", "language_projection_dim", "language_dropout_prob"),
)
_DENOISING = (
    *("down_dims", "kernel_size", "n_groups", "diffusion_step_embed_dim", "use_film_scale_modulation"),
    *("noise_scheduler_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type"),
    *("clip_sample", "clip_sample_range", "num_inference_steps"),
)
_WIDTHS = ("action_dim", "robot_state_dim", "image_features")
_FLOW = ("action_dim", "action_horizon", "max_state_dim", "max_num_embodiments")

# Kind and type of a component → fields that exist in its config and that it does not read.
UNUSED: dict[tuple[str, str], tuple[str, ...]] = {
    ("backbone", "act"): (*_OF_THE_POLICY, *_VAE, "n_decoder_layers"),
    ("backbone", "diffusion"): (*_OF_THE_POLICY, *_WIDTHS, *_DENOISING),
    ("backbone", "eagle"): _OF_THE_POLICY,
    ("backbone", "eagle_1_5"): _OF_THE_POLICY,
    ("action_head", "act"): (
        *(*_OF_THE_POLICY, *_VAE, *_ACT_PICTURES),
        *("n_encoder_layers", "latent_dim", "temporal_ensemble_coeff"),
    ),
    ("action_head", "diffusion"): (*_OF_THE_POLICY, *_WIDTHS, *_DIFFUSION_ENCODERS),
    ("action_head", "flow_matching"): (*_OF_THE_POLICY, *_FLOW),
    ("action_head", "flow_matching_1_5"): (*_OF_THE_POLICY, *_FLOW),
}


def unused_fields(kind: str, given: object) -> list[str]:
    """Return those of a component's fields that it does not read; none where its type is not known here."""
    fields = given if isinstance(given, dict) else {}
    return [name for name in fields if name in UNUSED.get((kind, str(fields.get("type"))), ())]
