"""Configuration of Diffusion Policy (Chi et al. 2023, arXiv 2303.04137)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

from ..errors import InvalidConfigError, nearest
from .features import ACTION, IMAGE_PREFIX, STATE, FeatureType, PolicyFeature
from .policy import PolicyConfig
from .resnet import RESNETS
from .strict import part_config

# What transformers writes into a config beside the network's sizes.
_NOT_OF_THE_NETWORK = frozenset(("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"))


class DiffusionConfig(PolicyConfig):
    """Configure Diffusion Policy. Defaults are the paper's, for its convolutional U-Net.

    Args:
        n_obs_steps (`int`, *optional*, defaults to 2): observations the policy looks at.
        horizon (`int`, *optional*, defaults to 16): actions denoised together; the first belongs to the oldest
            observation. A multiple of 2^len(down_dims).
        n_action_steps (`int`, *optional*, defaults to 8): actions executed before the next prediction.
        drop_n_last_frames (`int`, *optional*): frames at an episode's end that training does not start from; by
            default, and as the paper does, horizon − n_action_steps − n_obs_steps + 1: elsewhere at most
            n_action_steps − 1 of the actions lie beyond the end.
        vision_backbone (`str`, *optional*, defaults to `"resnet18"`): ResNet that encodes the cameras.
        vision_config (`dict`, *optional*): fields of `transformers.ResNetConfig` that differ from it.
        pretrained_backbone_weights (`str`, *optional*): Hub id or folder of the ResNet's start weights; the paper
            starts from random ones. Needs `use_group_norm=False`.
        use_group_norm (`bool`, *optional*, defaults to True): group norm instead of batch norm in the ResNet.
        resize_shape (`tuple[int, int]`, *optional*): (height, width) that images are resized to before the crop.
        crop_shape (`tuple[int, int]`, *optional*, defaults to (84, 84)): (height, width) of the crop that the
            network sees; None for the whole image.
        crop_is_random (`bool`, *optional*, defaults to True): crop at a random place while training; in evaluation
            always at the centre.
        spatial_softmax_num_keypoints (`int`, *optional*, defaults to 32): keypoints per camera, two numbers each.
        use_separate_rgb_encoder_per_camera (`bool`, *optional*, defaults to False): one ResNet per camera.
        down_dims (`tuple[int, ...]`, *optional*, defaults to (512, 1024, 2048)): widths of the U-Net's levels.
        use_film_scale_modulation (`bool`, *optional*, defaults to True): the condition scales and shifts features;
            False only shifts them.
        noise_scheduler_type (`str`, *optional*, defaults to `"DDPM"`): or `"DDIM"`, which draws no noise on the way
            and so gets by with fewer steps.
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): what the U-Net predicts: the noise, the clean
            actions (`"sample"`) or a mixture (`"v_prediction"`).
        clip_sample (`bool`, *optional*, defaults to True): keep the estimate of the clean actions within
            ±`clip_sample_range` at every step; the actions must be normalised into that range.
        num_inference_steps (`int`, *optional*): denoising steps of a prediction; by default `num_train_timesteps`.
        loss_over (`str`, *optional*, defaults to `"steps"`): see `PolicyConfig`; as the paper does, steps beyond the
            episode count. `"real"` leaves them out, as the published `do_mask_loss_for_padding=True` does, which is
            read and can be assigned.
        use_language_conditioning (`bool`, *optional*, defaults to False): condition on an instruction, encoded by a
            frozen CLIP text encoder.
        language_model_name (`str`, *optional*): Hub id or folder of the encoder and its tokenizer, such as
            `"openai/clip-vit-base-patch32"`.
        language_config (`dict`, *optional*): fields of `transformers.CLIPTextConfig`, with `projection_dim`; read
            from `language_model_name` when that is given. Alone, it describes an encoder whose weights are loaded
            later.
        language_embedding_dim (`int`, *optional*): width of CLIP's sentence feature; its `projection_dim`.
        language_projection_dim (`int`, *optional*, defaults to 32): width to which a trained layer brings it.
        action_dim, robot_state_dim, image_features: shorthand for features, in the constructor only: widths, and
            (c, h, w) or (v, c, h, w). The features are then named `action`, `observation.state` and
            `observation.images.camera_0`, ….
    """

    model_type = "diffusion_policy"
    default_normalization: ClassVar[Mapping[str, str]] = {
        "VISUAL": "MEAN_STD",
        "STATE": "MIN_MAX",
        "ENV": "MIN_MAX",
        "ACTION": "MIN_MAX",
    }

    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8
    drop_n_last_frames: int | None = None

    vision_backbone: str = "resnet18"
    vision_config: dict[str, Any] | None = None
    pretrained_backbone_weights: str | None = None
    use_group_norm: bool = True
    resize_shape: tuple[int, int] | None = None
    crop_shape: tuple[int, int] | None = (84, 84)
    crop_is_random: bool = True
    spatial_softmax_num_keypoints: int = 32
    use_separate_rgb_encoder_per_camera: bool = False

    down_dims: tuple[int, ...] = (512, 1024, 2048)
    kernel_size: int = 5
    n_groups: int = 8
    diffusion_step_embed_dim: int = 128
    use_film_scale_modulation: bool = True

    noise_scheduler_type: Literal["DDPM", "DDIM"] = "DDPM"
    num_train_timesteps: int = 100
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    num_inference_steps: int | None = None

    loss_over: Literal["real", "steps", "all"] = "steps"

    use_language_conditioning: bool = False
    language_model_name: str | None = None
    language_config: dict[str, Any] | None = None
    language_embedding_dim: int | None = None
    language_projection_dim: int = 32
    language_dropout_prob: float = 0.1

    def __post_init__(self, **kwargs):
        self._take_shorthand(kwargs)
        if (masked := kwargs.pop("do_mask_loss_for_padding", None)) is not None:
            self.do_mask_loss_for_padding = masked
        super().__post_init__(**kwargs)

    @property
    def do_mask_loss_for_padding(self) -> bool:
        """Whether steps beyond the episode are left out of the loss, under its published name: see `loss_over`."""
        return self.loss_over == "real"

    @do_mask_loss_for_padding.setter
    def do_mask_loss_for_padding(self, value: bool) -> None:
        self.loss_over = "real" if value else "steps"

    def _take_shorthand(self, given: dict[str, Any]) -> None:
        """Turn widths into features; features that are there already must agree."""
        shorthand = {name: given.pop(name, None) for name in ("action_dim", "robot_state_dim", "image_features")}
        outputs, inputs = {}, {}
        if shorthand["action_dim"] is not None:
            outputs[ACTION] = PolicyFeature(FeatureType.ACTION, (shorthand["action_dim"],))
        if shorthand["robot_state_dim"]:
            inputs[STATE] = PolicyFeature(FeatureType.STATE, (shorthand["robot_state_dim"],))
        for i, shape in enumerate(_camera_shapes(shorthand["image_features"])):
            inputs[f"{IMAGE_PREFIX}camera_{i}"] = PolicyFeature(FeatureType.VISUAL, shape)
        for field, described in (("input_features", inputs), ("output_features", outputs)):
            features = getattr(self, field)
            if not features:
                setattr(self, field, described)
                continue
            for kind in {feature.type for feature in described.values()}:
                short, full = ([f.shape for f in group.values() if f.type is kind] for group in (described, features))
                if short != full:
                    raise InvalidConfigError(
                        f"{', '.join(f'{k}={v!r}' for k, v in shorthand.items() if v is not None)} disagrees with "
                        f"{field}: "
                        f"{kind.value} features of shape {short} against {full}. Give one of the two."
                    )

    @classmethod
    def _completed(cls, name: str, value: Any) -> Any:
        value = value.to_diff_dict() if isinstance(value, PreTrainedConfig) else value
        if name == "language_config" and isinstance(value, Mapping):
            value = value.get("text_config", value)  # of a whole CLIP, only the text encoder is used
            if not isinstance(value, Mapping):
                raise InvalidConfigError(f"language_config has text_config={value!r}; it is a mapping of its fields.")
            return {key: item for key, item in value.items() if key not in _NOT_OF_THE_NETWORK}
        return super()._completed(name, value)

    # --- what follows from the fields -----------------------------------------------------------------

    @property
    def action_horizon(self) -> int:
        """Actions that are denoised together: `horizon`."""
        return self.horizon

    @property
    def robot_state_dim(self) -> int:
        """Width of the robot's state, 0 without one."""
        return self.state_dim or 0

    @property
    def reads_instruction(self) -> bool:
        """Whether the network reads an instruction: `input_ids` and `attention_mask`."""
        return self.use_language_conditioning

    @property
    def network_resizes_to(self) -> tuple[int, int] | None:
        """`resize_shape`."""
        return self.resize_shape

    @property
    def resizes_pictures(self) -> bool:
        """Whether the network resizes every picture, to `resize_shape`."""
        return self.resize_shape is not None

    @property
    def tokenizer_name(self) -> str | None:
        """Hub id or folder of the instruction's tokenizer: that of the text encoder."""
        return self.language_model_name

    @property
    def max_instruction_tokens(self) -> int:
        """Tokens of an instruction, padding included: as many as the text encoder has positions."""
        return (self.language_config or {}).get("max_position_embeddings", 77)

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the text encoder's embedding."""
        return self._clip().vocab_size if self.reads_instruction else None

    @property
    def end_token_id(self) -> int | None:
        """The token at which the text encoder summarises an instruction: the end of a text."""
        if not self.reads_instruction or self.language_config is None:
            return None
        end = self._clip().eos_token_id
        return self.vocabulary_size - 1 if end == 2 else end  # 2 marks an older CLIP, which takes the highest token

    def _clip(self) -> Any:
        from transformers import CLIPTextConfig

        return part_config("language_config", CLIPTextConfig, **(self.language_config or {}))

    @property
    def denoising_steps(self) -> int:
        """Denoising steps of a prediction."""
        return self.num_inference_steps or self.num_train_timesteps

    @property
    def features_width(self) -> int:
        """Width of the condition: of everything that one observation becomes, for all observations."""
        width = self.robot_state_dim + (self.environment_state_dim or 0)
        width += 2 * self.spatial_softmax_num_keypoints * len(self.image_features)
        width += self.language_projection_dim if self.reads_instruction else 0
        return width * self.n_obs_steps

    @property
    def executed_steps(self) -> slice:
        """Those of the horizon, which begins at the oldest observation, that are executed: from the current one on."""
        return slice(self.n_obs_steps - 1, self.n_obs_steps - 1 + self.n_action_steps)

    @property
    def frames_without_start(self) -> int:
        """Frames at an episode's end from which training does not start; see `drop_n_last_frames`."""
        if self.drop_n_last_frames is not None:
            return self.drop_n_last_frames
        return self.horizon - self.n_action_steps - self.n_obs_steps + 1  # at least 0, see validate_horizon

    def seen_shape(self, camera: str) -> tuple[int, int, int]:
        """Return (c, h, w) of a camera's image as the ResNet sees it: resized and cropped."""
        channels, *size = self.image_features[camera].shape
        return channels, *(self.crop_shape or self.resize_shape or size)

    def example_inputs(self, batch_size: int = 2, absent_cameras: Sequence[str] = ()) -> dict[str, Any]:
        """Return valid model inputs; see `PolicyConfig`. With language also `input_ids`, `attention_mask` (b, n)."""
        inputs = super().example_inputs(batch_size, absent_cameras)
        if not self.reads_instruction:
            return inputs
        import torch

        text = self._clip()
        size = text.vocab_size
        end = size - 1 if text.eos_token_id == 2 else text.eos_token_id  # see `end_token_id`
        ids = torch.randint(3, size - 2, (batch_size, 6), generator=torch.Generator().manual_seed(2))
        ids[ids == end] = size - 2
        ids[:, -1] = end
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def example_draws(self, batch_size: int = 2, training: bool = False) -> dict[str, Any]:
        """Return `noise` (b, h, a), and for DDPM `step_noise` (steps − 1, b, h, a); in training `time` (b,) and, where
        crops are random, `crop_offsets` (encoder calls, 2), see `DiffusionActionHead.encode_images`."""
        import torch

        generator = torch.Generator().manual_seed(1)
        shape = (batch_size, self.horizon, self.action_dim)
        draws = {"noise": torch.randn(shape, generator=generator)}
        if training:
            draws["time"] = torch.randint(self.num_train_timesteps, (batch_size,), generator=generator)
            sizes = [feature.shape for feature in self.image_features.values()]
            calls = len(sizes) if self.use_separate_rgb_encoder_per_camera else len(set(sizes))
            if calls and self.crop_shape and self.crop_is_random:
                draws["crop_offsets"] = torch.zeros(calls, 2, dtype=torch.long)
        elif self.noise_scheduler_type == "DDPM":
            draws["step_noise"] = torch.randn(self.denoising_steps - 1, *shape, generator=generator)
        return draws

    # --- validation -----------------------------------------------------------------------------------

    def validate_horizon(self) -> None:
        """Check that the horizon can be halved on every level, and holds the actions to execute."""
        factor = 2 ** len(self.down_dims)
        if self.horizon < 1 or self.horizon % factor:
            raise InvalidConfigError(
                f"horizon={self.horizon} must be a multiple of {factor}: 2^len(down_dims), down_dims={self.down_dims}."
            )
        most = self.horizon - self.n_obs_steps + 1
        if not 1 <= self.n_action_steps <= most:
            raise InvalidConfigError(
                f"n_action_steps={self.n_action_steps} must lie between 1 and {most}: of horizon={self.horizon} "
                f"actions, the first {self.n_obs_steps - 1} belong to past observations (n_obs_steps="
                f"{self.n_obs_steps})."
            )
        if self.drop_n_last_frames is not None and self.drop_n_last_frames < 0:
            raise InvalidConfigError(f"drop_n_last_frames={self.drop_n_last_frames} must be at least 0.")

    def validate_unet(self) -> None:
        """Check that the U-Net can be built."""
        if self.n_groups < 1:
            raise InvalidConfigError(f"n_groups={self.n_groups} must be at least 1.")
        if not self.down_dims or any(width < 1 or width % self.n_groups for width in self.down_dims):
            raise InvalidConfigError(
                f"down_dims={self.down_dims} must be multiples of n_groups={self.n_groups}, at least one of them."
            )
        if self.down_dims[0] % 8:
            raise InvalidConfigError(
                f"down_dims={self.down_dims}: the first must be a multiple of 8, the groups of the last convolution."
            )
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise InvalidConfigError(
                f"kernel_size={self.kernel_size} must be odd, so that the horizon keeps its length."
            )
        if self.diffusion_step_embed_dim < 4 or self.diffusion_step_embed_dim % 2:
            raise InvalidConfigError(
                f"diffusion_step_embed_dim={self.diffusion_step_embed_dim} must be even and at least 4: sines and "
                f"cosines of the timestep."
            )

    def validate_scheduler(self) -> None:
        """Check that noise can be added, and taken away in no more steps than it was added."""
        if self.num_train_timesteps < 1:
            raise InvalidConfigError(f"num_train_timesteps={self.num_train_timesteps} must be at least 1.")
        if self.num_inference_steps is not None and not 1 <= self.num_inference_steps <= self.num_train_timesteps:
            raise InvalidConfigError(
                f"num_inference_steps={self.num_inference_steps} must lie between 1 and num_train_timesteps="
                f"{self.num_train_timesteps}."
            )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InvalidConfigError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} must rise within (0, 1)."
            )
        if not self.clip_sample_range > 0:
            raise InvalidConfigError(f"clip_sample_range={self.clip_sample_range} must be positive.")

    def validate_vision(self) -> None:
        """Check that the image encoder exists, and that its norm fits its start weights."""
        if self.vision_backbone not in RESNETS and not self.vision_config:
            raise InvalidConfigError(
                f"vision_backbone={self.vision_backbone!r} is not known. {nearest(self.vision_backbone, RESNETS)} "
                f"Another ResNet is described by vision_config={{'hidden_sizes': …, 'depths': …, …}}."
            )
        if self.use_group_norm and self.pretrained_backbone_weights is not None:
            raise InvalidConfigError(
                f"use_group_norm=True cannot use pretrained_backbone_weights={self.pretrained_backbone_weights!r}, "
                f"which were trained with batch norm. Set pretrained_backbone_weights=None, or use_group_norm=False."
            )
        if self.spatial_softmax_num_keypoints < 1:
            raise InvalidConfigError(
                f"spatial_softmax_num_keypoints={self.spatial_softmax_num_keypoints} must be at least 1."
            )

    def validate_crop(self) -> None:
        """Check that the crop fits into every image."""
        for name, shape in (("resize_shape", self.resize_shape), ("crop_shape", self.crop_shape)):
            if shape is not None and min(shape) < 1:
                raise InvalidConfigError(f"{name}={shape} must be (height, width), each at least 1.")
        if self.crop_shape is None:
            return
        sizes = {name: self.resize_shape or feature.shape[1:] for name, feature in self.image_features.items()}
        for name, size in sizes.items():
            if self.crop_shape[0] > size[0] or self.crop_shape[1] > size[1]:
                raise InvalidConfigError(
                    f"crop_shape={self.crop_shape} does not fit into {name}, which is {size[0]} × {size[1]} pixels. "
                    f"Choose a smaller one, or crop_shape=None for the whole image."
                )

    def validate_language(self) -> None:
        """Check that the text encoder is known where an instruction is to be read."""
        if not self.use_language_conditioning:
            return
        if self.language_model_name is None and self.language_config is None:
            raise InvalidConfigError(
                "use_language_conditioning=True needs a text encoder: language_model_name="
                "'openai/clip-vit-base-patch32' (a Hub id or a folder), or its language_config={…}."
            )
        width = (self.language_config or {}).get("projection_dim", self.language_embedding_dim)
        if self.language_embedding_dim is not None and width != self.language_embedding_dim:
            raise InvalidConfigError(
                f"language_embedding_dim={self.language_embedding_dim} disagrees with language_config, whose "
                f"projection_dim is {width}. Leave language_embedding_dim out."
            )
        if self.language_projection_dim < 1:
            raise InvalidConfigError(f"language_projection_dim={self.language_projection_dim} must be at least 1.")
        if not 0 <= self.language_dropout_prob < 1:
            raise InvalidConfigError(f"language_dropout_prob={self.language_dropout_prob} must lie in [0, 1).")


def _camera_shapes(image_features: Any) -> list[tuple[int, ...]]:
    """Return (c, h, w) per camera of `(c, h, w)`, `(v, c, h, w)` or features by name."""
    if isinstance(image_features, Mapping):
        return [PolicyFeature.from_value(feature).shape for feature in image_features.values()]
    sizes = tuple(image_features or ())
    if len(sizes) not in (0, 3, 4):
        raise InvalidConfigError(f"image_features={image_features!r} must be (c, h, w) or (cameras, c, h, w).")
    return [sizes[-3:]] * (sizes[0] if len(sizes) == 4 else min(len(sizes), 1))
