"""Configuration of π0, a flow-matching vision-language-action policy (Black et al. 2024, arXiv 2410.24164)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import GemmaConfig, PaliGemmaConfig, PreTrainedConfig

from ..errors import InvalidConfigError, UnknownConfigFieldError
from .strict import part_config
from .vision_language_action import VisionLanguageActionConfig

# The sizes of the published model: PaliGemma-3B at 224 pixels, and the action expert of 300 M parameters.
PALIGEMMA: dict[str, Any] = {
    "projection_dim": 2048,
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 257152,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
GEMMA_EXPERT: dict[str, Any] = PALIGEMMA["text_config"] | {"hidden_size": 1024, "intermediate_size": 4096}

# What both streams must agree on, since their queries, keys and values meet in one attention.
_SHARED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")

# The kernels that can attend in blocks, under the names of InternManip's document and under transformers' own.
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention", "flex_attention": "flex_attention"}


def _completed(default: Mapping[str, Any], given: Mapping[str, Any] | PreTrainedConfig | None) -> dict[str, Any]:
    """Return the given values, and the default's where there are none; nested mappings alike."""
    if not isinstance(given, (Mapping, PreTrainedConfig, type(None))):
        raise InvalidConfigError(
            f"{given!r} stands where a part's fields do; write a mapping, such as {dict(default)}."
        )
    values = given.to_dict() if isinstance(given, PreTrainedConfig) else dict(given or {})
    for name, value in default.items():
        values[name] = _completed(value, values.get(name)) if isinstance(value, Mapping) else values.get(name, value)
    return values


@strict
class PaliGemmaWithExpertConfig(PreTrainedConfig):
    """Configure PaliGemma and an action expert that attend to each other.

    Args:
        paligemma_config (`dict` or `PaliGemmaConfig`, *optional*): fields in which PaliGemma differs from PaliGemma-3B
            at 224 pixels, with nested `text_config` and `vision_config`.
        gemma_expert_config (`dict` or `GemmaConfig`, *optional*): fields in which the expert differs from Gemma-300M.
        freeze_vision_encoder (`bool`, *optional*, defaults to False): leave the vision tower as it is in training.
        train_expert_only (`bool`, *optional*, defaults to False): leave all of PaliGemma as it is in training.
        attention_implementation (`str`, *optional*, defaults to `"sdpa"`): `"eager"`, `"sdpa"` or, on a GPU, `"flex"`.
        adaptive_norms (`bool`, *optional*, defaults to False): the flow time scales, shifts and gates what the
            expert's norms pass, as in π0.5; else they have weights.

    Raises:
        InvalidConfigError: the two cannot attend to each other, or an attention kernel cannot attend in blocks.
        UnknownConfigFieldError: a field that does not exist.
    """

    model_type = "paligemma_with_expert"

    paligemma_config: dict[str, Any] | PreTrainedConfig | None = None
    gemma_expert_config: dict[str, Any] | PreTrainedConfig | None = None
    freeze_vision_encoder: bool = False
    train_expert_only: bool = False
    attention_implementation: str = "sdpa"
    adaptive_norms: bool = False

    def __post_init__(self, **kwargs):
        for name in kwargs:
            if not name.startswith("_") and name not in PreTrainedConfig.__dataclass_fields__ | {"model_type": None}:
                raise UnknownConfigFieldError(type(self).__name__, name, PaliGemmaWithExpertConfig.__annotations__)
        self.paligemma_config = part_config(
            "paligemma_config", PaliGemmaConfig.from_dict, _completed(PALIGEMMA, self.paligemma_config)
        )
        self.gemma_expert_config = part_config(
            "gemma_expert_config", GemmaConfig.from_dict, _completed(GEMMA_EXPERT, self.gemma_expert_config)
        )
        super().__post_init__(**kwargs)
        self._check_attention()
        self._check_streams()

    def _check_attention(self) -> None:
        if self.attention_implementation in ("fa2", "flash_attention_2"):
            raise InvalidConfigError(
                f"attention_implementation={self.attention_implementation!r}: flash attention takes no mask, but here "
                f"what stands earlier must not see state and actions. Use attention_implementation='sdpa', fused too."
            )
        if self.attention_implementation not in ATTENTION:
            raise InvalidConfigError(
                f"attention_implementation={self.attention_implementation!r} is not known. "
                f"Available: {', '.join(ATTENTION)}."
            )

    def _check_streams(self) -> None:
        text, expert = self.paligemma_config.text_config, self.gemma_expert_config
        for name in _SHARED:
            if getattr(text, name) != getattr(expert, name):
                raise InvalidConfigError(
                    f"{name} is {getattr(text, name)} in paligemma_config['text_config'], but {getattr(expert, name)} "
                    f"in gemma_expert_config; the two attend to each other layer by layer, so they must agree."
                )
        if self.paligemma_config.projection_dim != text.hidden_size:
            raise InvalidConfigError(
                f"paligemma_config has projection_dim={self.paligemma_config.projection_dim} and "
                f"text_config.hidden_size={text.hidden_size}: image tokens and word tokens stand in one sequence, so "
                f"they must agree."
            )


