"""PolicyPipeline: observation in, action in robot units out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .._display import Displayed
from ..auto import AutoPolicy, load_policy_and_processor, load_processor
from ..checkpoint import split_publishing
from ..configuration.contract import OBSERVATION_LIMIT
from ..configuration.features import ACTION
from ..errors import CheckpointError, InvalidConfigError, MissingStatisticsError, UnknownInputError
from ..hub_cards.publish import publish_saved
from ..modeling.loading_arguments import require_device
from ..modeling.policy import PolicyModel
from ..modeling.seam import Draws
from ..processing.arrays import require_finite
from ..processing.observation import Observation
from ..processing.processor import PolicyProcessor
from .action_limits import ActionStep, StepLimit, TrainingRange
from .action_sources import action_source
from .episode import Episode
from .modes import draws_taken_back, evaluating, ordinary_tensors
from .observation_report import ObservationReport
from .plausibility import Judgement, Plausibility

# What configs call the steps of a prediction; `denoising_steps` is the diffusion config's effective number.
SAMPLING_STEPS = ("denoising_steps", "num_inference_steps", "num_inference_timesteps")
# What a caller may pass along to the policy.
SAMPLING = ("noise", "step_noise", "generator", "num_steps")


class PolicyPipeline(Displayed, Pipeline):
    """Run a policy on one robot, or on a batch of environments that step together.

    It owns what a pure network must not: the observation history (the first observation repeated), the queue of
    predicted actions, temporal ensembling. Call `reset()` when an episode begins.

    Every observation is checked, also while actions are queued, and one that is refused leaves no trace: the next good
    one gives the action that it would have given. A pipeline drives one robot, or one batch, in one thread. Robots
    that take turns need a pipeline each, which may share policy and processor.

    Args:
        model (`PolicyModel`): the policy; put into eval mode.
        processor (`PolicyProcessor`): the one saved with it; `transformers.pipeline` leaves it to be loaded here.
        clamp_actions (`bool`, *optional*, defaults to False): keep actions inside the range of the training data; of
            relative dimensions, their differences to the state.
        max_action_step (`float`, `list[float]` or `dict[str, float]`, *optional*): how far an executed action may be
            from the one before, in its units: for all dimensions, for each, or for some by name. The first one
            is limited against the state in dimensions that compare, see `StepLimit`; it may then be outside of what
            `clamp_actions` allows, where the state is.
        observation_limit (`float`, *optional*, defaults to 100.0): training ranges that a state may lie outside of its
            own before it is refused; None: any number. `observation_report` names what lies less far outside.
        tokenizer, embodiment, camera_map: where the processor is loaded here; see `from_pretrained`.
        device (`str` or `torch.device`, *optional*): by default the first accelerator, else the CPU.
    """

    _load_processor = False  # transformers would look for it beside an adapter's base
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self,
        model: PolicyModel,
        processor: PolicyProcessor | None = None,
        clamp_actions: bool = False,
        max_action_step: ActionStep | None = None,
        observation_limit: float | None = OBSERVATION_LIMIT,
        tokenizer: Any = None,
        embodiment: str | None = None,
        camera_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        if processor is None and getattr(model, "loaded_for_pipeline", False):
            processor = load_processor(model, tokenizer, embodiment, camera_map)
            processor.normalizer(ACTION)  # as in from_pretrained
        if processor is None and not isinstance(model, PolicyModel):
            raise CheckpointError(
                f"{type(model).__name__} is no policy of this library: transformers.pipeline loads its own model of "
                f"this type. PolicyPipeline.from_pretrained(source) reads such checkpoints."
            )
        if processor is None:
            raise CheckpointError(
                "A policy needs its processor: PolicyPipeline(model=policy, processor=processor), or "
                "PolicyPipeline.from_pretrained(source), which loads both."
            )
        processor.check_agreement(model.config)
        super().__init__(model=model, processor=processor, **{"task": "robotics"} | kwargs)
        self.model.eval()
        self.clamp_actions, self.max_action_step = clamp_actions, max_action_step
        self.observation_limit = observation_limit
        self._warned: set[tuple[str, str]] = set()  # unusual observations are named once, not in every episode
        given = {"tokenizer": tokenizer, "embodiment": embodiment, "camera_map": camera_map}
        self._loaded_with = {name: value for name, value in given.items() if value is not None}
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        camera_map: Mapping[str, str] | None = None,
        embodiment: str | None = None,
        clamp_actions: bool = False,
        max_action_step: ActionStep | None = None,
        observation_limit: float | None = OBSERVATION_LIMIT,
        **overrides: Any,
    ) -> PolicyPipeline:
        """Load policy and processor from a folder or Hub id, in our format or as another project published it.

        Args:
            source: folder or Hub id.
            device: by default the first accelerator, else the CPU.
            dtype: of the weights; by default as saved.
            camera_map: your camera's name → the policy's, with or without `observation.images.`.
            embodiment: which robot it is, where a checkpoint knows several.
            clamp_actions, max_action_step, observation_limit: what keeps an action, and an observation, within bounds.
            overrides: `subfolder`, `revision`, `token`, …, `tokenizer` in place of the checkpoint's own, and fields of
                config and processor to change.

        Raises:
            CheckpointError and its subclasses: nothing is loaded half.
        """
        device = None if device is None else require_device(device)
        if dtype is not None:
            overrides["dtype"] = dtype
        policy, processor = load_policy_and_processor(
            source, embodiment=embodiment, camera_map=camera_map, **overrides
        )
        processor.normalizer(ACTION)  # several embodiments and none chosen: better said now than on the robot
        bounds = {"max_action_step": max_action_step, "observation_limit": observation_limit}
        pipeline = cls(model=policy, processor=processor, clamp_actions=clamp_actions, device=device, **bounds)
        given = {"embodiment": embodiment, "camera_map": camera_map, **overrides}
        pipeline._loaded_with = {name: value for name, value in given.items() if value is not None}
        return pipeline

    @property
    def settings(self) -> dict[str, Any]:
        """What its actions depend on beside the observation, as plain values: for records that can be repeated."""
        config, source = self.model.config, self.model.loaded_from
        given = dict(self._loaded_with)
        tokenizer, camera_map = given.pop("tokenizer", None), given.pop("camera_map", None)
        fields = {*config.field_names(), *self.processor.field_names()} - {"embodiment"}
        overrides = {name: value for name, value in given.items() if name in fields}
        return {
            "checkpoint": source and source.source,
            "commit": source and source.commit,
            "n_action_steps": config.n_action_steps,
            "temporal_ensemble_coeff": getattr(config, "temporal_ensemble_coeff", None),
            "sampling_steps": next((getattr(config, n) for n in SAMPLING_STEPS if getattr(config, n, None)), None),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.device),
            "clamp_actions": self.clamp_actions,
            "max_action_step": json.loads(json.dumps(self.max_action_step, default=list)),
            "observation_limit": self.observation_limit,
            "tokenizer": None if tokenizer is None else str(getattr(tokenizer, "name_or_path", tokenizer)),
            "embodiment": given.get("embodiment"),
            "camera_map": dict(camera_map or {}),
            "overrides": json.loads(json.dumps(overrides, default=str)),
        }

    @property
    def policy(self) -> PolicyModel:
        """The policy; it predicts in eval mode even where it is being trained."""
        return self.model

    @property
    def observation_names(self) -> set[str]:
        """The names an observation may have: the policy's own, and those that are renamed to them."""
        return set(self.processor.input_features) | set(self.processor.rename_map)

    @ordinary_tensors
    def reset(self) -> None:
        """Begin an episode: forget observations, queued actions and their averages, and read the config anew.

        A changed `config.n_action_steps` or `config.temporal_ensemble_coeff` takes effect here, as do changed
        `clamp_actions`, `max_action_step` and `observation_limit`.

        Raises:
            InvalidConfigError: the config was changed to what no policy can have, or a bound is impossible.
            MissingStatisticsError: actions are to be clamped, and their range is not recorded.
        """
        config, limit = self.model.config, self.observation_limit
        config.validate()
        if limit is not None and not (isinstance(limit, Real) and limit > 0):
            raise InvalidConfigError(
                f"observation_limit={limit!r} must be above 0: how many training ranges a state may lie outside of "
                f"its own, such as {OBSERVATION_LIMIT:g}; or None."
            )
        limits = self.processor.action_range()
        if self.clamp_actions and limits is None:
            raise MissingStatisticsError(
                "clamp_actions=True needs the lowest and highest action of the training data; the statistics of "
                "'action' have no min and max."
            )
        self._range = None if limits is None else TrainingRange(self.processor, limits)
        self._step_limit = None if self.max_action_step is None else StepLimit(self.max_action_step, self.processor)
        plausibility = Plausibility(self.processor, limit, self._warned)
        self._episode = Episode(
            action_source(config), plausibility, torch.zeros(self.processor.output_features[ACTION].shape)
        )

    @property
    def outside_training_range(self) -> dict[str, float]:
        """The share of actions predicted since `reset()` that lie beyond anything demonstrated, per dimension.

        Beyond means by more than 1 % of the demonstrated range; of a relative dimension, that of its difference to
        the state. Empty when the statistics hold no minimum and maximum. A growing share says that the robot is where
        no demonstration has been.
        """
        if self._range is None:
            return {}
        outside, predicted = self._episode.outside, self._episode.predicted
        names = (self.processor.dimension_names or {}).get(ACTION) or [str(i) for i in range(len(outside))]
        return dict(zip(names, (outside / max(predicted, 1)).tolist(), strict=True))

    @property
    def observation_report(self) -> ObservationReport:
        """What was unusual about the observations since `reset()`: states outside their range, cameras; print it."""
        return self._episode.plausibility.report()

    def __call__(
        self, observation: Mapping[str, Any], task: str | list[str] | None = None, **sampling: Any
    ) -> torch.Tensor:
        """Return the next action in robot units.

        Args:
            observation: the current one, under the dataset's names; arrays with a batch dimension or without.
            task: the instruction, one for all or one each.
            sampling: `noise=`, `step_noise=`, `generator=`, `num_steps=`; used when a new chunk is predicted.

        Returns:
            (a,) for one observation, (b, a) for a batch; float32 on the CPU.

        Raises:
            ProcessingError and its subclasses: the observation is refused; the next one is as if it had not been.
            SharedPipelineError: another thread began this episode.
        """
        return self.select_action(observation, task, **sampling)

    @ordinary_tensors
    def select_action(
        self, observation: Mapping[str, Any], task: str | list[str] | None = None, **sampling: Any
    ) -> torch.Tensor:
        """Return the next action in robot units; the same as calling the pipeline."""
        episode = self._episode  # if it is reset meanwhile, from another thread, nothing reaches the new one
        with episode.in_one_thread():
            current = self.processor.read_observation(observation, steps=1)
            judgement = self._judged(episode, current, task, sampling)
            episode.require_batch(current)
            history = episode.history_with(current, self.model.config.n_obs_steps)
            outside, predicted = None, 0
            if not episode.actions.queued:
                seen = current if history is None else Observation.stacked(history)
                chunk, outside = self._predict(seen, task, **sampling)
                predicted = chunk.shape[0] * chunk.shape[1]
                episode.actions.push(chunk)
            # Only now, so that a refused observation leaves no trace.
            episode.remember(judgement, outside, predicted)
            episode.batch, episode.history = current.batch, history
            action = episode.actions.pop()  # (b, a)
            if self._step_limit is not None:
                action = episode.action = self._step_limit.limited(action, episode.action, current.state)
            return action if current.batched else action[0]

    @ordinary_tensors
    def predict_chunk(
        self, observation: Mapping[str, Any], task: str | list[str] | None = None, **sampling: Any
    ) -> torch.Tensor:
        """Return a whole chunk in robot units, (h, a) or (b, h, a), without touching queue or history.

        Arguments as in `__call__`; observations of policies with history carry it, or are repeated. `max_action_step`
        is kept between its actions.
        """
        episode = self._episode
        observation = self.processor.read_observation(observation)
        judgement = self._judged(episode, observation.newest, task, sampling)
        chunk, outside = self._predict(observation, task, **sampling)
        episode.remember(judgement, outside, chunk.shape[0] * chunk.shape[1])
        if self._step_limit is not None:
            chunk = self._step_limit.limited_chunk(chunk, observation.state)
        return chunk if observation.batched else chunk[0]

    def prepare(self, observation: Mapping[str, Any], task: str | list[str] | None = None) -> dict[str, Any]:
        """Return the policy's inputs for an observation, on its device and in its type."""
        return {name: self._to_policy(value) for name, value in self.processor(observation, task=task).items()}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save policy and processor: a folder that `from_pretrained` loads without any other file.

        With `push_to_hub=True` it is published; `repo_id`, `private`, `revision`, … as in `push_to_hub`.
        """
        kwargs, publishing = split_publishing(kwargs)
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if publishing is not None:
            publish_saved(self.model, save_directory, **publishing)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload policy, processor, records and card in one commit; arguments as in `PolicyModel.push_to_hub`."""
        return self.model.push_to_hub(repo_id, processor=self.processor, **kwargs)

    def _display_rows(self) -> tuple[str, dict[str, Any]]:
        config, settings = self.model.config, self.settings
        action = self.processor.contract().outputs[0]
        units = [f"{d.name or i} [{d.unit}]" if d.unit else d.name or str(i) for i, d in enumerate(action.dimensions)]
        inputs = [f"{name} {tuple(feature.shape)}" for name, feature in self.processor.input_features.items()]
        bounds = {name: settings[name] for name in ("clamp_actions", "max_action_step", "observation_limit")}
        rows = {
            "checkpoint": settings["checkpoint"],
            "embodiment": self.processor.embodiment,
            "policy": f"{type(self.model).__name__}, {self.model.num_parameters():,} parameters",
            "numbers": f"{settings['dtype']} on {self.device}",
            "observation": ", ".join(inputs) + (f"; the last {config.n_obs_steps}" if config.n_obs_steps > 1 else ""),
            "task": "the instruction in words" if config.reads_instruction else None,
            "action": f"{tuple(action.shape)}: {', '.join(units)}",
            "chunk": f"{config.action_horizon} actions, {config.n_action_steps} executed",
            "bounds": ", ".join(f"{name}={value}" for name, value in bounds.items() if value not in (None, False)),
            "observations": self.observation_report if self._episode.batch is not None else None,
        }
        return type(self).__name__, rows

    # --- inside ---------------------------------------------------------------------------------------

    def _judged(self, episode: Episode, current: Observation, task: Any, sampling: Mapping[str, Any]) -> Judgement:
        """Check all that a step is given, whether a chunk is predicted from it or not."""
        if unknown := [name for name in sampling if name not in SAMPLING]:
            raise UnknownInputError(type(self.model).__name__, unknown[0], SAMPLING)
        if sampling:
            Draws(**sampling).checked()
        self.processor.check_instruction(current, task)
        return episode.plausibility.judge(current)

    def _predict(
        self, observation: Observation, task: Any, **sampling: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a chunk (b, h, a) in robot units, and how many of it were outside the training range, (a,)."""
        with draws_taken_back(self.device, sampling.get("generator")), evaluating(self.model):
            inputs = self.prepare(observation, task)
            chunk = self.model.predict_action_chunk(**inputs, **sampling)  # (b, h, a), normalised
            actions = self.processor.decode_actions(chunk, state=observation.state)
            require_finite("The action in robot units", actions)
        if self._range is None:
            return actions, None
        outside = self._range.outside(actions, observation.state)
        return self._range.clamp(actions, observation.state) if self.clamp_actions else actions, outside

    def _to_policy(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._to_policy(item) for item in value]
        dtype = self.model.dtype if value.is_floating_point() else value.dtype
        return value.to(self.device, dtype, non_blocking=True)

    # What transformers.Pipeline asks of its subclasses; `__call__` above replaces its batching over data sets.
    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **kwargs: Any) -> Any:
        return self.processor(input_, **kwargs)

    def _forward(self, input_tensors: Any, **kwargs: Any) -> torch.Tensor:
        return self.model.predict_action_chunk(**input_tensors, **kwargs)

    def postprocess(self, model_outputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.processor.decode_actions(model_outputs)


class PolicyOfPipeline:
    """Load the policy for `transformers.pipeline`, which leaves the processor beside it to `PolicyPipeline`."""

    @staticmethod
    def from_pretrained(source: str | os.PathLike, **kwargs: Any) -> PolicyModel:
        """Load a policy; arguments as `AutoPolicy.from_pretrained`."""
        policy = AutoPolicy.from_pretrained(source, **kwargs)
        policy.loaded_for_pipeline = True
        return policy


PIPELINE_REGISTRY.register_pipeline("robotics", PolicyPipeline, pt_model=PolicyOfPipeline, type="multimodal")
