"""PolicyProcessor: raw observations to model inputs, predicted chunks to robot units."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from transformers import BatchFeature, ProcessorMixin

from ..configuration.features import (
    ACTION,
    ENVIRONMENT_STATE,
    STATE,
    FeatureType,
    NormalizationMode,
    PolicyFeature,
)
from ..configuration.policy import FORMAT_VERSION, PolicyConfig, stack_views
from ..configuration.typed_values import to_field_type
from ..errors import (
    CheckpointError,
    EmbodimentError,
    FeatureShapeError,
    FeatureValueError,
    InvalidConfigError,
    MissingFeatureError,
    MissingFileError,
    MissingStatisticsError,
    UnknownFeatureError,
)
from .arrays import read_image, read_mask, read_vector, to_tensor
from .contract import Contract, contract_of
from .loading import load_processor
from .normalization import Normalizer
from .relative_actions import to_absolute, to_relative

# What a dataset's item holds beside features; passed along with an observation, it is left alone.
_BOOKKEEPING = {"action", "task", "timestamp", "frame_index", "episode_index", "index", "task_index"}


class PolicyProcessor(ProcessorMixin):
    """Turn raw observations into model inputs, and predicted chunks back into robot units.

    It is saved with the policy, statistics included: a checkpoint folder needs nothing else.

    Args:
        input_features (`dict[str, PolicyFeature]`): what an observation must hold; cameras in the policy's order.
        output_features (`dict[str, PolicyFeature]`): `action`.
        normalization_mapping (`dict[str, str]`): normalization mode per feature type.
        statistics (`dict[str, dict[str, list]]`): per feature what its mode needs (`mean` and `std`, …).
        n_obs_steps (`int`, *optional*, defaults to 1): observations the policy looks at.
        normalization_eps (`float`, *optional*, defaults to 1e-8): ε of `Normalizer`.
        dimension_names (`dict[str, list[str]]`, *optional*): what each dimension of a feature is.
        units (`dict[str, list[str]]`, *optional*): in which unit.
        rename_map (`dict[str, str]`, *optional*): names in the observation → names of the features they are.
        optional_cameras (`list[str]`, *optional*): cameras that an observation may lack.
        relative_to (`list[int | None]`, *optional*): per action dimension the state dimension that the network's
            actions are relative to, None where they are absolute; statistics of `action` are those of the
            differences. None: all are absolute.
        embodiments (`dict[str, dict]`, *optional*): statistics per embodiment, where a policy knows several robots;
            then `statistics` is None.
        embodiment (`str`, *optional*): the one in use.
        attributes: of subclasses, what `ProcessorMixin` saves in files of its own: `tokenizer`.

    Raises:
        MissingStatisticsError: a feature is to be normalised and its statistics are absent or do not fit.
    """

    # transformers' Trainer looks for special tokens here, whatever it trains; there are none.
    tokenizer = SimpleNamespace(eos_token_id=None, bos_token_id=None, pad_token_id=None)

    # The fields that the policy's config has too, and in which the two must agree.
    compared_fields: ClassVar[tuple[str, ...]] = (
        "input_features",
        "output_features",
        "n_obs_steps",
        "optional_cameras",
    )

    def __init__(
        self,
        input_features=None,
        output_features=None,
        normalization_mapping=None,
        statistics=None,
        n_obs_steps=1,
        normalization_eps=1e-8,
        dimension_names=None,
        units=None,
        rename_map=None,
        optional_cameras=None,
        relative_to=None,
        embodiments=None,
        embodiment=None,
        format_version=FORMAT_VERSION,
        **attributes,
    ):
        inputs, outputs = _mapping("input_features", input_features), _mapping("output_features", output_features)
        self.input_features = {name: PolicyFeature.from_value(feature) for name, feature in inputs.items()}
        self.output_features = {name: PolicyFeature.from_value(feature) for name, feature in outputs.items()}
        modes = to_field_type(_mapping("normalization_mapping", normalization_mapping), dict[str, NormalizationMode])
        self.normalization_mapping = {
            to_field_type(kind, FeatureType).value: mode.value for kind, mode in modes.items()
        }
        self.n_obs_steps = n_obs_steps
        self.normalization_eps = normalization_eps
        self.dimension_names = dimension_names
        self.units = units
        self.rename_map = _mapping("rename_map", rename_map)
        self.optional_cameras = list(optional_cameras or [])
        self.relative_to = None if relative_to is None else list(relative_to)
        self.embodiments = {
            name: self._used(values) for name, values in _mapping("embodiments", embodiments).items()
        } or None
        self.embodiment = embodiment
        self.format_version = format_version
        super().__init__(**attributes)
        self._check_relative()
        self.statistics = None if self.embodiments else self._used(_mapping("statistics", statistics))
        self._normalizers: dict[str, Normalizer] | None = None
        if not self.embodiments:
            self._normalizers = self._build_normalizers(self.statistics)
        elif embodiment is not None or len(self.embodiments) == 1:
            self.choose_embodiment(embodiment or next(iter(self.embodiments)))

    def _used(self, statistics: Mapping[str, Mapping]) -> dict[str, dict[str, list]]:
        """Return the statistics of this policy's features as plain lists, which JSON keeps exactly."""
        for name, values in statistics.items():
            if not isinstance(values, Mapping):
                raise MissingStatisticsError(
                    f"The statistics of {name} are {values!r}; expected a mapping such as {{'mean': […], 'std': […]}}."
                )
        return {
            name: {which: to_tensor(name, value).tolist() for which, value in statistics[name].items()}
            for name in (*self.input_features, *self.output_features)
            if name in statistics
        }

    def _build_normalizers(self, statistics: Mapping[str, Mapping]) -> dict[str, Normalizer]:
        features = self.input_features | self.output_features
        return {
            name: self._build_normalizer(name, feature, statistics.get(name)) for name, feature in features.items()
        }

    def _build_normalizer(self, name: str, feature: PolicyFeature, statistics: Mapping | None) -> Normalizer:
        return Normalizer(name, feature, self.normalization_mode(feature), statistics, self.normalization_eps)

    def choose_embodiment(self, name: str) -> None:
        """Use the statistics of one of the embodiments that the policy knows.

        Raises:
            EmbodimentError: it knows no such embodiment.
        """
        if name not in (self.embodiments or {}):
            raise EmbodimentError(name, self.embodiments or ())
        self._normalizers = self._build_normalizers(self.embodiments[name])
        self.embodiment = name

    def normalizer(self, name: str) -> Normalizer:
        """Return the normalizer of a feature.

        Raises:
            EmbodimentError: the policy knows several embodiments and none has been chosen.
        """
        if self._normalizers is None:
            raise EmbodimentError(None, self.embodiments)
        return self._normalizers[name]

    def _check_relative(self) -> None:
        if self.relative_to is None:
            return
        state = self.input_features.get(STATE)
        width = self.output_features[ACTION].shape[0]
        fits = state is not None and all(i is None or 0 <= i < state.shape[0] for i in self.relative_to)
        if len(self.relative_to) != width or not fits:
            raise InvalidConfigError(
                f"relative_to={self.relative_to} must name, for each of the {width} action dimensions, a dimension of "
                f"{STATE} ({state.shape[0] if state else 'which the policy lacks'}) or None."
            )

    @classmethod
    def from_config(cls, config: PolicyConfig, statistics: Mapping | None = None, **kwargs) -> PolicyProcessor:
        """Build the processor of a policy's config from a dataset's statistics.

        Args:
            config: the policy's config, with features set.
            statistics: `LeRobotDataset(...).statistics`, or any mapping of that form.
            kwargs: `dimension_names`, `units`, `normalization_eps`.
        """
        return cls(
            input_features=config.input_features,
            output_features=config.output_features,
            normalization_mapping=config.normalization_mapping,
            statistics=statistics,
            n_obs_steps=config.n_obs_steps,
            optional_cameras=config.optional_cameras,
            **kwargs,
        )

    def normalization_mode(self, feature: PolicyFeature) -> NormalizationMode:
        """Return how `feature` is normalised; a type without a mode raises rather than passing through."""
        if feature.type.value not in self.normalization_mapping:
            raise CheckpointError(
                f"No normalization mode for {feature.type.value} features; the mapping has "
                f"{self.normalization_mapping}. Say 'IDENTITY' where values are to pass unchanged."
            )
        return NormalizationMode(self.normalization_mapping[feature.type.value])

    def describe_normalization(self, name: str) -> str:
        """Return how a feature is normalised, in words for the contract."""
        return self.normalization_mode((self.input_features | self.output_features)[name]).value

    # --- observation → model inputs -------------------------------------------------------------------

    def __call__(
        self,
        observation: Mapping[str, Any],
        task: str | list[str] | None = None,
        actions: Any = None,
        action_is_pad: Any = None,
    ) -> BatchFeature:
        """Return normalised model inputs, with a batch dimension.

        Args:
            observation: dataset names → numpy, torch or PIL; images HWC or CHW, uint8 or float in [0, 1]. Arrays
                carry either no leading dimension (one observation) or all of them: batch, then history when
                `n_obs_steps > 1`. One observation without history is repeated to fill it.
            task: the instruction; not an input of policies without language.
            actions: labels (h, a) or (b, h, a), in robot units.
            action_is_pad: (h,) or (b, h) bool, True where a step lies beyond the episode; default: none.

        Returns:
            `state` (b, s), `environment_state` (b, e), `pixel_values` (b, v, c, h, w), `actions` (b, h, a),
            `action_is_pad` (b, h), as far as the policy has them; with history (b, t, …) for observations. With
            optional cameras also `pixel_mask` (b, v), False where one is absent; its image is zero.

        Raises:
            MissingFeatureError, UnknownFeatureError, FeatureShapeError, FeatureValueError, EmbodimentError.
        """
        raw = self.read_observation(observation, self.n_obs_steps)
        batch_size = len(next(iter(raw.values())))
        values = {name: self.encode(name, x) for name, x in raw.items()}

        inputs: dict[str, Any] = {}
        cameras = [n for n, f in self.input_features.items() if f.type is FeatureType.VISUAL]
        if cameras:
            leading = next(iter(raw.values())).shape[: 1 if self.n_obs_steps == 1 else 2]
            absent = {name: self.absent_picture(name) for name in cameras if name not in values}
            absent = {name: x.expand(*leading, *x.shape) for name, x in absent.items()}
            inputs["pixel_values"] = stack_views([(values | absent)[name] for name in cameras])
        if self.optional_cameras:
            mask = torch.tensor([name in values for name in cameras])
            inputs["pixel_mask"] = mask.expand(batch_size, -1).clone()  # (b, v)
        if STATE in values:
            inputs["state"] = values[STATE]
        if ENVIRONMENT_STATE in values:
            inputs["environment_state"] = values[ENVIRONMENT_STATE]
        if actions is not None:
            inputs |= self._labels(actions, action_is_pad, batch_size, raw.get(STATE))
        return BatchFeature(data=inputs)

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return a feature's raw values as the network sees them: here, normalised."""
        return self.normalizer(name).normalize(x)

    def absent_picture(self, name: str) -> torch.Tensor:
        """Return what stands in the place of an absent camera's picture (c, h, w); the network does not see it."""
        return torch.zeros(self.input_features[name].shape)

    def read_observation(self, observation: Mapping[str, Any], steps: int) -> dict[str, torch.Tensor]:
        """Return an observation's features as checked float32 tensors in raw units: (b, …), with history (b, t, …).

        Args:
            observation: see `__call__`.
            steps: how many observations of history the arrays hold; a single one is repeated to fill them.
        """
        observation = self._checked_names(observation)
        raw: dict[str, torch.Tensor] = {}
        for name, feature in self.input_features.items():
            if name in observation:
                x = (
                    read_image(name, observation[name], feature)
                    if feature.type is FeatureType.VISUAL
                    else read_vector(name, observation[name], feature.shape[0])
                )
                raw[name] = _with_leading_dimensions(name, x, len(feature.shape), steps)
        if not raw:
            raise MissingFeatureError(self.input_features, observation, self.input_features)
        sizes = {name: len(x) for name, x in raw.items()}
        if len(set(sizes.values())) > 1:
            raise FeatureShapeError("The observation", tuple(sizes.values()), f"one batch size; {sizes}")
        return raw

    def _checked_names(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(observation, Mapping):
            raise FeatureValueError(
                f"An observation is a mapping of feature names to arrays; got {type(observation).__name__}."
            )
        renamed: dict[str, Any] = {}
        for name, value in observation.items():
            feature = self.rename_map.get(name, name)
            if feature in renamed:
                names = [given for given in observation if self.rename_map.get(given, given) == feature]
                raise FeatureValueError(f"The observation holds {feature} twice, as {' and as '.join(names)}.")
            renamed[feature] = value
        observation = renamed
        missing = self.input_features.keys() - observation.keys() - set(self.optional_cameras)
        if missing:
            raise MissingFeatureError(missing, observation, self.input_features)
        for name in observation.keys() - self.input_features.keys() - _BOOKKEEPING:
            if not str(name).endswith("_is_pad"):
                raise UnknownFeatureError(str(name), self.input_features)
        return observation

    def _labels(
        self, actions: Any, action_is_pad: Any, batch_size: int, state: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        width = self.output_features[ACTION].shape[0]
        x = read_vector(ACTION, actions, width)
        x = x.unsqueeze(0) if x.ndim == 2 else x  # (b, h, a)
        if x.ndim != 3 or x.shape[0] != batch_size:
            raise FeatureShapeError(ACTION, tuple(x.shape), f"({batch_size}, horizon, {width})")
        if action_is_pad is None:
            is_pad = torch.zeros(x.shape[:2], dtype=torch.bool)
        else:
            is_pad = read_mask("action_is_pad", action_is_pad)
            is_pad = is_pad.unsqueeze(0) if is_pad.ndim == 1 else is_pad  # (b, h)
        if is_pad.shape != x.shape[:2]:
            raise FeatureShapeError("action_is_pad", tuple(is_pad.shape), f"{tuple(x.shape[:2])}")
        if self.relative_to is not None:
            x = to_relative(x, _now(state), self.relative_to)
        return {"actions": self.encode(ACTION, x), "action_is_pad": is_pad}

    # --- chunk → robot units --------------------------------------------------------------------------

    def decode_actions(self, chunk: torch.Tensor, state: Any = None) -> torch.Tensor:
        """Return a predicted chunk in robot units, float32 on the CPU.

        Args:
            chunk: (…, a) normalised actions.
            state: (s,) or (b, s), raw, in which the chunk (b, h, a) was predicted; only relative actions need it.

        Raises:
            FeatureShapeError, FeatureValueError: another width, or values that are not finite.
            MissingFeatureError: the actions are relative and the state is absent.
        """
        chunk = read_vector("The predicted chunk", chunk, self.output_features[ACTION].shape[0])
        actions = self.normalizer(ACTION).unnormalize(chunk.cpu())
        if self.relative_to is None:
            return actions
        if state is None:
            raise MissingFeatureError([STATE], (), [STATE])
        state = read_vector(STATE, state, self.input_features[STATE].shape[0]).cpu()
        state = _now(state.unsqueeze(0) if state.ndim == 1 else state)  # (b, s)
        return to_absolute(actions.reshape(len(state), -1, actions.shape[-1]), state, self.relative_to).view_as(
            actions
        )

    def raw_state(self, observation: Mapping[str, Any]) -> Any:
        """Return the robot's state in an observation, under whichever name it comes; None when absent."""
        return next((v for name, v in observation.items() if self.rename_map.get(name, name) == STATE), None)

    def action_range(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the lowest and highest action of the training data, (a,) each, or None where not recorded.

        Relative dimensions have none: their range is that of differences.
        """
        recorded = self.chosen_statistics().get(ACTION, {})
        if "min" not in recorded or "max" not in recorded:
            return None
        low, high = (torch.tensor(recorded[which], dtype=torch.float32).flatten() for which in ("min", "max"))
        relative = torch.tensor([i is not None for i in self.relative_to or [None] * len(low)])
        return low.masked_fill(relative, -torch.inf), high.masked_fill(relative, torch.inf)

    def contract(self) -> Contract:
        """Return what an observation must hold and what an action means; print it to read it."""
        return contract_of(self)

    def chosen_statistics(self) -> Mapping[str, Mapping]:
        """Return the statistics per feature, of the chosen embodiment where there are several."""
        if self.embodiments is None:
            return self.statistics
        return self.embodiments.get(self.embodiment, {})

    # --- saving and loading ---------------------------------------------------------------------------

    def check_agreement(self, config: PolicyConfig) -> None:
        """Check that this processor feeds the policy that `config` describes.

        Raises:
            CheckpointError: features, their order, or the history differ.
        """
        for kind in self.compared_fields:
            mine, theirs = getattr(self, kind), getattr(config, kind)
            theirs = list(theirs) if isinstance(theirs, tuple) else theirs
            same = mine == theirs and (kind != "input_features" or list(mine) == list(theirs))
            if not same:
                raise CheckpointError(
                    f"The processor's {kind} differ from the policy's: {mine} against {theirs}. "
                    f"Build it from the policy's config: {type(self).__name__}.from_config(config, statistics)."
                )
        for feature in (self.input_features | self.output_features).values():
            mine, theirs = self.normalization_mode(feature), config.normalization_mode(feature)
            if mine is not theirs:
                raise CheckpointError(
                    f"The processor normalises {feature.type.value} features with {mine.value}, the policy was "
                    f"configured for {theirs.value}. Build it from the policy's config."
                )

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names in processor_config.json: the constructor's arguments that have no file of their own."""
        names: dict[str, None] = {}
        for base in cls.__mro__:
            if issubclass(base, PolicyProcessor) and "__init__" in vars(base):
                parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
                names |= dict.fromkeys(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        return [name for name in names if name not in cls.get_attributes()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {name: getattr(self, name) for name in self.field_names()}
        for kind in ("input_features", "output_features"):
            values[kind] = {name: feature.to_dict() for name, feature in values[kind].items()}
        return copy.deepcopy(values) | {"processor_class": type(self).__name__}

    def to_json_string(self) -> str:
        """Return the text of processor_config.json; keys keep their order, which is the order of the cameras."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> PolicyProcessor:
        """Load the processor of a checkpoint folder or Hub id.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            kwargs: `subfolder`, `revision`, `token`, …, `tokenizer` in place of the saved one, and fields to override.

        Raises:
            MissingFileError, CorruptFileError: processor_config.json is absent, or holds no JSON mapping.
        """
        return load_processor(cls, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """Build the processor from saved JSON; a field of it that does not exist here raises."""
        if not processor_dict:
            raise MissingFileError(
                "There is no processor_config.json, without which a policy's numbers mean nothing. It is written by "
                "PolicyPipeline.save_pretrained, or processor.save_pretrained beside the policy's."
            )
        fields = {name: value for name, value in processor_dict.items() if name not in ("processor_class", "auto_map")}
        known = cls.field_names()
        newer = fields.get("format_version", FORMAT_VERSION) > FORMAT_VERSION
        unknown = fields.keys() - set(known)
        if unknown and not newer:
            raise CheckpointError(
                f"processor_config.json has unknown fields: {', '.join(sorted(unknown))}. Known: {', '.join(known)}."
            )
        return_unused = kwargs.pop("return_unused_kwargs", False)
        overrides = {name: value for name, value in kwargs.items() if name in known}
        attributes = dict(zip(cls.get_attributes(), args, strict=True))  # loaded from files of their own
        processor = cls(**attributes, **({n: v for n, v in fields.items() if n not in unknown} | overrides))
        return (processor, {n: v for n, v in kwargs.items() if n not in known}) if return_unused else processor


def _now(state: torch.Tensor) -> torch.Tensor:
    """Return the current state (b, s) of a history (b, t, s), or the state itself."""
    return state[:, -1] if state.ndim == 3 else state


def _with_leading_dimensions(name: str, x: torch.Tensor, feature_ndim: int, steps: int) -> torch.Tensor:
    leading = x.ndim - feature_ndim
    if leading == 0:
        x = x.unsqueeze(0)  # (1, …): a batch of one
        return x.unsqueeze(1).expand(1, steps, *x.shape[1:]) if steps > 1 else x  # (1, t, …)
    expected = 1 if steps == 1 else 2
    if leading != expected or (expected == 2 and x.shape[1] != steps):
        history = f", then {steps} observations of history" if steps > 1 else ""
        raise FeatureShapeError(name, tuple(x.shape), f"no leading dimension, or batch{history}")
    return x


def _mapping(name: str, value: Any) -> Mapping:
    if value is not None and not isinstance(value, Mapping):
        raise InvalidConfigError(f"A processor's {name} is a mapping; got {value!r}.")
    return value or {}
