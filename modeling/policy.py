"""PolicyModel: what every policy promises."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration.policy import PolicyConfig
from ..errors import (
    FeatureShapeError,
    FusedPolicyError,
    InferenceOnlyError,
    InvalidConfigError,
    UnknownInputError,
)
from .adapters import has_adapter, record_base
from .from_checkpoint import Checkpointed
from .inputs import LABELS, model_inputs
from .losses import counted, fill_padded, mean_over, sums_of_samples
from .output import PolicyOutput
from .parts import Parts
from .precision import compute_dtype
from .seam import SHARED_INPUTS, Draws, Features, Labels, PolicyInputs
from .sharding import gather_for_methods
from .stages import compile_stages, example_observation

NO_DRAWS = Draws()


class PolicyModel(Parts, Checkpointed, PreTrainedModel):
    """Map model inputs to an action chunk or a training loss.

    A policy has a `backbone` and an `action_head` (see `seam`), names every input in the signature of its `forward`,
    packs them and calls the one below. One whose backbone and head are one network implements `errors` and `sample`.
    Subclasses set `config_class`, call `self.post_init()` last in their constructor and register with
    `@register_policy`.
    """

    config_class = PolicyConfig
    main_input_name = "state"
    base_model_prefix = ""
    accepts_loss_kwargs = False  # forward returns a mean; Trainer must not rescale it
    _supports_sdpa = True

    # Named losses that are means over the samples of a batch, as ACT's KL divergence is; others are over actions.
    per_sample_losses: ClassVar[tuple[str, ...]] = ()

    is_fused = False  # see `fuse`

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own defaults, which the published policies start from; transformers would draw N(0, 0.02).
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        if (start := getattr(module, "start_weights", None)) is not None:
            start(module)

    def train(self, mode: bool = True):
        """Set training mode; a part's modules that are frozen whole stay as they are at inference.

        Raises:
            FusedPolicyError: the policy has been fused.
        """
        if mode and self.is_fused:
            raise FusedPolicyError(f"A fused {type(self).__name__} is for inference; to train it, load it again.")
        return super().train(mode)

    # --- inputs ---------------------------------------------------------------------------------------

    def check_inputs(self, inputs: PolicyInputs) -> PolicyInputs:
        """Return the inputs that the config declares.

        Raises:
            MissingFeatureError, FeatureShapeError: one is absent or of another width.
            UnknownInputError: there is one that no policy has and the config does not name.
        """
        special = [*(inputs.extra or ()), *(["embodiment_id"] if inputs.embodiment_id is not None else [])]
        unknown = [name for name in special if name not in self.config.other_inputs]
        if unknown:
            raise UnknownInputError(type(self).__name__, unknown[0], (*SHARED_INPUTS, *self.config.other_inputs))
        return PolicyInputs.of(model_inputs(inputs.given(), self.config))

    def check_labels(self, labels: Labels) -> Labels:
        """Return labels of the config's horizon and width, with what is to count.

        Raises:
            FeatureShapeError: actions, their padding or their mask have another shape.
        """
        actions, is_pad, mask = labels
        horizon, width = self.config.action_horizon, self.config.model_action_dim
        if actions.ndim != 3 or tuple(actions.shape[1:]) != (horizon, width):
            raise FeatureShapeError("actions", tuple(actions.shape), f"(batch, {horizon}, {width})")
        if is_pad is not None and is_pad.shape != actions.shape[:2]:
            raise FeatureShapeError("action_is_pad", tuple(is_pad.shape), f"{tuple(actions.shape[:2])}")
        if mask is not None and mask.shape != actions.shape:
            raise FeatureShapeError("action_mask", tuple(mask.shape), f"{tuple(actions.shape)}")
        mask = self._action_mask(labels)
        if is_pad is not None and self.config.loss_over == "real":
            actions = fill_padded(actions, is_pad)
        return Labels(actions, is_pad, mask)

    def _action_mask(self, labels: Labels) -> torch.Tensor | None:
        """Return which dimensions of the actions are the robot's: as given, or those of its width."""
        actions, _, mask = labels
        if mask is None and self.config.output_features and self.config.robot_action_dim < actions.shape[-1]:
            return torch.arange(actions.shape[-1], device=actions.device) < self.config.robot_action_dim
        return mask

    def loss_counts(self, labels: Labels) -> tuple[torch.Tensor, int]:
        """Return over how many action values, and over how many samples, the losses of a batch are means.

        A trainer needs both to make one mean of several batches.
        """
        mask = self._action_mask(labels)
        valid = counted(torch.ones_like(labels.actions), labels.action_is_pad, mask, self.config.loss_over)
        return valid.sum(), len(labels.actions)

    # --- forward and prediction -----------------------------------------------------------------------

    def forward(
        self, inputs: PolicyInputs, labels: Labels, draws: Draws = NO_DRAWS, return_loss: bool = True
    ) -> PolicyOutput:
        """Return the training loss for labels; without them (or with `return_loss=False`) actions.

        Args:
            inputs: the observation.
            labels: what is to be learned; none where its `actions` are None.
            draws: the random numbers.
            return_loss: leave out the loss when False.

        Returns:
            `PolicyOutput` with `loss` and `losses`, or with `actions` (b, h, a), normalised and padded.
        """
        gather_for_methods(self, self._components())
        draws.checked()
        inputs = self.check_inputs(inputs)
        if labels.actions is not None:
            labels = self.check_labels(labels)
        if labels.actions is None or not return_loss:
            return PolicyOutput(actions=self.sample(inputs, draws).to(self.dtype))
        losses, predicted, *errors = self.losses(inputs, labels, draws)
        weights = self.config.loss_weights
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items())
        # Without a graph, except for those that a trainer weights apart from the others.
        losses = {n: value if n in self.per_sample_losses else value.detach() for n, value in losses.items()}
        sums = self._sums_of_samples(errors[0], labels) if errors else None
        return PolicyOutput(loss=loss, losses=losses, actions=predicted, sample_errors=sums)

    def _sums_of_samples(self, errors: Mapping[str, torch.Tensor], labels: Labels) -> torch.Tensor:
        """Return of every sample the weighted sum of its errors, and how many values count, (b, 2)."""
        weights, over = self.config.loss_weights, self.config.loss_over
        each = {n: sums_of_samples(e, labels.action_is_pad, labels.action_mask, over) for n, e in errors.items()}
        total = sum(weights.get(name, 1.0) * sums[:, 0] for name, sums in each.items())
        return torch.stack([total, next(iter(each.values()))[:, 1]], dim=-1)

    @torch.no_grad()
    def predict_action_chunk(
        self,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Return the normalised actions to execute (b, h, a), from the current step on.

        Args:
            noise: (b, h, a) to start from, over the whole horizon; drawn when None. A policy that decodes without
                chance has no use for it, nor for what follows.
            generator: of the draws.
            num_steps: of sampling; by default the config's.
            inputs: as in `forward`, labels among them are ignored; for samplers that draw at every step `step_noise`.
        """
        if gather_for_methods(self, self._components()):
            return self.predict_action_chunk(noise=noise, generator=generator, num_steps=num_steps, **inputs)
        draws = Draws(noise, step_noise=inputs.pop("step_noise", None), generator=generator, num_steps=num_steps)
        draws.checked()
        observation = {name: value for name, value in inputs.items() if name not in LABELS}
        if not self._components() and type(self).sample is PolicyModel.sample:
            return self(**observation).actions  # a policy that writes its own forward
        actions = self.sample(self.check_inputs(PolicyInputs.of(observation)), draws)
        return actions[:, self.config.executed_steps].to(self.dtype)

    def encode(self, inputs: PolicyInputs, draws: Draws = NO_DRAWS) -> Features:
        """Return the backbone's features of an observation, which it reads in the type of its weights."""
        inputs = inputs.in_dtype(compute_dtype(self.backbone))
        names = getattr(self.backbone, "draws", ())
        return self.backbone.encode(inputs, **{name: getattr(draws, name) for name in names})

    def errors(self, inputs: PolicyInputs, actions: torch.Tensor, draws: Draws = NO_DRAWS) -> dict[str, torch.Tensor]:
        """Return the named errors of a training pass, (b, h, a) each and unreduced."""
        return self.action_head.errors(self.encode(inputs, draws), inputs, actions, draws)

    def losses(
        self, inputs: PolicyInputs, labels: Labels, draws: Draws
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, dict[str, torch.Tensor]]:
        """Return the named losses of a training pass, unweighted; predicted actions where they cost nothing; and the
        errors (b, h, a) that are averaged, without which datasets of a mixture have no losses of their own."""
        errors = self.errors(inputs, labels.actions, draws)
        over = self.config.loss_over
        reduced = {n: mean_over(e, labels.action_is_pad, labels.action_mask, over) for n, e in errors.items()}
        return reduced, None, errors

    def sample(self, inputs: PolicyInputs, draws: Draws = NO_DRAWS) -> torch.Tensor:
        """Return actions (b, h, a) over the whole horizon, normalised and padded."""
        return self.action_head.sample(self.encode(inputs, draws), inputs, draws)

    # --- vocabulary -----------------------------------------------------------------------------------

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Give the language model's embedding another number of rows, and say so in the config; return the embedding.

        Args:
            new_num_tokens: by default as many as there are.
            pad_to_multiple_of: round up to a multiple of this.
            mean_resizing: draw new rows like the old ones, instead of from N(0, 0.02²).

        Raises:
            InvalidConfigError: there is no language model, its vocabulary is fixed, or there is an adapter, whose base
                would be another one.
        """
        held = self.config.vocabulary_size
        rows = held if new_num_tokens is None else new_num_tokens
        if rows is not None and pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if held is not None and rows == held:
            return self.get_input_embeddings()
        if has_adapter(self):
            raise InvalidConfigError(
                f"{type(self).__name__} has an adapter, whose base would be another one. Resize the base, save it, "
                f"and train the adapter on that."
            )
        copy.deepcopy(self.config).set_vocabulary_size(rows)  # nothing is changed where it is refused
        self.config.set_vocabulary_size(rows)
        self.config.name_or_path = self.name_or_path = ""  # no adapter can name the old checkpoint as its base
        return self._resize_token_embeddings(rows, mean_resizing=mean_resizing)

    # --- speed ----------------------------------------------------------------------------------------

    def fuse(self):
        """Join weights that are multiplied by the same input into one matrix each, and return the policy.

        Predictions stay what they were, up to rounding. `save_pretrained` writes the separate weights under their
        names, so that loading is how a policy becomes unfused again.

        Raises:
            FusedPolicyError: it is being trained, or has an adapter.
        """
        name = type(self).__name__
        if self.training:
            raise FusedPolicyError(f"{name} is in training mode, and a fused policy is for inference: policy.eval()")
        if has_adapter(self):
            raise FusedPolicyError(
                f"{name} has an adapter, whose layers cannot be joined. Make it part of the weights first: "
                f"manipulators.merge_and_save(policy, folder), which returns the merged policy."
            )
        if getattr(self, "is_quantized", False):
            raise FusedPolicyError(f"{name} is quantised; only plain linear layers can be fused.")
        if not self.is_fused:
            self._fuse()
            self.is_fused = True
        return self

    def compile(self, batch_size: int = 1, inputs: Mapping[str, Any] | None = None, **options: Any):
        """Compile what sampling consists of, stage by stage and for fixed shapes, and return the policy, warmed up.

        Other shapes are compiled when they come, at the price of a pause: give here what the robot will give.

        Args:
            batch_size: observations at once.
            inputs: model inputs to warm up with; by default the config's `example_inputs`.
            options: of `torch.compile`, such as `backend=`, and `mode="reduce-overhead"` for CUDA graphs.

        Raises:
            InferenceOnlyError: it is in training mode.
        """
        if self.training:
            raise InferenceOnlyError(
                f"{type(self).__name__} is in training mode, and compile() is for inference: policy.eval().compile()"
            )
        compile_stages(self, **options)
        inputs = example_observation(self, batch_size) if inputs is None else inputs
        for _ in range(2):  # the first call compiles; with CUDA graphs the second one records
            self.predict_action_chunk(**inputs)
        return self

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Put adapter layers into the policy, as transformers does; not into a fused one."""
        if self.is_fused:
            raise FusedPolicyError(
                f"A fused {type(self).__name__} takes no adapter, whose layers go into the separate weights; load it "
                f"again, and fuse it after merging."
            )
        super().add_adapter(*args, **kwargs)
        record_base(self)

    def _fuse(self) -> None:
        """Replace layers by fused ones; a policy that has some to join overrides this."""