class PI0PolicyConfig(VisionLanguageActionConfig):
    """Configure π0. Defaults are the paper's, as openpi and LeRobot publish them.

    States and actions of any width up to `max_state_dim` and `max_action_dim` are padded with zeros by the processor,
    so that one set of weights serves many robots.

    Args:
        chunk_size (`int`, *optional*, defaults to 50): actions predicted at once, the action horizon.
        n_action_steps (`int`, *optional*): actions executed before the next prediction; by default the whole chunk.
        max_state_dim (`int`, *optional*, defaults to 32): width of the state as the network sees it.
        max_action_dim (`int`, *optional*, defaults to 32): width of an action as the network sees it.
        image_resolution (`tuple[int, int]`, *optional*, defaults to (224, 224)): height and width to which the
            processor brings every picture, by resizing and padding.
        image_padding (`str`, *optional*, defaults to `"centered"`): where a picture of another aspect is padded: on
            both sides, or `"top_left"`, above and to the left only, as LeRobot 0.1 to 0.3 did.
        empty_cameras (`int`, *optional*, defaults to 0): see `VisionLanguageActionConfig`.
        tokenizer_name (`str`, *optional*, defaults to `"google/paligemma-3b-pt-224"`): Hub id or folder of PaliGemma's
            tokenizer. The default is gated: ask for access, or pass `tokenizer=` where a processor is built.
        max_instruction_tokens (`int`, *optional*, defaults to 48): tokens per instruction, padding included.
        paligemma_config (`dict` or `PaliGemmaConfig`, *optional*): fields in which it differs from PaliGemma-3B.
        gemma_expert_config (`dict` or `GemmaConfig`, *optional*): fields in which the expert differs from Gemma-300M.
        freeze_vision_encoder (`bool`, *optional*, defaults to False): leave the vision tower as it is in training.
        train_expert_only (`bool`, *optional*, defaults to False): train the expert and the projections around it only.
        attention_implementation (`str`, *optional*): `"eager"`, `"sdpa"` or, on a GPU, `"flex"`; by default what
            `attn_implementation` asks of every transformers model, which is `"sdpa"`.
        num_inference_steps (`int`, *optional*, defaults to 10): Euler steps from noise to actions.
        time_sampling_beta_alpha, time_sampling_beta_beta, time_sampling_scale, time_sampling_offset (`float`):
            flow times of training are `scale · Beta(alpha, beta) + offset`: more often close to 1, which is noise.
        min_period, max_period (`float`): shortest and longest period of the sines that encode the flow time.
        loss_over (`str`, *optional*, defaults to `"real"`): see `PolicyConfig`; LeRobot trains π0 over `"steps"`,
            openpi over `"all"`.
    """

    model_type = "pi0_policy"
    # Pictures reach the network in [-1, 1], whatever they show.
    default_normalization: ClassVar[Mapping[str, str]] = VisionLanguageActionConfig.default_normalization | {
        "VISUAL": "IDENTITY"
    }
    horizon_field: ClassVar[str] = "chunk_size"

    chunk_size: int = 50
    n_action_steps: int | None = None

    max_state_dim: int = 32
    max_action_dim: int = 32
    image_resolution: tuple[int, int] = (224, 224)
    image_padding: Literal["centered", "top_left"] = "centered"
    tokenizer_name: str | None = "google/paligemma-3b-pt-224"
    max_instruction_tokens: int = 48

    paligemma_config: dict[str, Any] | None = None
    gemma_expert_config: dict[str, Any] | None = None
    freeze_vision_encoder: bool = False
    train_expert_only: bool = False
    attention_implementation: str | None = None

    num_inference_steps: int = 10
    time_sampling_beta_alpha: float = 1.5
    time_sampling_beta_beta: float = 1.0
    time_sampling_scale: float = 0.999
    time_sampling_offset: float = 0.001
    min_period: float = 4e-3
    max_period: float = 4.0

    @classmethod
    def _completed(cls, name: str, value: Any) -> Any:
        if name in ("paligemma_config", "gemma_expert_config") and isinstance(value, PreTrainedConfig):
            return value.to_dict()
        return super()._completed(name, value)

    @property
    def model_state_dim(self) -> int:
        """Width of the state as the network sees it, padded: `max_state_dim`."""
        return self.max_state_dim

    @property
    def model_action_dim(self) -> int:
        """Width of an action as the network sees it, padded: `max_action_dim`."""
        return self.max_action_dim

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Shape (3, height, width) of the pictures that the network sees."""
        return (3, *self.image_resolution)

    def backbone_config(self) -> PaliGemmaWithExpertConfig:
        """Return the config of `PaliGemmaWithExpertModel`, for pictures of `image_resolution`."""
        paligemma = dict(self.paligemma_config or {})
        vision = _completed({}, paligemma.get("vision_config"))
        vision.setdefault("image_size", self.image_resolution[0])
        if (vision["image_size"],) * 2 != self.image_resolution:
            raise InvalidConfigError(
                f"image_resolution={self.image_resolution}, but paligemma_config has vision_config.image_size="
                f"{vision['image_size']}: the vision tower sees squares of that size."
            )
        return PaliGemmaWithExpertConfig(
            paligemma_config=paligemma | {"vision_config": vision},
            gemma_expert_config=self.gemma_expert_config,
            freeze_vision_encoder=self.freeze_vision_encoder,
            train_expert_only=self.train_expert_only,
            attention_implementation=self.attention_implementation or self._attn_implementation or "sdpa",
        )

    def validate_horizon(self) -> None:
        """Check that no more actions are executed than predicted, and that sampling takes steps."""
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise InvalidConfigError(
                f"n_action_steps={self.n_action_steps} must lie between 1 and chunk_size={self.chunk_size}."
            )
        if self.num_inference_steps < 1:
            raise InvalidConfigError(f"num_inference_steps={self.num_inference_steps} must be at least 1.")

    def validate_widths(self) -> None:
        """Check that state and actions fit into the widths that the network has."""
        widths = {
            "max_state_dim": 1 if self.state_in_prompt else self.state_dim or 1,
            "max_action_dim": self.action_dim if self.output_features else 1,
        }
        for name, width in widths.items():
            if getattr(self, name) < width:
                raise InvalidConfigError(
                    f"{name}={getattr(self, name)}, but the features have width {width}. A pretrained π0 cannot be "
                    f"widened; one trained anew takes {name}={width}."
                )

    def validate_backbone(self) -> None:
        """Check that PaliGemma and the expert can be built and attend to each other."""
        self.backbone_config()

    def validate_flow(self) -> None:
        """Check that flow times can be drawn and encoded."""
        for name in ("time_sampling_beta_alpha", "time_sampling_beta_beta", "time_sampling_scale", "min_period"):
            if not getattr(self, name) > 0:
                raise InvalidConfigError(f"{name}={getattr(self, name)} must be positive.")
        if not self.min_period < self.max_period:
            raise InvalidConfigError(f"min_period={self.min_period} must lie below max_period={self.max_period}.")

    @property
    def vocabulary_size(self) -> int:
        """Rows of PaliGemma's embedding."""
        return self.backbone_config().paligemma_config.text_config.vocab_size

    def set_vocabulary_size(self, rows: int) -> None:
        """Set the rows of PaliGemma's embedding."""
        fields = dict(self.paligemma_config or {})
        self.paligemma_config = fields | {"text_config": dict(fields.get("text_config") or {}) | {"vocab_size": rows}}
        self.validate()

    def example_inputs(self, batch_size: int = 2, absent_cameras: Sequence[str] = ()) -> dict[str, Any]:
        """Return valid model inputs, labels included; see `PolicyConfig.example_inputs`."""
        import torch

        inputs = super().example_inputs(batch_size, absent_cameras)
        generator = torch.Generator().manual_seed(1)
        views, n = len(self.image_features), self.max_instruction_tokens
        if views:
            inputs["pixel_values"] = torch.randn(batch_size, views, 3, *self.image_resolution, generator=generator)
        inputs["input_ids"] = torch.randint(0, self.vocabulary_size, (batch_size, n), generator=generator)
        inputs["attention_mask"] = torch.ones(batch_size, n, dtype=torch.long)
        return inputs

    def example_draws(self, batch_size: int = 2, training: bool = False) -> dict[str, Any]:
        """Return the noise (b, h, a), and in training the flow times (b,), of a forward pass."""
        import torch

        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(batch_size, self.chunk_size, self.max_action_dim, generator=generator)
        return {"noise": noise} | ({"time": torch.rand(batch_size, generator=generator)} if training else {})
