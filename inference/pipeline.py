"""PolicyPipeline: observation in, action in robot units out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ..auto import AutoPolicy, load_policy_and_processor, load_processor
from ..checkpoint import split_publishing
from ..configuration.features import ACTION
from ..errors import CheckpointError, FeatureShapeError, MissingStatisticsError
from ..hub_cards.publish import publish_saved
from ..modeling.loading import require_device
from ..modeling.policy import PolicyModel
from ..processing.arrays import require_finite
from ..processing.observation import Observation
from ..processing.processor import PolicyProcessor
from .action_sources import action_source
from .modes import evaluating, ordinary_tensors

# What configs call the steps of a prediction; `denoising_steps` is the diffusion config's effective number.
SAMPLING_STEPS = ("denoising_steps", "num_inference_steps", "num_inference_timesteps")


class PolicyPipeline(Pipeline):
    """Run a policy on one robot, or on a batch of environments that step together.

    It owns what a pure network must not: the observation history (the first observation repeated), the queue of
    predicted actions, temporal ensembling. Call `reset()` when an episode begins.

    Args:
        model (`PolicyModel`): the policy; put into eval mode.
        processor (`PolicyProcessor`): the one saved with it; `transformers.pipeline` leaves it to be loaded here.
        clamp_actions (`bool`, *optional*, defaults to False): keep actions inside the range of the training data;
            relative dimensions are not clamped.
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
        tokenizer: Any = None,
        embodiment: str | None = None,
        camera_map: Mapping[str, str] | None = None,
        **kwargs: Any,
    ):
        if processor is None and getattr(model, "loaded_for_pipeline", False):
            processor = load_processor(model, tokenizer, embodiment, camera_map)
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
        self.clamp_actions = clamp_actions
        given = {"tokenizer": tokenizer, "embodiment": embodiment, "camera_map": camera_map}
        self._loaded_with = {name: value for name, value in given.items() if value is not None}
        if clamp_actions:
            self._limits()
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
        **overrides: Any,
    ) -> PolicyPipeline:
        """Load policy and processor from a folder or Hub id, in our format or as another project published it.

        Args:
            source: folder or Hub id.
            device: by default the first accelerator, else the CPU.
            dtype: of the weights; by default as saved.
            camera_map: your camera's name → the policy's, with or without `observation.images.`.
            embodiment: which robot it is, where a checkpoint knows several.
            clamp_actions: keep actions inside the range of the training data.
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
        pipeline = cls(model=policy, processor=processor, clamp_actions=clamp_actions, device=device)
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

        A changed `config.n_action_steps` or `config.temporal_ensemble_coeff` takes effect here.

        Raises:
            InvalidConfigError: the config was changed to what no policy can have.
        """
        config = self.model.config
        config.validate()
        self._actions = action_source(config)
        self._history: list[Observation] | None = None
        self._leading: tuple[int, ...] | None = None
        self._range = _widened(self.processor.action_range())
        self._outside, self._predicted = torch.zeros(config.robot_action_dim), 0

    @property
    def outside_training_range(self) -> dict[str, float]:
        """The share of actions predicted since `reset()` that lie beyond anything demonstrated, per dimension.

        Beyond means by more than 1 % of the demonstrated range. Empty when the statistics hold no minimum and
        maximum. A growing share says that the robot is where no demonstration has been.
        """
        if self._range is None:
            return {}
        names = (self.processor.dimension_names or {}).get(ACTION) or [str(i) for i in range(len(self._outside))]
        shares = self._outside / max(self._predicted, 1)
        return dict(zip(names, shares.tolist(), strict=True))

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
        """
        return self.select_action(observation, task, **sampling)

    @ordinary_tensors
    def select_action(
        self, observation: Mapping[str, Any], task: str | list[str] | None = None, **sampling: Any
    ) -> torch.Tensor:
        """Return the next action in robot units; the same as calling the pipeline."""
        leading = self.processor.leading_dimensions(observation)
        if self._leading is not None and leading != self._leading:
            raise FeatureShapeError(
                "The observation's batch", leading, f"{self._leading}, as in this episode's first; call reset() first"
            )
        history = None
        if self.model.config.n_obs_steps > 1:
            history = self._history_with(observation)
            observation = Observation.stacked(history)
        if self._actions.needs_chunk:
            self._actions.push(self._predict(observation, task, **sampling))
        # Only now, so that a refused observation leaves no trace.
        self._leading, self._history = leading, history
        action = self._actions.pop()  # (b, a)
        return action if leading else action[0]

    @ordinary_tensors
    def predict_chunk(
        self, observation: Mapping[str, Any], task: str | list[str] | None = None, **sampling: Any
    ) -> torch.Tensor:
        """Return a whole chunk in robot units, (h, a) or (b, h, a), without touching queue or history.

        Arguments as in `__call__`; observations of policies with history carry it, or are repeated.
        """
        chunk = self._predict(observation, task, **sampling)
        return chunk if self.processor.leading_dimensions(observation) else chunk[0]

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

    # --- inside ---------------------------------------------------------------------------------------

    def _predict(self, observation: Mapping[str, Any], task: Any, **sampling: Any) -> torch.Tensor:
        observation = self.processor.read_observation(observation)
        inputs = self.prepare(observation, task)
        with evaluating(self.model):
            chunk = self.model.predict_action_chunk(**inputs, **sampling)  # (b, h, a), normalised
        actions = self.processor.decode_actions(chunk, state=observation.state)
        require_finite("The action in robot units", actions)
        if self._range is not None:
            low, high = self._range
            self._outside += ((actions < low) | (actions > high)).flatten(0, 1).sum(0)
            self._predicted += actions.shape[0] * actions.shape[1]
        if self.clamp_actions:
            low, high = self._limits()
            actions = actions.clamp(low, high)
        return actions

    def _limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        limits = self.processor.action_range()
        if limits is None:
            raise MissingStatisticsError(
                "clamp_actions=True needs the lowest and highest action of the training data; the statistics of "
                "'action' have no min and max."
            )
        return limits

    def _to_policy(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._to_policy(item) for item in value]
        dtype = self.model.dtype if value.is_floating_point() else value.dtype
        return value.to(self.device, dtype, non_blocking=True)

    def _history_with(self, observation: Mapping[str, Any]) -> list[Observation]:
        """Return the last `n_obs_steps` observations, (b, …) each; the first one is repeated to fill them."""
        # Copied: a simulator may write its next observation into the same array.
        current = self.processor.read_observation(observation, steps=1).copied()
        steps = self.model.config.n_obs_steps
        return [*self._history[1:], current] if self._history else [current] * steps

    # What transformers.Pipeline asks of its subclasses; `__call__` above replaces its batching over data sets.
    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **kwargs: Any) -> Any:
        return self.processor(input_, **kwargs)

    def _forward(self, input_tensors: Any, **kwargs: Any) -> torch.Tensor:
        return self.model.predict_action_chunk(**input_tensors, **kwargs)

    def postprocess(self, model_outputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.processor.decode_actions(model_outputs)


def _widened(limits: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    if limits is None:
        return None
    low, high = limits
    margin = 0.01 * (high - low) + 1e-6  # a constant dimension keeps room for rounding
    return low - margin, high + margin


class PolicyOfPipeline:
    """Load the policy for `transformers.pipeline`, which leaves the processor beside it to `PolicyPipeline`."""

    @staticmethod
    def from_pretrained(source: str | os.PathLike, **kwargs: Any) -> PolicyModel:
        """Load a policy; arguments as `AutoPolicy.from_pretrained`."""
        policy = AutoPolicy.from_pretrained(source, **kwargs)
        policy.loaded_for_pipeline = True
        return policy


PIPELINE_REGISTRY.register_pipeline("robotics", PolicyPipeline, pt_model=PolicyOfPipeline, type="multimodal")
