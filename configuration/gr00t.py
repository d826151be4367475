"""What the configurations of GR00T N1.5 and N1 share (NVIDIA 2025, arXiv 2503.14734)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..errors import InvalidConfigError, UnknownConfigFieldError, nearest
from .eagle import EagleBaseConfig
from .features import STATE
from .flow_matching import FlowmatchingActionHeadConfig
from .strict import completed
from .vision_language_action import VisionLanguageActionConfig

NEW_EMBODIMENT = "new_embodiment"
# The transformer of both published heads.
DIT: dict[str, Any] = {
    "attention_head_dim": 48,
    "dropout": 0.2,
    "final_dropout": True,
    "interleave_self_attention": True,
    "norm_type": "ada_norm",
    "num_attention_heads": 32,
    "num_layers": 16,
    "output_dim": 1024,
    "positional_embeddings": None,
}
# Fields that are completed with the published values.
_NESTED = ("backbone_cfg", "action_head_cfg", "eagle_config", "embodiment_ids")
# Values of a nested field that a published config.json repeats at its top.
_REPEATED = ("action_dim", "action_horizon", "hidden_size")


def nested(field: str, name: str) -> property:
    """Return a property that reads and writes one value of a nested field, such as `backbone_cfg["select_layer"]`."""

    def read(config: GR00TConfig) -> Any:
        return getattr(config, field)[name]

    def write(config: GR00TConfig, value: Any) -> None:
        setattr(config, field, getattr(config, field) | {name: value})

    return property(read, write, doc=f"Shorthand for {field}[{name!r}].")


class GR00TConfig(VisionLanguageActionConfig):
    """Hold what GR00T N1.5 and N1 share; see `GR00TN1_5Config` and `GR00TN1Config`."""

    robot_fields: ClassVar[tuple[str, ...]] = ("optional_cameras", "embodiment_tag", "state_parts", "action_parts")
    other_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "embodiment_id")
    # Pictures reach the network in [-1, 1], whatever they show.
    default_normalization: ClassVar[Mapping[str, str]] = {
        "VISUAL": "IDENTITY",
        "STATE": "MIN_MAX",
        "ENV": "MIN_MAX",
        "ACTION": "MIN_MAX",
    }
    # The published values that complete the nested fields, where the classes that check them have others.
    default_backbone: ClassVar[Mapping[str, Any]]
    default_head: ClassVar[Mapping[str, Any]]
    default_embodiments: ClassVar[Mapping[str, int]]
    eagle_class: ClassVar[type[EagleBaseConfig]]
    head_class: ClassVar[type[FlowmatchingActionHeadConfig]]
    feature_width_name: ClassVar[str]  # of the width of the features in `action_head_cfg`

    backbone_cfg: dict[str, Any] | None = None
    action_head_cfg: dict[str, Any] | None = None
    eagle_config: dict[str, Any] | None = None
    compute_dtype: str = "bfloat16"
    model_dtype: str = "float32"

    n_action_steps: int | None = None

    embodiment_tag: str = NEW_EMBODIMENT
    embodiment_ids: dict[str, int] | None = None
    state_parts: dict[str, Any] | None = None
    action_parts: dict[str, Any] | None = None

    tokenizer_name: str | None = None
    max_instruction_tokens: int = 256
    image_crop_scale: float = 0.95
    attention_implementation: str | None = None

    select_layer = nested("backbone_cfg", "select_layer")
    tune_llm = nested("backbone_cfg", "tune_llm")
    tune_visual = nested("backbone_cfg", "tune_visual")
    reproject_vision = nested("backbone_cfg", "reproject_vision")
    project_to_dim = nested("backbone_cfg", "project_to_dim")
    tune_projector = nested("action_head_cfg", "tune_projector")
    tune_diffusion_model = nested("action_head_cfg", "tune_diffusion_model")
    max_state_dim = nested("action_head_cfg", "max_state_dim")
    max_num_embodiments = nested("action_head_cfg", "max_num_embodiments")
    num_inference_timesteps = nested("action_head_cfg", "num_inference_timesteps")
    diffusion_model_cfg = nested("action_head_cfg", "diffusion_model_cfg")
    mask_padding = nested("action_head_cfg", "mask_padding")

    def __post_init__(self, **kwargs):
        given = {name: kwargs.pop(name) for name in self.shorthands() if name in kwargs}
        for name in _REPEATED:
            self._check_repeated(name, given)
        hidden_size = given.pop("hidden_size", None)
        for field in _NESTED:
            setattr(self, field, self._whole(field, getattr(self, field)))
        super().__post_init__(**kwargs)
        for name, value in given.items():
            setattr(self, name, value)
        if hidden_size not in (None, self.hidden_size):
            raise InvalidConfigError(
                f"hidden_size={hidden_size}, but the language model in eagle_config has {self.hidden_size}, and it is "
                f"that model's width. Leave hidden_size out."
            )

    def _check_repeated(self, name: str, given: Mapping[str, Any]) -> None:
        """Check a value that stands both at the top and in `action_head_cfg`; the head's `hidden_size` is its own."""
        inner = (self.action_head_cfg or {}).get(name)
        if name != "hidden_size" and name in given and inner not in (None, given[name]):
            raise InvalidConfigError(
                f"{name}={given[name]} disagrees with action_head_cfg[{name!r}]={inner}. Give one of the two."
            )

    @classmethod
    def shorthands(cls) -> list[str]:
        """Return the names that stand for a nested field's value: in the constructor, at loading, on assignment."""
        own = {
            name: value for kind in cls.__mro__ if issubclass(kind, GR00TConfig) for name, value in vars(kind).items()
        }
        return ["hidden_size", *(n for n, v in own.items() if isinstance(v, property) and v.fset is not None)]

    def _whole_chunk(self) -> int | None:
        return (self.__dict__.get("action_head_cfg") or {}).get("action_horizon")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NESTED and "_post_init_done" in self.__dict__:
            value = self._whole(name, value)
        super().__setattr__(name, value)

    @classmethod
    def _completed(cls, name: str, value: Any) -> Any:
        return value.to_dict() if isinstance(value, PreTrainedConfig) else super()._completed(name, value)

    def _whole(self, name: str, value: Any) -> Any:
        """Return a nested field with the published values where none are given."""
        if name == "eagle_config":
            return self.eagle_class.of(value).fields()
        if name == "embodiment_ids":
            return dict(self.default_embodiments) if value is None else value
        if name == "backbone_cfg":
            return dict(self.default_backbone) | (value or {})
        own = {name: self.head_class.__dataclass_fields__[name].default for name in self.head_class.field_names()}
        return own | dict(self.default_head) | (value or {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> GR00TConfig:
        """Build the config from saved JSON; `kwargs` override fields and nested values before anything is checked."""
        values = dict(config_dict)
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in (*cls.field_names(), *cls.shorthands())}
        head = completed(values.get("action_head_cfg") or {}, given.get("action_head_cfg") or {})
        widths = {given[name] for name in ("action_dim", "max_action_dim") if name in given}
        if len(widths) == 1:
            head |= dict.fromkeys(("action_dim", "max_action_dim"), *widths)
        if "action_horizon" in given:
            if values.get("n_action_steps") == head.get("action_horizon"):
                values.pop("n_action_steps", None)  # the whole chunk, before and after
            head["action_horizon"] = given["action_horizon"]
        return super().from_dict(completed(values, given) | {"action_head_cfg": head}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, those that the published config.json repeats at its top too."""
        return super().to_dict() | {name: getattr(self, name) for name in _REPEATED}

    # --- what follows from the fields -----------------------------------------------------------------

    @property
    def action_horizon(self) -> int:
        """Actions that one forward pass predicts; an action chunk that is executed whole stays so when it is set."""
        return self.action_head_cfg["action_horizon"]

    @action_horizon.setter
    def action_horizon(self, value: int) -> None:
        executed_whole = self.n_action_steps == self.action_horizon
        self.action_head_cfg = self.action_head_cfg | {"action_horizon": value}
        if executed_whole:
            self.n_action_steps = value

    @property
    def action_dim(self) -> int:
        """Width of an action as the network sees it, padded; the robot's own is `robot_action_dim`."""
        return self.action_head_cfg["action_dim"]

    @action_dim.setter
    def action_dim(self, value: int) -> None:
        self.action_head_cfg = self.action_head_cfg | {"action_dim": value, "max_action_dim": value}

    @property
    def max_action_dim(self) -> int:
        """Width of an action as the network sees it, as π0 calls it: `action_dim`."""
        return self.action_dim

    @max_action_dim.setter
    def max_action_dim(self, value: int) -> None:
        self.action_dim = value

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self._language_config["hidden_size"]

    @property
    def model_state_dim(self) -> int:
        """Width of the state as the network sees it, padded: `max_state_dim`."""
        return self.max_state_dim

    @property
    def model_action_dim(self) -> int:
        """Width of an action as the network sees it, padded: `action_dim`."""
        return self.action_dim

    @property
    def embodiment_id(self) -> int:
        """The slot of the robot's projectors: that of `embodiment_tag`."""
        return self.embodiment_ids[self.embodiment_tag]

    @property
    def image_token_index(self) -> int:
        """The id of the token in whose place a picture's token stands."""
        raise NotImplementedError(f"{type(self).__name__} must say its image_token_index")

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that the network sees."""
        return self.eagle_config["vision_config"]["image_size"]

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Shape (3, height, width) of the pictures that the network sees."""
        return (3, self.image_size, self.image_size)

    @property
    def tokens_per_image(self) -> int:
        """Image tokens in the prompt of one picture."""
        return self.eagle_class.of(self.eagle_config).image_tokens()

    @property
    def projects_features(self) -> bool:
        """Whether the backbone projects the language model's features to `project_to_dim`."""
        return self.project_to_dim is not None

    @property
    def features_width(self) -> int:
        """Width of the features that the backbone gives."""
        return self.project_to_dim if self.projects_features else self.hidden_size

    def head_config(self) -> FlowmatchingActionHeadConfig:
        """Return the config of the action head."""
        return self.head_class(**self.action_head_cfg)

    @property
    def _language_config(self) -> dict[str, Any]:
        return self.eagle_config[self.eagle_class.language_field]

    # --- checks ---------------------------------------------------------------------------------------

    def require_features(self) -> None:
        """Check the config before a network is built; features may still be absent: one network serves many robots."""
        self.validate()

    def validate_horizon(self) -> None:
        """Check that no more actions are executed than predicted."""
        if self.n_action_steps is not None and not 1 <= self.n_action_steps <= self.action_horizon:
            raise InvalidConfigError(
                f"n_action_steps={self.n_action_steps} must lie between 1 and action_horizon={self.action_horizon}."
            )

    def validate_nested(self) -> None:
        """Check that the nested fields hold names that exist, and that backbone and head fit each other."""
        for name in self.backbone_cfg:
            if name not in self.default_backbone:
                raise UnknownConfigFieldError(f"{type(self).__name__}.backbone_cfg", name, self.default_backbone)
        head = self.head_config()
        if not head.dit_config().interleave_self_attention:
            raise InvalidConfigError(
                "action_head_cfg['diffusion_model_cfg'] has interleave_self_attention=False, as it has where it is "
                "not said: the tokens of state and actions would never see each other, and the actions would not "
                "depend on the state. Set it to True, as NVIDIA does."
            )
        features_dim = head.features_dim
        if features_dim != self.features_width:
            raise InvalidConfigError(
                f"The backbone's features have width {self.features_width}, by eagle_config and backbone_cfg, but the "
                f"action head reads features of width {features_dim}: {self.feature_width_name} in action_head_cfg."
            )

    def validate_layers(self) -> None:
        """Check that a number of layers is asked for, where one is."""
        count = self.backbone_cfg.get("select_layer")
        if isinstance(count, bool) or not isinstance(count, (int, type(None))):
            raise InvalidConfigError(f"select_layer={count!r} is no number of layers, such as 12.")

    def validate_widths(self) -> None:
        """Check that state and actions fit into the widths that the network has."""
        widths = {
            "max_state_dim": (self.max_state_dim, self._encoded_state_dim),
            "action_dim": (self.action_dim, self._robot_action_dim or 1),
        }
        for name, (limit, width) in widths.items():
            if limit < width:
                raise InvalidConfigError(
                    f"{name}={limit}, but the features need {width}. A pretrained GR00T cannot be widened; trained "
                    f"anew, it takes {name}={width}."
                )

    @property
    def _encoded_state_dim(self) -> int:
        """Width of the state before it is padded: a part in sines and cosines is twice as wide as its angles."""
        parts = (self.state_parts or {}).values()
        return (self.state_dim or 0) + sum(part.get("width", 0) for part in parts if part.get("mode") == "sin_cos")

    def validate_parts(self) -> None:
        """Check that the parts of state and action are as wide together as their features."""
        for name, feature in (("state_parts", self.state_dim), ("action_parts", self._robot_action_dim)):
            parts = getattr(self, name)
            if parts is None or feature is None:
                continue
            widths = {part: dict(described).get("width", 0) for part, described in parts.items()}
            if sum(widths.values()) != feature:
                raise InvalidConfigError(
                    f"{name} have the widths {widths}, {sum(widths.values())} together, but the feature has "
                    f"{feature}. For a robot without parts: {name}=None."
                )

    @property
    def _robot_action_dim(self) -> int | None:
        return self.robot_action_dim if self.output_features else None

    def validate_pictures(self) -> None:
        """Check that something of the pictures is left."""
        if not 0 < self.image_crop_scale <= 1:
            raise InvalidConfigError(f"image_crop_scale={self.image_crop_scale} must lie above 0 and up to 1.")

    def validate_embodiment(self) -> None:
        """Check that the robot has projectors of its own."""
        if self.embodiment_tag not in self.embodiment_ids:
            raise InvalidConfigError(
                f"embodiment_tag={self.embodiment_tag!r} has no slot. "
                f"{nearest(self.embodiment_tag, self.embodiment_ids)} A robot of your own is {NEW_EMBODIMENT!r}, or "
                f"has a free slot: embodiment_ids={{{self.embodiment_tag!r}: 30}}."
            )
        if not 0 <= self.embodiment_id < self.max_num_embodiments:
            raise InvalidConfigError(
                f"embodiment_ids has {self.embodiment_tag!r} in slot {self.embodiment_id}, but there are "
                f"max_num_embodiments={self.max_num_embodiments}: 0 to {self.max_num_embodiments - 1}."
            )

    # --- examples -------------------------------------------------------------------------------------

    @property
    def vocabulary_size(self) -> int:
        """Rows of the language model's embedding."""
        return self._language_config["vocab_size"]

    def set_vocabulary_size(self, rows: int) -> None:
        """Set the rows of the language model's embedding."""
        field = self.eagle_class.language_field
        self.eagle_config = self.eagle_config | {field: self._language_config | {"vocab_size": rows}}
        self.validate()

    def example_inputs(self, batch_size: int = 2, absent_cameras: Sequence[str] = ()) -> dict[str, Any]:
        """Return valid model inputs, labels included; see `PolicyConfig.example_inputs`.

        A config without features gives those of a robot with one camera.
        """
        import torch

        if not self.input_features or not self.output_features:
            return self._of_any_robot().example_inputs(batch_size)
        inputs = super().example_inputs(batch_size, absent_cameras)
        generator = torch.Generator().manual_seed(1)
        views = len(self.image_features)
        if views:
            pictures = torch.randn(batch_size, views, 3, self.image_size, self.image_size, generator=generator)
            inputs["pixel_values"] = pictures
        words = self.vocabulary_size - 1
        text = torch.randint(words, (batch_size, 6 + 2 * views), generator=generator)
        text += text >= self.image_token_index  # any word, but no image token
        image = torch.full((batch_size, self.tokens_per_image), self.image_token_index)
        pieces = []
        for view, name in enumerate(self.image_features):
            pieces += [text[:, 2 * view : 2 * view + 2], *([] if name in absent_cameras else [image])]
        inputs["input_ids"] = torch.cat([*pieces, text[:, 2 * views :]], dim=1)  # (b, n)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        slots = [self.embodiment_id, *self.embodiment_ids.values()]  # of other robots too, as far as there are slots
        slots = [slot for slot in dict.fromkeys(slots) if slot < self.max_num_embodiments]
        inputs["embodiment_id"] = torch.tensor([slots[i % len(slots)] for i in range(batch_size)])
        return inputs

    def _of_any_robot(self) -> GR00TConfig:
        """Return this config for a robot with one camera, and states and actions as wide as the network's."""
        fields = {name: getattr(self, name) for name in self.field_names()}
        camera = {"type": "VISUAL", "shape": (3, self.image_size, self.image_size)}
        state, action = self.max_state_dim, self.action_dim
        fields["input_features"] = {
            "observation.images.camera": camera,
            STATE: {"type": "STATE", "shape": (state,)},
        }
        fields["output_features"] = {"action": {"type": "ACTION", "shape": (action,)}}
        return type(self)(**fields)

    def example_draws(self, batch_size: int = 2, training: bool = False) -> dict[str, Any]:
        """Return the noise (b, h, a), and in training the flow times (b,), of a forward pass."""
        import torch

        generator = torch.Generator().manual_seed(2)
        expanded = batch_size * (self.action_head_cfg.get("expand_batch") or 1) if training else batch_size
        noise = torch.randn(expanded, self.action_horizon, self.action_dim, generator=generator)
        return {"noise": noise} | ({"time": torch.rand(expanded, generator=generator)} if training else {})
