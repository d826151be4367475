"""PolicyProcessor: raw observations to model inputs, predicted chunks to robot units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BatchFeature

from .._tokenizers import load_tokenizer
from ..configuration.contract import Contract
from ..configuration.features import STATE, FeatureType
from ..configuration.policy import PolicyConfig
from ..errors import CheckpointError
from .normalization import Normalizer
from .observation import Observation
from .part_holder import PartHolder


class PolicyProcessor(PartHolder):
    """Turn raw observations into model inputs, and predicted chunks back into robot units.

    It holds parts, each of which does one part of the work: `reader` (observations), `robots` (statistics and
    normalization), `pictures`, `vectors` (states and actions) and, of a policy that reads one, `instruction`. A
    subclass names the classes of its parts: `pictures_class = PaddedPictures`. The parts' fields are arguments here,
    are saved in processor_config.json and can be read and set as attributes of the processor; so are further
    arguments of a subclass's constructor. Statistics and the tokenizer's files are saved too: a checkpoint folder
    needs nothing else.

    Args:
        input_features (`dict[str, PolicyFeature]`): what an observation must hold; cameras in the policy's order.
        output_features (`dict[str, PolicyFeature]`): `action`.
        normalization_mapping, statistics: see `Robots`.
        tokenizer (`PreTrainedTokenizerBase`): of a policy that reads an instruction, see `Instruction`.
        dimension_names (`dict[str, list[str]]`, *optional*): what each dimension of a feature is.
        units (`dict[str, list[str]]`, *optional*): in which unit.
        format_version (`int`, *optional*): version of the saved fields' meaning.
        fields: of the parts, see `Robots` (`normalization_eps`, `embodiments`, `embodiment`,
            `embodiment_features`), `ObservationReader`
            (`n_obs_steps`, `rename_map`, `optional_cameras`), `Vectors` (`relative_to`) and the parts of a subclass.

    Raises:
        UnknownConfigFieldError: a field that no part has.
        MissingStatisticsError: a feature is to be normalised and its statistics are absent or do not fit.
    """

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
                `n_obs_steps > 1`. One observation without history is repeated to fill it. An optional camera that only
                some of a batch have is a list with None for the others. Or what `read_observation` returned.
            task: the instruction, one for the whole batch or one each; by default the observation's `task`. Policies
                without language ignore it.
            actions: labels (h, a) or (b, h, a), in robot units.
            action_is_pad: (h,) or (b, h) bool, True where a step lies beyond the episode; default: none.

        Returns:
            `state` (b, s), `environment_state` (b, e), `pixel_values` (b, v, c, h, w), `actions` (b, h, a),
            `action_is_pad` (b, h), `input_ids` and `attention_mask` (b, n), as far as the policy has them; with
            history (b, t, …) for observations. With optional cameras also `pixel_mask` (b, v), False where one is
            absent. Parts of subclasses may add to it: `action_mask` (b, h, a), `embodiment_id` (b,).

        Raises:
            MissingFeatureError, UnknownFeatureError, FeatureShapeError, FeatureValueError, EmbodimentError.
        """
        observation = self.read_observation(observation)
        inputs = self.pictures.encode_views(observation, with_mask=bool(self.optional_cameras))
        inputs |= self.vectors.encode_states(observation)
        if actions is not None:
            inputs |= self.vectors.encode_labels(actions, action_is_pad, observation)
        if self.instruction is not None:
            task = observation.task if task is None else task
            inputs |= self.encode_instruction(task, observation.batch_size, inputs)
        return BatchFeature(data=inputs)

    def read_observation(self, observation: Mapping[str, Any], steps: int | None = None) -> Observation:
        """Return an observation's features, checked and in raw units, to be read only once; see `Observation`.

        Args:
            observation: see `__call__`.
            steps: how many observations of history the arrays hold, by default `n_obs_steps`.
        """
        return self.reader.read(observation, self.n_obs_steps if steps is None else steps)

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return a feature's raw values as the network sees them."""
        is_camera = name in self.input_features and self.input_features[name].type is FeatureType.VISUAL
        return (self.pictures if is_camera else self.vectors).encode(name, x)

    def encode_instruction(
        self, task: str | list[str] | None, batch_size: int, inputs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return `input_ids` (b, n) and `attention_mask` (b, n) of one instruction for all, or of one each.

        `inputs` is what else was prepared, for language models that are also shown pictures or the state.
        """
        return self.instruction.tokens(task, batch_size, inputs or {})

    def check_instruction(self, observation: Observation, task: str | list[str] | None = None) -> None:
        """Check the instruction of an observation that was read, without tokenising it; errors as of `__call__`."""
        if self.instruction is not None:
            self.instruction.read(observation.task if task is None else task, observation.batch_size)

    def raw_state(self, observation: Mapping[str, Any]) -> Any:
        """Return the robot's state in an observation, under whichever name it comes; None when absent."""
        return self.reader.renamed(observation).get(STATE)

    # --- chunk → robot units --------------------------------------------------------------------------

    def decode_actions(self, chunk: torch.Tensor, state: Any = None, padded: bool = True) -> torch.Tensor:
        """Return a predicted chunk in robot units, float32 on the CPU, without padding.

        Args:
            chunk: (…, a) normalised actions.
            state: (s,) or (b, s), raw, in which the chunk (b, h, a) was predicted; only relative actions need it.
            padded: whether a policy that pads has padded the chunk; False for what a trainer predicts.

        Raises:
            FeatureShapeError, FeatureValueError: another width, or values that are not finite.
            MissingFeatureError: the actions are relative and the state is absent.
        """
        if padded:
            return self.vectors.decode(chunk, state)
        return self.vectors.decode(chunk, state, padded=False)

    def normalizer(self, name: str) -> Normalizer:
        """Return the normalizer of a feature; raises `EmbodimentError` while none of several robots is chosen."""
        return self.robots.normalizer(name)

    # --- what it promises -----------------------------------------------------------------------------

    def contract(self) -> Contract:
        """Return what an observation must hold and what an action means; print it to read it."""
        return Contract.from_fields(self.to_dict())

    def action_range(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the lowest and highest action of the training data, (a,) each, or None where not recorded.

        Of relative dimensions they are those of the differences to the state.
        """
        dimensions = [dimension for entry in self.contract().outputs for dimension in entry.dimensions]
        if not dimensions or any(dimension.low is None or dimension.high is None for dimension in dimensions):
            return None
        low, high = torch.tensor([(d.low, d.high) for d in dimensions], dtype=torch.float32).unbind(-1)
        return low, high

    def check_agreement(self, config: PolicyConfig) -> None:
        """Check that this processor feeds the policy that `config` describes; it takes pictures as that one does.

        Raises:
            CheckpointError: features, their order, or another field that both have differ, or tokens have other ids.
        """
        self._take_pictures_as(config)
        remedy = f"Build it from the policy's config: {type(self).__name__}.from_config(config, statistics)."
        for name in self.config_fields():
            mine, theirs = self.of_all_robots(name), getattr(config, name)
            theirs = list(theirs) if isinstance(theirs, tuple) else theirs
            if mine != theirs or (name == "input_features" and list(mine) != list(theirs)):
                raise CheckpointError(
                    f"The processor's {name} differ from the policy's: {mine} against {theirs}. {remedy}"
                )
        for feature in (self.input_features | self.output_features).values():
            mine, theirs = self.robots.mode(feature), config.normalization_mode(feature)
            if mine is not theirs:
                raise CheckpointError(
                    f"The processor normalises {feature.type.value} features with {mine.value}, the policy was "
                    f"configured for {theirs.value}. {remedy}"
                )
        if self.instruction is not None:
            self.instruction.check_agreement(config)

    @classmethod
    def from_config(
        cls, config: PolicyConfig, statistics: Mapping | None = None, tokenizer: Any = None, **fields: Any
    ) -> PolicyProcessor:
        """Build the processor of a policy's config from a dataset's statistics.

        Args:
            config: the policy's, with features set.
            statistics: `LeRobotDataset(...).statistics`, or any mapping of that form.
            tokenizer: of a policy that reads an instruction: a tokenizer, or a folder or Hub id that holds one; by
                default the config's `tokenizer_name`.
            fields: any other saved field, such as `rename_map`, `relative_to` or `dimension_names`.

        Raises:
            MissingTokenizerError: the tokenizer cannot be loaded.
        """
        if cls.instruction_class is not None:
            tokenizer = load_tokenizer(config.tokenizer_name if tokenizer is None else tokenizer)
        from_config = {name: getattr(config, name) for name in (*cls.config_fields(), "normalization_mapping")}
        processor = cls(**from_config | {"statistics": statistics, "tokenizer": tokenizer} | fields)
        processor._take_pictures_as(config)
        return processor

    def _take_pictures_as(self, config: PolicyConfig) -> None:
        """Note what follows from the policy about the size of pictures, and is not saved."""
        self.reader.resizes_pictures = config.resizes_pictures or self.pictures.resizes
        self.reader.network_resizes_to = config.network_resizes_to
