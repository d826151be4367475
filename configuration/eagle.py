"""Configurations of Eagle 2 and Eagle 2.5, with which GR00T N1 and N1.5 see and read.

Sources: Li et al. 2025 (arXiv 2501.14818), Chen et al. 2025 (arXiv 2504.15271) and NVIDIA's Isaac-GR00T, whose field
names are kept.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from ..errors import InvalidConfigError, UnknownConfigFieldError, nearest
from .strict import part_config

# The sizes of the published models: both see through SigLIP 2 at 224 pixels; N1 reads with SmolLM2-1.7B, N1.5 with
# Qwen3-1.7B.
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 49164,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 130000,
    "pad_token_id": 2,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151680,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
}

VISION = {"siglip_vision_model": SiglipVisionConfig}
LANGUAGE = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}

# Under these names transformers 4 wrote what `rope_parameters` holds today.
_ROPE = ("rope_theta", "rope_scaling")
# What else transformers 4 wrote into every config, whatever the model, and what these models' authors left in theirs.
_LEFTOVERS = {
    *("add_cross_attention", "cross_attention_hidden_size", "is_decoder", "tie_encoder_decoder", "pruned_heads"),
    *("finetuning_task", "task_specific_params", "prefix", "sep_token_id", "tokenizer_class", "output_attentions"),
    *("torch_dtype", "torchscript", "tf_legacy_loss", "use_bfloat16", "tie_word_embeddings", "auto_map"),
    *("attn_implementation", "drop_path_rate", "my_rope_scaling", "transformers.js_config"),
}
_GENERATION = frozenset(GenerationConfig().to_dict())


def _says_nothing(name: str) -> bool:
    """Tell whether a field may stand in any config.json and changes nothing here: of generation, dtype, kernel."""
    return (
        name.startswith("_")
        or name in _LEFTOVERS
        or name in PreTrainedConfig.__dataclass_fields__
        or name in _GENERATION
    )


def _own_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    every = PreTrainedConfig.__dataclass_fields__
    return [field.name for field in dataclasses.fields(config_class) if field.name not in every]


def _part(
    title: str,
    default: Mapping[str, Any],
    given: Mapping[str, Any] | PreTrainedConfig | None,
    classes: Mapping[str, type[PreTrainedConfig]],
) -> PreTrainedConfig:
    """Return transformers' config of one part: the given fields, and the default's for those that are not given."""
    given = given.to_dict() if isinstance(given, PreTrainedConfig) else dict(given or {})
    model_type = given.get("model_type", default["model_type"])
    if model_type not in classes:
        raise InvalidConfigError(f"{title} has model_type={model_type!r}. {nearest(str(model_type), classes)}")
    config_class = classes[model_type]
    known = [*_own_fields(config_class), *_ROPE]
    for name in given:
        if name not in known and not _says_nothing(name):
            raise UnknownConfigFieldError(title, name, known)
    fields = {name: value for name, value in given.items() if name in known}
    if model_type == default["model_type"]:
        rope = _ROPE if fields.get("rope_parameters") else ()
        fields = {name: value for name, value in default.items() if name not in ("model_type", *rope)} | fields
    if classes is VISION:
        fields["vision_use_head"] = False  # it pools the patches into one vector, which nothing here reads
    return part_config(title, config_class, **fields)


def _plain_part(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what sets the part apart, without what follows from the rest and would hinder changing it."""
    fields = {name: getattr(config, name) for name in _own_fields(type(config)) if name != "vision_use_head"}
    if set(fields.get("layer_types") or ()) == {"full_attention"}:
        del fields["layer_types"]
    return {"model_type": config.model_type} | {name: value for name, value in fields.items() if value is not None}


