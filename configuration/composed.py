"""Configuration of ComposedPolicy: any backbone with any action head.

A component is described by its type and the fields of the config that it is built from where it belongs: an `act`
backbone by those of `ACTConfig`, a `flow_matching` head by those of `FlowmatchingActionHeadConfig`. Features, horizon
and widths are the policy's, and are filled in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from transformers.utils import logging

from ..errors import InvalidConfigError, ManipulatorsError, nearest
from .act import ACTConfig
from .component_fields import unused_fields
from .diffusion import DiffusionConfig
from .features import STATE, FeatureType
from .flow_matching import FlowmatchingActionHeadConfig, FlowmatchingActionHeadConfig_1_5
from .gr00t import DIT, NEW_EMBODIMENT, GR00TConfig
from .gr00t_n1 import GR00TN1Config
from .gr00t_n1_5 import GR00TN1_5Config
from .policy import PolicyConfig
from .strict import StrictConfig

logger = logging.get_logger(__name__)

# What completes the fields of a type. A backbone's config is that of a policy: it also says what the policy reads.
BackboneConfig = Callable[["ComposedConfig", dict[str, Any]], PolicyConfig]
HeadConfig = Callable[["ComposedConfig", dict[str, Any], int], StrictConfig]


LABELS = ("actions", "action_is_pad")


class ComposedConfig(PolicyConfig):
    """Configure a policy that is composed of a registered backbone and a registered action head.

    Args:
        backbone (`dict`): `{"type": …}` and fields of its config.
        action_head (`dict`): `{"type": …}` and fields of its config.
        chunk_size (`int`, *optional*, defaults to 16): actions predicted at once, the action horizon.
        n_action_steps (`int`, *optional*): actions executed before the next prediction; by default the whole chunk.
        normalization_mapping (`dict`, *optional*): by default the backbone's for observations, the head's for actions.
        fields: see `PolicyConfig`.

    Raises:
        InvalidConfigError: a type that is not registered, or two that do not go together.
    """

    model_type = "composed_policy"
    horizon_field: ClassVar[str] = "chunk_size"

    backbone: dict[str, Any] | None = None
    action_head: dict[str, Any] | None = None
    chunk_size: int = 16
    n_action_steps: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        observed = _default_normalization(BACKBONE_CLASSES, self.backbone)
        returned = _default_normalization(HEAD_CLASSES, self.action_head)
        default = dict(observed) | {"ACTION": returned["ACTION"]}
        self.normalization_mapping = default | dict(self.normalization_mapping or {})

    @classmethod
    def _completed(cls, name: str, value: Any) -> Any:
        return value if name == "normalization_mapping" else super()._completed(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build the config from saved JSON; fields of no use, which earlier versions took, are left out by name."""
        values = dict(config_dict)
        for kind in ("backbone", "action_head"):
            if unused := unused_fields(kind, values.get(kind)):
                logger.warning(f"{kind} has {', '.join(unused)}, of which its type makes no use; left out.")
                values[kind] = {name: value for name, value in values[kind].items() if name not in unused}
        return super().from_dict(values, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop("_component_configs", None)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        derived = ("_component_configs", "_backbone_width")
        return {name: value for name, value in super().to_dict().items() if name not in derived}

    # --- the components' configs ----------------------------------------------------------------------

    @property
    def component_configs(self) -> tuple[PolicyConfig | None, StrictConfig | None]:
        """The complete configs of backbone and action head; None for one that has no config, and before there are
        features.

        Raises:
            InvalidConfigError: the two do not go together.
        """
        if "_component_configs" not in self.__dict__:
            self.__dict__["_component_configs"] = self._build_configs()
        return self.__dict__["_component_configs"]

    @property
    def backbone_config(self) -> PolicyConfig | None:
        """The backbone's complete config: that of a policy which has this backbone."""
        return self.component_configs[0]

    @property
    def head_config(self) -> StrictConfig | None:
        """The action head's complete config."""
        return self.component_configs[1]

    def _build_configs(self) -> tuple[PolicyConfig | None, StrictConfig | None]:
        (backbone, fields), (head, head_fields) = self.component("backbone"), self.component("action_head")
        if not (self.input_features and self.output_features):
            return None, None  # their widths follow from the features
        try:
            complete, complete_head = BACKBONES[backbone], ACTION_HEADS[head]
            config = None if complete is None else complete(self, fields)
            # The width of a backbone without a config is known once it is built.
            width = self.backbone_width if config is None else config.features_width
            if complete_head is None or width is None:
                return config, None
            return config, complete_head(self, head_fields, width)
        except ManipulatorsError as error:
            raise InvalidConfigError(
                f"The backbone {backbone!r} does not go with the action head {head!r}: {error}"
            ) from error

    def component(self, kind: str) -> tuple[str, dict[str, Any]]:
        """Return the type and the fields of `backbone` or `action_head`.

        Raises:
            InvalidConfigError: there is no type, or one that is not registered.
        """
        known = {"backbone": BACKBONES, "action_head": ACTION_HEADS}[kind]
        fields = dict(getattr(self, kind) or {})
        given = fields.pop("type", None)
        if given in JOINT:
            raise InvalidConfigError(f"{kind} has the type {given!r}, which does not compose: {JOINT[given]}")
        if given not in known:
            raise InvalidConfigError(
                f"{kind}={getattr(self, kind)!r} has no registered type. {nearest(str(given), known)} "
                f"Write {kind}={{'type': {next(iter(known))!r}}}."
            )
        if unused := unused_fields(kind, getattr(self, kind)):
            raise InvalidConfigError(
                f"{kind}={{'type': {given!r}, …}} has {', '.join(unused)}, of which a {given!r} {kind} makes no use: "
                f"they belong to the other component, or to the policy. Leave them out there."
            )
        return given, fields

    @property
    def backbone_width(self) -> int | None:
        """Width of the features of a backbone without a config, once it is built."""
        return self.__dict__.get("_backbone_width")

    @backbone_width.setter
    def backbone_width(self, value: int) -> None:
        self.__dict__["_backbone_width"] = value
        self.__dict__.pop("_component_configs", None)

    # --- what follows from the components -------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:  # only asked when nothing else has the name
        if not name.startswith("_") and {"backbone", "action_head", "n_action_steps"} <= self.__dict__.keys():
            backbone = self.backbone_config
            if backbone is not None:
                return getattr(backbone, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def reads_instruction(self) -> bool:
        """Whether the backbone reads an instruction."""
        return self.backbone_config is not None and self.backbone_config.reads_instruction

    @property
    def network_resizes_to(self) -> tuple[int, int] | None:
        """The size to which the backbone resizes pictures, if it does."""
        return self.backbone_config.network_resizes_to if self.backbone_config is not None else None

    @property
    def resizes_pictures(self) -> bool:
        """Whether the backbone resizes every picture."""
        return self.backbone_config is not None and self.backbone_config.resizes_pictures

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the embedding of the backbone's language model."""
        return None if self.backbone_config is None else self.backbone_config.vocabulary_size

    @property
    def end_token_id(self) -> int | None:
        """The token at which the backbone summarises an instruction."""
        return None if self.backbone_config is None else self.backbone_config.end_token_id

    @property
    def other_inputs(self) -> tuple[str, ...]:
        """Model inputs that the backbone needs whatever the features say."""
        return () if self.backbone_config is None else self.backbone_config.other_inputs

    @property
    def executed_steps(self) -> slice:
        """Those of the predicted steps that are executed: from the current one on."""
        return getattr(self.head_config, "executed_steps", slice(None))

    # --- checks and examples --------------------------------------------------------------------------

    def validate_horizon(self) -> None:
        """Check that no more actions are executed than predicted."""
        if self.n_action_steps is not None and not 1 <= self.n_action_steps <= self.chunk_size:
            raise InvalidConfigError(
                f"n_action_steps={self.n_action_steps} must lie between 1 and chunk_size={self.chunk_size}."
            )

    def validate_components(self) -> None:
        """Check that backbone and head exist and, once there are features, that they go together."""
        self._build_configs()

    def set_vocabulary_size(self, rows: int) -> None:
        """Set the rows of the embedding of the backbone's language model."""
        if not self.reads_instruction:
            super().set_vocabulary_size(rows)
        before, after = self.backbone_config, copy.deepcopy(self.backbone_config)
        after.set_vocabulary_size(rows)
        changed = [name for name in after.field_names() if getattr(after, name) != getattr(before, name)]
        self.backbone = dict(self.backbone) | {name: getattr(after, name) for name in changed}
        self.validate()

    def example_inputs(self, batch_size: int = 2, absent_cameras: Sequence[str] = ()) -> dict[str, Any]:
        """Return valid model inputs, labels included; see `PolicyConfig.example_inputs`."""
        inputs = super().example_inputs(batch_size, absent_cameras)
        if self.backbone_config is None:
            return inputs
        observed = self.backbone_config.example_inputs(batch_size, absent_cameras)
        return {name: x for name, x in observed.items() if name not in LABELS} | {n: inputs[n] for n in LABELS}

    def example_draws(self, batch_size: int = 2, training: bool = False) -> dict[str, Any]:
        """Return the random numbers of a forward pass; see `PolicyConfig.example_draws`."""
        head, backbone = self.head_config, self.backbone_config
        draws = {} if head is None else _example_draws(self, head, batch_size, training)
        draws.pop("crop_offsets", None)  # the backbone's
        if isinstance(backbone, DiffusionConfig) and training:
            crops = backbone.example_draws(batch_size, training).get("crop_offsets")
            draws |= {} if crops is None else {"crop_offsets": crops}
        return draws


def _default_normalization(known: Mapping[str, type[PolicyConfig]], component: Any) -> Mapping[str, str]:
    given = component.get("type") if isinstance(component, Mapping) else None
    return known.get(given, PolicyConfig).default_normalization


def _example_draws(config: ComposedConfig, head: StrictConfig, batch_size: int, training: bool) -> dict[str, Any]:
    if isinstance(head, PolicyConfig):
        return head.example_draws(batch_size, training)
    import torch

    generator = torch.Generator().manual_seed(2)
    expanded = batch_size * (head.expanded if training else 1)
    noise = torch.randn(expanded, config.chunk_size, config.robot_action_dim, generator=generator)
    return {"noise": noise} | ({"time": torch.rand(expanded, generator=generator)} if training else {})


# --- backbones --------------------------------------------------------------------------------------------


def _shared(config: ComposedConfig) -> dict[str, Any]:
    """Return the fields that every component takes from the policy."""
    names = ("input_features", "output_features", "normalization_mapping", "n_obs_steps", "optional_cameras")
    return {name: getattr(config, name) for name in names}


def _act_backbone(config: ComposedConfig, fields: dict[str, Any]) -> ACTConfig:
    _refuse_vae(fields)
    return ACTConfig(**{"use_vae": False} | fields | _shared(config))


def _diffusion_backbone(config: ComposedConfig, fields: dict[str, Any]) -> DiffusionConfig:
    return DiffusionConfig(**fields | _shared(config))


def _eagle_backbone(
    config_class: type[GR00TConfig], head_fields: Mapping[str, Any] | None = None, *width_fields: str
) -> BackboneConfig:
    """Return what completes an Eagle backbone; the head of its config is never built, and only has to fit.

    Args:
        config_class: of the GR00T that has this backbone.
        head_fields: of that head.
        width_fields: those that are the features' width.
    """

    def complete(config: ComposedConfig, fields: dict[str, Any]) -> GR00TConfig:
        _require_state(config)
        names = ("eagle_config", "tokenizer_name", "max_instruction_tokens", "image_crop_scale")
        own = {name: fields.pop(name) for name in names if name in fields}
        backbone = dict(config_class.default_backbone) | fields
        language = config_class.eagle_class.of(own.get("eagle_config")).language_config.hidden_size
        projects = backbone["project_to_dim"] is not None and backbone.get("projector_dim") != -1
        widths = {"action_dim": config.robot_action_dim, "max_action_dim": config.robot_action_dim}
        widths |= {"max_state_dim": config.state_dim, "max_num_embodiments": 1}
        width = backbone["project_to_dim"] if projects else language
        head = widths | {"diffusion_model_cfg": DIT | {"cross_attention_dim": width}}
        head |= dict(head_fields or {}) | dict.fromkeys(width_fields, width)
        robot = {"embodiment_tag": NEW_EMBODIMENT, "embodiment_ids": {NEW_EMBODIMENT: 0}}
        return config_class(**_shared(config), **own, **robot, backbone_cfg=backbone, action_head_cfg=head)

    return complete


BACKBONE_CLASSES: dict[str, type[PolicyConfig]] = {
    "act": ACTConfig,
    "diffusion": DiffusionConfig,
    "eagle": GR00TN1Config,
    "eagle_1_5": GR00TN1_5Config,
}
BACKBONES: dict[str, BackboneConfig | None] = {
    "act": _act_backbone,
    "diffusion": _diffusion_backbone,
    "eagle": _eagle_backbone(GR00TN1Config),
    "eagle_1_5": _eagle_backbone(GR00TN1_5Config, {"use_vlln": False}, "backbone_embedding_dim"),
}
# Their backbone and head are one network.
JOINT = {"pi0": "its backbone and its action expert attend to each other in every layer. Use PI0Policy."}


# --- action heads -----------------------------------------------------------------------------------------


def _act_head(config: ComposedConfig, fields: dict[str, Any], width: int) -> ACTConfig:
    _refuse_vae(fields)
    _require_width("dim_model", fields.get("dim_model", width), width)
    own = {"chunk_size": config.chunk_size, "n_action_steps": config.n_action_steps}
    own |= {"dim_model": width, "use_vae": False, "optional_cameras": ()}
    # Cameras are the backbone's affair; but a config has some input.
    inputs = config.input_features
    vectors = {name: feature for name, feature in inputs.items() if feature.type is not FeatureType.VISUAL}
    return ACTConfig(**fields | _shared(config) | own | {"input_features": vectors or inputs})


def _diffusion_head(config: ComposedConfig, fields: dict[str, Any], width: int) -> DiffusionConfig:
    # The chunk begins at the oldest observation, whose actions lie in the past.
    executed = min(config.n_action_steps, config.chunk_size - config.n_obs_steps + 1)
    horizon = {"horizon": config.chunk_size, "n_action_steps": executed, "n_obs_steps": config.n_obs_steps}
    return DiffusionConfig(**fields | horizon | {"output_features": config.output_features})


def _flow_head(
    config_class: type[FlowmatchingActionHeadConfig], reads_width: Callable[[dict[str, Any], int], dict[str, Any]]
) -> HeadConfig:
    """Return what completes a flow-matching head; `reads_width` gives the fields that let it read such features."""

    def complete(config: ComposedConfig, fields: dict[str, Any], width: int) -> FlowmatchingActionHeadConfig:
        _require_state(config)
        if config.n_obs_steps != 1:
            raise InvalidConfigError(f"n_obs_steps={config.n_obs_steps}: the head reads 1 state only.")
        robot = {"action_dim": config.robot_action_dim, "max_state_dim": config.state_dim, "max_num_embodiments": 1}
        complete_fields = fields | robot | {"action_horizon": config.chunk_size} | reads_width(fields, width)
        head = config_class(**complete_fields)
        _require_width("the width of the features that it reads", head.features_dim, width)
        return head

    return complete


def _cross_attention(fields: dict[str, Any], width: int) -> dict[str, Any]:
    return {"diffusion_model_cfg": {"cross_attention_dim": width} | (fields.get("diffusion_model_cfg") or DIT)}


def _embedding(fields: dict[str, Any], width: int) -> dict[str, Any]:
    return {"backbone_embedding_dim": fields.get("backbone_embedding_dim", width)}


def _refuse_vae(fields: Mapping[str, Any]) -> None:
    if fields.get("use_vae"):
        raise InvalidConfigError(
            "use_vae=True: the VAE lies in ACT's head and its latent enters ACT's backbone. Use ACTPolicy."
        )


def _require_width(name: str, given: int, width: int) -> None:
    if given != width:
        raise InvalidConfigError(f"{name} is {given}, but the backbone's features have width {width}.")


def _require_state(config: ComposedConfig) -> None:
    if config.state_dim is None:
        raise InvalidConfigError(f"it reads the robot's state; input_features holds no {STATE!r}.")


HEAD_CLASSES: dict[str, type[PolicyConfig]] = {
    "act": ACTConfig,
    "diffusion": DiffusionConfig,
    "flow_matching": GR00TN1Config,
    "flow_matching_1_5": GR00TN1_5Config,
}
ACTION_HEADS: dict[str, HeadConfig | None] = {
    "act": _act_head,
    "diffusion": _diffusion_head,
    "flow_matching": _flow_head(FlowmatchingActionHeadConfig, _cross_attention),
    "flow_matching_1_5": _flow_head(FlowmatchingActionHeadConfig_1_5, _embedding),
}
