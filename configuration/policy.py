"""PolicyConfig: what every policy's configuration has and promises."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from transformers.utils import logging

from ..errors import InvalidConfigError, nearest
from ..families import title_of
from .features import (
    ACTION,
    ENVIRONMENT_STATE,
    STATE,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
    is_camera_name,
)
from .strict import StrictConfig

logger = logging.get_logger(__name__)

# Raised by one whenever a saved field changes its meaning; a file of a newer version may hold unknown fields.
FORMAT_VERSION = 1

# Trainer sets these on every config; a policy has no use for them.
_SET_BY_TRAINER = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")


class PolicyConfig(StrictConfig):
    """Hold what a policy is made of: its features, their normalization, its horizon.

    Subclasses add annotated fields with the published defaults. Values are converted first (JSON lists to
    tuples, int to float, dicts to `PolicyFeature`), then type-checked; names that do not exist raise, in the
    constructor, on assignment and from JSON. Fields may be assigned after construction: every component and
    policy validates the config it is given.

    Args:
        input_features (`dict[str, PolicyFeature]`): what an observation holds, by dataset name. The order of
            the cameras is the order in which the network sees them.
        output_features (`dict[str, PolicyFeature]`): what the policy returns; `action`.
        normalization_mapping (`dict[str, NormalizationMode]`): one mode per feature type.
        n_obs_steps (`int`, *optional*, defaults to 1): observations the policy looks at, the current one included.
        optional_cameras (`tuple[str, ...]`, *optional*): cameras that an observation may lack; the network does not
            attend to an absent one.
        loss_over (`str`, *optional*, defaults to `"real"`): what the loss is averaged over: `"real"` leaves out steps
            beyond the episode and padded dimensions, `"steps"` counts such steps, `"all"` counts both.
        format_version (`int`, *optional*): version of the saved fields' meaning.
    """

    input_features: dict[str, PolicyFeature] | None = None
    output_features: dict[str, PolicyFeature] | None = None
    normalization_mapping: dict[str, NormalizationMode] | None = None
    n_obs_steps: int = 1
    optional_cameras: tuple[str, ...] = ()
    loss_over: Literal["real", "steps", "all"] = "real"
    format_version: int = FORMAT_VERSION

    default_normalization: ClassVar[Mapping[str, str]] = dict.fromkeys(FeatureType.__members__, "MEAN_STD")
    # Whether the policy reads an instruction; a property where that depends on the config. Configs of those that do
    # have `tokenizer_name` (`str` or None) and `max_instruction_tokens` (`int`).
    reads_instruction: ClassVar[bool] = False
    # Whether the network reads the state in its prompt only, not as an input.
    state_in_prompt: ClassVar[bool] = False
    # Whether the policy or its processor resizes every picture, so that a camera may have any size; a property where
    # that depends on the config.
    resizes_pictures: ClassVar[bool] = False
    # Whether states and actions are padded to one width, so that one policy may learn from robots of several.
    pads_widths: ClassVar[bool] = False
    # Rows of the language model's embedding, and the token at which it summarises an instruction; None: not known, or
    # it looks at all tokens.
    vocabulary_size: ClassVar[int | None] = None
    end_token_id: ClassVar[int | None] = None
    # Fields beside the features that are one robot's, which another that starts from its weights does not inherit.
    robot_fields: ClassVar[tuple[str, ...]] = ("optional_cameras",)
    # The field that says how many actions are predicted at once. A chunk that is executed whole (`n_action_steps`)
    # stays so when that field is assigned.
    horizon_field: ClassVar[str | None] = None
    # Trainer takes all other outputs of an evaluation for predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses", "sample_errors"]
    # Model inputs that the network needs whatever the features say.
    other_inputs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self, **kwargs):
        model_type = kwargs.pop("model_type", self.model_type)
        if model_type != self.model_type:
            raise InvalidConfigError(
                f"This config.json is of model type {model_type!r}, but {type(self).__name__} reads "
                f"{self.model_type!r}. Use AutoPolicy.from_pretrained, which finds the right class."
            )
        unknown = [name for name in kwargs if not self.knows(name)]
        if unknown and self.format_version > FORMAT_VERSION:
            logger.warning(
                f"This config was written by a newer version (format {self.format_version}, read here: "
                f"{FORMAT_VERSION}); fields that do not exist here are left out: {', '.join(unknown)}."
            )
            kwargs = {name: value for name, value in kwargs.items() if name not in unknown}
        whole = self._whole_chunk()
        if whole is not None and self.n_action_steps is None:
            self.n_action_steps = whole
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__
        if name == "n_action_steps" and value is None and self.__dict__.get("format_version") is not None:
            value = self._whole_chunk()
        executed_whole = name == self.horizon_field and held.get("n_action_steps") == held.get(name) is not None
        super().__setattr__(name, value)
        if executed_whole:
            self.n_action_steps = held[name]

    def _whole_chunk(self) -> int | None:
        """Return the default of `n_action_steps`; None where the policy has another, or does not know it yet."""
        return None if self.horizon_field is None else self.__dict__.get(self.horizon_field)

    @classmethod
    def _completed(cls, name: str, value: Any) -> Any:
        """Fill what a value leaves open: None is no features, and a mode per type that is not mentioned."""
        if name in ("input_features", "output_features") and value is None:
            return {}
        if name == "normalization_mapping" and (value is None or isinstance(value, Mapping)):
            return dict(cls.default_normalization) | dict(value or {})
        return value

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Build the config from saved JSON; `kwargs` override fields, and must name fields that exist."""
        if "type" in config_dict and "model_type" not in config_dict:
            raise InvalidConfigError(
                "This config.json is in LeRobot's layout. Load it with AutoPolicy.from_pretrained or "
                "PolicyPipeline.from_pretrained, or write it as ours: manipulators convert SRC DST"
            )
        horizon = cls.horizon_field
        if horizon in kwargs and config_dict.get("n_action_steps") == config_dict.get(horizon):
            config_dict = {name: value for name, value in config_dict.items() if name != "n_action_steps"}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        values = _plain(super().to_dict())
        for name in _SET_BY_TRAINER:
            values.pop(name, None)
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the JSON text of config.json, in the order of the fields: sorted keys would reorder cameras."""
        values = self._encode_special_floats(self.to_diff_dict() if use_diff else self.to_dict())
        return json.dumps(values, indent=2) + "\n"

    # --- features -------------------------------------------------------------------------------------

    @classmethod
    def for_dataset(cls, dataset: Any, inputs: Sequence[str] | None = None, **fields: Any) -> "PolicyConfig":
        """Return the config of a policy for a dataset: its features are the dataset's.

        Args:
            dataset (`LeRobotDataset` or `MixtureDataset`): or any object with `policy_features`, a pair of inputs and
                outputs, each name → `PolicyFeature`. Of a mixture, cameras that some datasets lack are optional, and
                robots get slots.
            inputs (`Sequence[str]`, *optional*): the observation features that the policy uses; by default all.
            fields: every other field of the config.

        Raises:
            InvalidConfigError: `inputs` names a feature that the dataset does not have.
            MixtureError: one policy of this kind cannot learn from all datasets of the mixture.
        """
        observed, returned = dataset.policy_features
        for name in inputs or ():
            if name not in observed:
                raise InvalidConfigError(f"inputs names {name!r}. {nearest(name, observed)}")
        chosen = observed if inputs is None else {name: f for name, f in observed.items() if name in inputs}
        fields = {"input_features": dict(chosen), "output_features": dict(returned), **fields}
        if not hasattr(dataset, "config_fields"):
            return cls(**fields)
        config = cls(**dataset.config_fields(cls, fields))
        dataset.require_fit(config)
        return config

    def set_input_output_features(
        self, input_features: dict[str, PolicyFeature], output_features: dict[str, PolicyFeature]
    ) -> None:
        """Set what the policy observes and what it returns.

        Raises:
            InvalidConfigError: a feature has a name or type that no policy reads.
        """
        self.input_features = input_features
        self.output_features = output_features
        self.validate()

    def validate_features(self) -> None:
        """Check that features have the names and types that policies read."""
        for name, feature in self.input_features.items():
            expected = (
                "observation.images.<camera>"
                if feature.type is FeatureType.VISUAL
                else {FeatureType.STATE: STATE, FeatureType.ENV: ENVIRONMENT_STATE}.get(feature.type)
            )
            fits = is_camera_name(name) if feature.type is FeatureType.VISUAL else name == expected
            if not fits:
                raise InvalidConfigError(
                    f"Input feature {name!r} has type {feature.type.value}; "
                    + (f"features of this type are named {expected!r}." if expected else "actions are outputs.")
                    + (f" Name it so here, and give the processor rename_map={{{name!r}: …}}." if expected else "")
                )
            if len(feature.shape) != (3 if feature.type is FeatureType.VISUAL else 1):
                raise InvalidConfigError(f"Input feature {name!r} must be a vector; its shape is {feature.shape}.")
        for name, feature in self.output_features.items():
            if name != ACTION or feature.type is not FeatureType.ACTION or len(feature.shape) != 1:
                raise InvalidConfigError(
                    f"Output feature {name!r} of type {feature.type.value} and shape {feature.shape}: "
                    f"the only output is {ACTION!r}, of type ACTION and shape (width,)."
                )

    def validate_optional_cameras(self) -> None:
        """Check that optional cameras are cameras."""
        for name in self.optional_cameras:
            if name not in self.image_features:
                raise InvalidConfigError(
                    f"optional_cameras names {name!r}, which is no camera. {nearest(name, self.image_features)}"
                )

    def validate_history(self) -> None:
        """Check that at least the current observation is seen."""
        if self.n_obs_steps < 1:
            raise InvalidConfigError(f"n_obs_steps={self.n_obs_steps}: at least the current observation, 1.")

    def validate_normalization(self) -> None:
        """Check that the normalization mapping is keyed by feature types."""
        for name in self.normalization_mapping:
            if name not in FeatureType.__members__:
                known = ", ".join(FeatureType.__members__)
                raise InvalidConfigError(f"normalization_mapping has {name!r}; its keys are feature types: {known}.")

    def require_features(self) -> None:
        """Check that there is something to observe and something to return, before a network is built.

        Raises:
            InvalidConfigError: inputs or outputs are missing.
        """
        self.validate()
        for kind, given in (("input", self.input_features), ("output", self.output_features)):
            if not given:
                raise InvalidConfigError(
                    f"{type(self).__name__} has no {kind} features; set them first: "
                    f"config.set_input_output_features(input_features, output_features)"
                )

    @property
    def title(self) -> str:
        """What the policy is called in text."""
        return title_of(self.model_type)

    @property
    def image_features(self) -> dict[str, PolicyFeature]:
        """The cameras, in the order the network sees them."""
        return {n: f for n, f in self.input_features.items() if f.type is FeatureType.VISUAL}

    @property
    def state_dim(self) -> int | None:
        """Width of the robot's state, or None without one."""
        return self.input_features[STATE].shape[0] if STATE in self.input_features else None

    @property
    def environment_state_dim(self) -> int | None:
        """Width of the environment's state, or None without one."""
        known = ENVIRONMENT_STATE in self.input_features
        return self.input_features[ENVIRONMENT_STATE].shape[0] if known else None

    @property
    def robot_action_dim(self) -> int:
        """Width of an action in the robot's own units."""
        if ACTION not in self.output_features:
            raise InvalidConfigError("The action's width is unknown until output_features holds 'action'.")
        return self.output_features[ACTION].shape[0]

    @property
    def action_dim(self) -> int:
        """Width of an action: the robot's, unless a published config.json calls the padded width so."""
        return self.robot_action_dim

    @property
    def model_state_dim(self) -> int | None:
        """Width of the state as the network sees it: with padding, for policies that pad."""
        return self.state_dim

    @property
    def model_action_dim(self) -> int:
        """Width of an action as the network sees it: with padding, for policies that pad."""
        return self.robot_action_dim

    @property
    def action_horizon(self) -> int:
        """Actions that one forward pass predicts."""
        if self.horizon_field is None:
            raise NotImplementedError(f"{type(self).__name__} must say its action_horizon")
        return getattr(self, self.horizon_field)

    @property
    def executed_steps(self) -> slice:
        """Those of the predicted steps that `predict_action_chunk` returns: from the current one on."""
        return slice(None)

    @property
    def features_width(self) -> int:
        """Width of the features that the backbone gives."""
        raise NotImplementedError(f"{type(self).__name__} must say its features_width to be composed with other heads")

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the named losses; 1 where none is given."""
        return {}

    @property
    def network_resizes_to(self) -> tuple[int, int] | None:
        """Height and width to which the network itself resizes pictures, if it does; a batch of several needs one."""
        return None

    @property
    def frames_without_start(self) -> int:
        """Frames at an episode's end from which training does not start: too little follows them."""
        return 0

    def set_vocabulary_size(self, rows: int) -> None:
        """Set how many tokens the language model knows, as `resize_token_embeddings` of a policy asks for.

        Raises:
            InvalidConfigError: there is no language model, or its vocabulary is fixed.
        """
        name = type(self).__name__
        raise InvalidConfigError(
            f"The vocabulary of {name} cannot be resized: a text encoder that is frozen would never learn new tokens."
            if self.reads_instruction
            else f"The vocabulary of {name} cannot be resized: it has no language model."
        )

    def normalization_mode(self, feature: PolicyFeature) -> NormalizationMode:
        """Return how `feature` is normalised."""
        return self.normalization_mapping[feature.type.value]

    def example_inputs(self, batch_size: int = 2, absent_cameras: Sequence[str] = ()) -> dict[str, Any]:
        """Return valid model inputs, labels included: random numbers of the right shapes, always the same.

        Args:
            batch_size: b.
            absent_cameras: those of the optional cameras that no observation has.

        Returns:
            `state` (b, s) or (b, t, s), `environment_state`, `pixel_values` (b, v, c, h, w), with history
            (b, t, v, c, h, w), `pixel_mask` (b, v), as far as the config has them; `actions` (b, h, a),
            `action_is_pad` (b, h), and where actions are padded `action_mask` (b, h, a), False in padded dimensions.
        """
        import torch
        from torch.nn.functional import pad

        generator = torch.Generator().manual_seed(0)
        lead = (batch_size, self.n_obs_steps) if self.n_obs_steps > 1 else (batch_size,)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        inputs: dict[str, Any] = {}
        if self.image_features:
            views = [random(*lead, *feature.shape) for feature in self.image_features.values()]
            inputs["pixel_values"] = stack_views(views)
        if self.optional_cameras:
            present = torch.tensor([name not in absent_cameras for name in self.image_features])
            inputs["pixel_mask"] = present.expand(batch_size, -1).clone()
        if self.state_dim:
            inputs["state"] = pad(random(*lead, self.state_dim), (0, self.model_state_dim - self.state_dim))
        if self.environment_state_dim:
            inputs["environment_state"] = random(*lead, self.environment_state_dim)
        actions = random(batch_size, self.action_horizon, self.robot_action_dim)
        padding = (0, self.model_action_dim - self.robot_action_dim)
        inputs["actions"] = pad(actions, padding)
        inputs["action_is_pad"] = torch.zeros(batch_size, self.action_horizon, dtype=torch.bool)
        if padding != (0, 0):
            inputs["action_mask"] = pad(torch.ones_like(actions, dtype=torch.bool), padding)
        return inputs

    def example_draws(self, batch_size: int = 2, training: bool = False) -> dict[str, Any]:
        """Return the random numbers of a forward pass as the arguments by which they can be given.

        With them, `predict_action_chunk` (and with `training`, a training step without dropout) is a function of
        its inputs. Empty where nothing is drawn.
        """
        return {}


def stack_views(views: list) -> Any:
    """Join per-camera images (…, c, h, w) into (…, v, c, h, w); cameras of different sizes stay a list."""
    import torch

    if len(views) == 1:
        return views[0].unsqueeze(-4)  # a view: images keep the order in memory they came in
    same_size = len({view.shape for view in views}) == 1
    return torch.stack(views, dim=-4) if same_size else views


def _plain(value: Any) -> Any:
    if isinstance(value, PolicyFeature):
        return value.to_dict()
    if isinstance(value, NormalizationMode):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