class EagleBaseConfig(PreTrainedConfig):
    """Configure a vision tower whose patches stand in a language model's prompt: what Eagle 2 and 2.5 share.

    Published fields that only concern the image processor or NVIDIA's own training are read, kept and change nothing
    here: `dynamic_image_size`, `use_thumbnail`, `pad2square`, `template`, `loss_version`, `mlp_checkpoint`.

    Args:
        vision_config (`dict` or `SiglipVisionConfig`, *optional*): fields in which the tower differs from SigLIP 2
            So400m at 224 pixels.
        downsample_ratio (`float`, *optional*, defaults to 0.5): 1/k where k × k patches are stacked into one token.
        force_image_size (`int`, *optional*): the size of the pictures, once more; by default the tower's.
        select_layer (`int`, *optional*, defaults to -1): the vision layer that is read, always the last. (How many
            language layers are kept is the backbone's `select_layer`.)

    Raises:
        InvalidConfigError: parts that do not fit each other, or a published variant that does not exist here.
        UnknownConfigFieldError: a field that does not exist, in a part as well.
    """

    language_field: ClassVar[str]
    language_default: ClassVar[Mapping[str, Any]]

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    downsample_ratio: float | int = 0.5
    force_image_size: int | None = None
    select_layer: int = -1
    template: str | None = None
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    pad2square: bool = False
    mlp_checkpoint: bool = False
    loss_version: str | None = "efficient_v2_cp_head"
    use_backbone_lora: int = 0
    use_llm_lora: int = 0

    def __post_init__(self, **kwargs):
        for name in kwargs:
            if not _says_nothing(name):
                raise UnknownConfigFieldError(type(self).__name__, name, _own_fields(type(self)))
        name = self.language_field
        self.vision_config = _part("vision_config", SIGLIP, self.vision_config, VISION)
        self._check_squares()
        setattr(self, name, _part(name, self.language_default, getattr(self, name), LANGUAGE))
        if self.force_image_size is None:
            self.force_image_size = self.vision_config.image_size
        super().__post_init__(**kwargs)
        self._check_variant()
        self._check_grid()

    @classmethod
    def of(cls, given: Mapping[str, Any] | PreTrainedConfig | None) -> "EagleBaseConfig":
        """Return the config for fields, for a config object of any class, or with its defaults for None."""
        if isinstance(given, cls):
            return given
        fields = given.to_dict() if isinstance(given, PreTrainedConfig) else dict(given or {})
        try:
            return cls(**fields)
        except StrictDataclassError as error:
            raise InvalidConfigError(f"{cls.__name__}: {error}") from error

    def fields(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, the parts' as nested mappings; `of` reads them again."""
        values = {name: getattr(self, name) for name in _own_fields(type(self))}
        return {name: _plain_part(v) if isinstance(v, PreTrainedConfig) else v for name, v in values.items()}

    # --- what follows from the fields -------------------------------------------------------------------

    @property
    def language_config(self) -> PreTrainedConfig:
        """The language model's config, whole."""
        return getattr(self, self.language_field)

    def truncated_language_config(self, layers: int) -> PreTrainedConfig:
        """Return the config of the language model's first so many layers.

        Raises:
            InvalidConfigError: it has not so many, or none are asked for.
        """
        whole = self.language_config
        if not isinstance(layers, int) or not 1 <= layers <= whole.num_hidden_layers:
            raise InvalidConfigError(
                f"select_layer={layers!r}: the language model's layers are kept, 1 to {whole.num_hidden_layers}. "
                f"Pass select_layer={whole.num_hidden_layers} for all of them."
            )
        fields = _plain_part(whole) | {"num_hidden_layers": layers}
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][:layers]
        return type(whole)(**{name: value for name, value in fields.items() if name != "model_type"})

    @property
    def stacked_patches(self) -> int:
        """k, where k × k patches become one token: 1 without pixel shuffle."""
        return round(1 / self.downsample_ratio) if self.use_pixel_shuffle else 1

    def image_tokens(self, scale: int = 1) -> int:
        """Return how many tokens one picture becomes, where it is so many times as large as the tower's pictures."""
        return (self.vision_config.image_size // self.vision_config.patch_size * scale // self.stacked_patches) ** 2

    # --- what is refused --------------------------------------------------------------------------------

    def _check_variant(self) -> None:
        name = type(self).__name__
        if self.select_layer != -1:
            raise InvalidConfigError(
                f"{name}.select_layer={self.select_layer}: only the last vision layer, -1, is read."
            )
        for field in ("use_backbone_lora", "use_llm_lora"):
            if getattr(self, field):
                raise InvalidConfigError(
                    f"{name}.{field}={getattr(self, field)}: merge the adapter's weights, set it 0."
                )
        if self.force_image_size != self.vision_config.image_size:
            raise InvalidConfigError(
                f"{name}.force_image_size={self.force_image_size}, but vision_config.image_size="
                f"{self.vision_config.image_size}: the tower sees pictures of one size."
            )
        if self.mlp_connector_layers not in (1, 2):
            raise InvalidConfigError(f"{name}.mlp_connector_layers={self.mlp_connector_layers} must be 1 or 2.")

    def _check_squares(self) -> None:
        sides = {name: getattr(self.vision_config, name) for name in ("image_size", "patch_size")}
        if not all(isinstance(side, int) for side in sides.values()):
            raise InvalidConfigError(f"vision_config has {sides}: the tower sees squares, so pass one side of each.")

    def _check_grid(self) -> None:
        size, patch = self.vision_config.image_size, self.vision_config.patch_size
        ratio = self.downsample_ratio
        if not 0 < ratio <= 1 or abs(round(1 / ratio) * ratio - 1) > 1e-6:
            raise InvalidConfigError(f"downsample_ratio={ratio} must be 1/k, such as 0.5.")
        if size // patch % self.stacked_patches:
            raise InvalidConfigError(
                f"downsample_ratio={ratio} stacks {self.stacked_patches} × {self.stacked_patches} "
                f"patches, which do not tile the {size // patch} × {size // patch} of a picture."
            )


@strict
class EagleConfig(EagleBaseConfig):
    """Configure Eagle 2, of GR00T N1: pixel shuffle, then a connector of two layers, then a Llama-type model.

    Args:
        llm_config (`dict` or `PreTrainedConfig`, *optional*): fields in which it differs from SmolLM2-1.7B; another
            `model_type` (`"qwen2"`, `"qwen3"`) starts from its own defaults.
        min_dynamic_patch, max_dynamic_patch (`int`): tiles per picture, a matter of the image processor.
        ps_version (`str`, *optional*, defaults to `"v2"`): of the pixel shuffle; there is no other.
        fields: see `EagleBaseConfig`.
    """

    model_type = "eagle_chat"
    language_field = "llm_config"
    language_default = SMOLLM2
    use_pixel_shuffle: ClassVar[bool] = True
    mlp_connector_layers: ClassVar[int] = 2

    llm_config: dict[str, Any] | PreTrainedConfig | None = None
    template: str | None = "qwen2-chat"
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    ps_version: str = "v2"
    pre_feature_reduction: bool = False

    def _check_variant(self) -> None:
        super()._check_variant()
        if self.ps_version != "v2" or self.pre_feature_reduction:
            raise InvalidConfigError(
                f"EagleConfig has ps_version={self.ps_version!r} and pre_feature_reduction="
                f"{self.pre_feature_reduction}; only 'v2' and False exist, which GR00T N1 was published with."
            )


@strict
class EagleConfig1_5(EagleBaseConfig):
    """Configure Eagle 2.5, of GR00T N1.5: a connector of one layer, then Qwen3.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*): fields in which it differs from Qwen3-1.7B; another
            `model_type` (`"qwen2"`, `"llama"`) starts from its own defaults.
        image_token_index (`int`, *optional*, defaults to 151669): the token in whose place a picture's token stands.
        use_pixel_shuffle (`bool`, *optional*, defaults to False): stack neighbouring patches, by `downsample_ratio`.
        mlp_connector_layers (`int`, *optional*, defaults to 1): 1, or 2 with a layer norm before them.
        min_dynamic_tiles, max_dynamic_tiles (`int`): tiles per picture, a matter of the image processor.
        fields: see `EagleBaseConfig`.
    """

    model_type = "eagle_2_5_vl"
    language_field = "text_config"
    language_default = QWEN3

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_index: int = 151669
    use_pixel_shuffle: bool = False
    mlp_connector_layers: int = 1
    template: str | None = "qwen3-chat"
    min_dynamic_tiles: int = 1
    max_dynamic_tiles: int = 12
