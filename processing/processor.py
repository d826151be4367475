"""PolicyProcessor: raw observations to model inputs, predicted chunks to robot units."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

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
from ..errors import (
    CheckpointError,
    CorruptFileError,
    FeatureShapeError,
    FeatureValueError,
    MissingFeatureError,
    UnknownFeatureError,
)
from .arrays import read_image, read_mask, read_vector, to_tensor
from .normalization import Normalizer

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

    Raises:
        MissingStatisticsError: a feature is to be normalised and its statistics are absent or do not fit.
    """

    # transformers' Trainer looks for special tokens here, whatever it trains; there are none.
    tokenizer = SimpleNamespace(eos_token_id=None, bos_token_id=None, pad_token_id=None)

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
        format_version=FORMAT_VERSION,
    ):
        self.input_features = {n: PolicyFeature.from_value(f) for n, f in (input_features or {}).items()}
        self.output_features = {n: PolicyFeature.from_value(f) for n, f in (output_features or {}).items()}
        self.normalization_mapping = {
            FeatureType(kind).value: NormalizationMode(mode).value
            for kind, mode in (normalization_mapping or {}).items()
        }
        self.statistics = {
            name: {which: to_tensor(name, value).tolist() for which, value in (statistics or {})[name].items()}
            for name in (*self.input_features, *self.output_features)
            if name in (statistics or {})
        }
        self.n_obs_steps = n_obs_steps
        self.normalization_eps = normalization_eps
        self.dimension_names = dimension_names
        self.units = units
        self.rename_map = rename_map or {}
        self.format_version = format_version
        super().__init__()
        self._normalizers = {
            name: Normalizer(
                name, feature, self.normalization_mode(feature), self.statistics.get(name), normalization_eps
            )
            for name, feature in (self.input_features | self.output_features).items()
        }

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
            `action_is_pad` (b, h), as far as the policy has them; with history (b, t, …) for observations.

        Raises:
            MissingFeatureError, UnknownFeatureError, FeatureShapeError, FeatureValueError.
        """
        observation = self._checked_names(observation)
        values: dict[str, torch.Tensor] = {}
        for name, feature in self.input_features.items():
            x = (
                read_image(name, observation[name], feature)
                if feature.type is FeatureType.VISUAL
                else read_vector(name, observation[name], feature.shape[0])
            )
            x = self._with_leading_dimensions(name, x, len(feature.shape))
            values[name] = self._normalizers[name].normalize(x)
        batch_sizes = {name: x.shape[0] for name, x in values.items()}
        if len(set(batch_sizes.values())) > 1:
            raise FeatureShapeError("The observation", tuple(batch_sizes.values()), f"one batch size; {batch_sizes}")

        inputs: dict[str, Any] = {}
        cameras = [n for n, f in self.input_features.items() if f.type is FeatureType.VISUAL]
        if cameras:
            inputs["pixel_values"] = stack_views([values[name] for name in cameras])
        if STATE in values:
            inputs["state"] = values[STATE]
        if ENVIRONMENT_STATE in values:
            inputs["environment_state"] = values[ENVIRONMENT_STATE]
        if actions is not None:
            inputs |= self._labels(actions, action_is_pad, next(iter(batch_sizes.values())))
        return BatchFeature(data=inputs)

    def _checked_names(self, observation: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(observation, Mapping):
            raise FeatureValueError(
                f"An observation is a mapping of feature names to arrays; got {type(observation).__name__}."
            )
        observation = {self.rename_map.get(name, name): value for name, value in observation.items()}
        missing = self.input_features.keys() - observation.keys()
        if missing:
            raise MissingFeatureError(missing, observation, self.input_features)
        for name in observation.keys() - self.input_features.keys() - _BOOKKEEPING:
            if not name.endswith("_is_pad"):
                raise UnknownFeatureError(name, self.input_features)
        return observation

    def _with_leading_dimensions(self, name: str, x: torch.Tensor, feature_ndim: int) -> torch.Tensor:
        leading = x.ndim - feature_ndim
        if leading == 0:
            x = x.unsqueeze(0)  # (1, …): a batch of one
            if self.n_obs_steps > 1:
                x = x.unsqueeze(1).expand(1, self.n_obs_steps, *x.shape[1:])  # (1, t, …)
            return x
        expected = 1 if self.n_obs_steps == 1 else 2
        if leading != expected or (expected == 2 and x.shape[1] != self.n_obs_steps):
            history = f", then {self.n_obs_steps} observations of history" if self.n_obs_steps > 1 else ""
            raise FeatureShapeError(name, tuple(x.shape), f"no leading dimension, or batch{history}")
        return x

    def _labels(self, actions: Any, action_is_pad: Any, batch_size: int) -> dict[str, torch.Tensor]:
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
        return {"actions": self._normalizers[ACTION].normalize(x), "action_is_pad": is_pad}

    # --- chunk → robot units --------------------------------------------------------------------------

    def decode_actions(self, chunk: torch.Tensor) -> torch.Tensor:
        """Return a predicted chunk in robot units, float32 on the CPU.

        Args:
            chunk: (…, a) normalised actions.

        Raises:
            FeatureShapeError, FeatureValueError: another width, or values that are not finite.
        """
        chunk = read_vector("The predicted chunk", chunk, self.output_features[ACTION].shape[0])
        return self._normalizers[ACTION].unnormalize(chunk.cpu())

    def action_range(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the lowest and highest action of the training data, (a,) each, or None where not recorded."""
        recorded = self.statistics.get(ACTION, {})
        if "min" not in recorded or "max" not in recorded:
            return None
        return torch.tensor(recorded["min"]).flatten(), torch.tensor(recorded["max"]).flatten()

    # --- saving and loading ---------------------------------------------------------------------------

    def check_agreement(self, config: PolicyConfig) -> None:
        """Check that this processor feeds the policy that `config` describes.

        Raises:
            CheckpointError: features, their order, or the history differ.
        """
        for kind in ("input_features", "output_features", "n_obs_steps"):
            mine, theirs = getattr(self, kind), getattr(config, kind)
            same = mine == theirs and (kind != "input_features" or list(mine) == list(theirs))
            if not same:
                raise CheckpointError(
                    f"The processor's {kind} differ from the policy's: {mine} against {theirs}. "
                    f"Build it from the policy's config: PolicyProcessor.from_config(config, statistics)."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = super().to_dict()
        for kind in ("input_features", "output_features"):
            values[kind] = {name: feature.to_dict() for name, feature in getattr(self, kind).items()}
        return values

    def to_json_string(self) -> str:
        """Return the text of processor_config.json; keys keep their order, which is the order of the cameras."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> PolicyProcessor:
        """Load the processor of a checkpoint folder or Hub id.

        Raises:
            CorruptFileError: processor_config.json is not JSON.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except json.JSONDecodeError as error:
            path = f"{pretrained_model_name_or_path}/processor_config.json"
            raise CorruptFileError(path, "JSON file", error) from error

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """Build the processor from saved JSON; a field of it that does not exist here raises."""
        known = cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount]
        newer = processor_dict.get("format_version", FORMAT_VERSION) > FORMAT_VERSION
        unknown = processor_dict.keys() - set(known) - {"processor_class", "auto_map"}
        if unknown and not newer:
            raise CheckpointError(
                f"processor_config.json has unknown fields: {', '.join(sorted(unknown))}. Known: {', '.join(known)}."
            )
        return super().from_args_and_dict(args, processor_dict, **kwargs)
