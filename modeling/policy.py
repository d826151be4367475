"""PolicyModel and PolicyOutput: what every policy promises."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..checkpoint import Checkpoint
from ..configuration.policy import PolicyConfig
from ..errors import FeatureShapeError, FusedPolicyError, InferenceOnlyError
from .adapters import has_adapter, save_base_record
from .from_checkpoint import load_policy
from .inputs import LABELS, model_inputs
from .loading import discard_index, remove_other_weights
from .stages import compile_stages, example_observation


@dataclass
class PolicyOutput(ModelOutput):
    """Hold what a policy's forward pass returns.

    Args:
        loss (scalar tensor): the training loss, when labels were given.
        losses (`dict[str, torch.Tensor]`): its named parts, unweighted.
        actions (tensor (b, h, a)): predicted, normalised; None where a policy that samples computes its loss, which
            needs no prediction.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    actions: torch.Tensor | None = None


class PolicyModel(PreTrainedModel):
    """Be a policy: model inputs in, an action chunk or a training loss out.

    Subclasses set `config_class`, name every input in `forward`'s signature, call `self.post_init()` last in
    their constructor and register with `@register_policy`.
    """

    config_class = PolicyConfig
    main_input_name = "state"
    base_model_prefix = ""
    accepts_loss_kwargs = False  # forward returns a mean; Trainer must not rescale it
    _supports_sdpa = True

    # Names of the modules that make up the parts that can be tuned apart, under the names of the `tune_*` arguments;
    # where LoRA layers go in each (ends of module names); and modules that are trained whole if their part has LoRA.
    parameter_parts: ClassVar[dict[str, tuple[str, ...]]] = {}
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {}
    modules_to_save: ClassVar[tuple[str, ...]] = ()

    # The methods that sampling consists of, in order, under the name of what each does: what `compile` compiles and
    # `manipulators benchmark` times. They take and return tensors, or containers of tensors.
    stages: ClassVar[dict[str, str]] = {"network": "forward"}

    is_fused = False  # see `fuse`
    loaded_from: Checkpoint | None = None

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own defaults, which the published policies start from; transformers would draw N(0, 0.02).
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()

    def freeze_parts(self) -> None:
        """Mark the parameters that are never trained; called again after loading, which forgets the mark."""

    # --- parts ----------------------------------------------------------------------------------------

    def part_modules(self, part: str) -> dict[str, nn.Module]:
        """Return the modules of a part that this policy has, by name; a config may leave some out."""
        found = {}
        for name in self.parameter_parts.get(part, ()):
            with suppress(AttributeError):
                found[name] = self.get_submodule(name)
        return {name: module for name, module in found.items() if any(True for _ in module.parameters())}

    def train(self, mode: bool = True):
        """Set training mode; a part's modules that are frozen whole stay as they are at inference."""
        if mode and self.is_fused:
            raise FusedPolicyError(f"A fused {type(self).__name__} is for inference; to train it, load it again.")
        super().train(mode)
        if mode:
            for part in self.parameter_parts:
                for module in self.part_modules(part).values():
                    if not any(parameter.requires_grad for parameter in module.parameters()):
                        module.eval()
        return self

    # --- inputs ---------------------------------------------------------------------------------------

    def check_inputs(self, **observation: Any) -> dict[str, Any]:
        """Return the observation inputs that the config declares.

        Raises:
            MissingFeatureError, FeatureShapeError: one is absent or of another width.
        """
        given = {name: value for name, value in observation.items() if value is not None}
        return model_inputs(given, self.config)

    def check_actions(self, actions: torch.Tensor, action_is_pad: torch.Tensor | None = None) -> None:
        """Check labels (b, h, a) against horizon and width of the config, and their padding (b, h)."""
        horizon, width = self.config.action_horizon, self.config.model_action_dim
        if actions.ndim != 3 or tuple(actions.shape[1:]) != (horizon, width):
            raise FeatureShapeError("actions", tuple(actions.shape), f"(batch, {horizon}, {width})")
        if action_is_pad is not None and action_is_pad.shape != actions.shape[:2]:
            raise FeatureShapeError("action_is_pad", tuple(action_is_pad.shape), f"{tuple(actions.shape[:2])}")

    # --- prediction -----------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_action_chunk(
        self,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Return the normalised action chunk (b, h, a) from the current step on; labels among inputs are ignored.

        Policies that sample override this. The default suits those that decode deterministically: `noise`,
        `generator` and `num_steps` have nothing to change.
        """
        observation = {name: value for name, value in inputs.items() if name not in LABELS}
        return self(**observation).actions

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

    def _fuse(self) -> None:
        """Replace layers by fused ones; a policy that has some to join overrides this."""

    # --- loading and saving ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        allow_partial: bool = False,
        base: str | os.PathLike | PolicyModel | None = None,
        **kwargs,
    ):
        """Load a policy from a folder or Hub id, in our format or another project's; every weight must fit.

        Args:
            pretrained_model_name_or_path: folder or Hub id, of a policy or of an adapter; None with `config=` and
                `state_dict=`.
            allow_partial: accept missing, unexpected and mis-shaped weights, and log them.
            base: where the base of an adapter is now, or the loaded base; by default where it was when the adapter
                was trained.
            kwargs: config fields to override, and what `PreTrainedModel.from_pretrained` takes. Weights are
                read from safetensors only.

        Raises:
            WeightsMismatchError: weights are missing, unexpected or of another shape.
            MissingFileError, CorruptFileError, ConflictingWeightsError: there is no single readable set of weights.
            BaseMismatchError: an adapter's base is not the one it was trained on.
        """
        kwargs |= {"allow_partial": allow_partial, "base": base}
        return load_policy(cls, pretrained_model_name_or_path, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Let no name through: transformers forgives some that its own models once had, such as `position_ids`."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save config and weights; of a policy with an adapter the adapter, the config and the name of its base.

        Weights that the folder held before are replaced: it holds one set.
        """
        is_main, variant = kwargs.get("is_main_process", True), kwargs.get("variant")
        if is_main:
            discard_index(Path(save_directory), variant)
        super().save_pretrained(save_directory, *args, **kwargs)
        if not is_main:
            return
        dtypes = {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}
        narrowest = min(dtypes, key=lambda dtype: dtype.itemsize, default=self.dtype)
        if narrowest != self.dtype:  # transformers notes the first parameter's, which may be of a part kept in float32
            self.config.dtype = narrowest
            self.config.save_pretrained(save_directory)
        if has_adapter(self):
            save_base_record(self, save_directory)
        remove_other_weights(Path(save_directory), adapter=has_adapter(self), variant=variant)

    def push_to_hub(self, repo_id: str, *, processor: Any = None, card: str | None = None, **kwargs) -> str:
        """Upload the policy, its processor when given, and a model card; a card that a person edited is kept.

        Args:
            repo_id: `org/name`.
            processor: the policy's processor, without which a checkpoint cannot run.
            card: text of README.md; by default rendered from the config.
            kwargs: `commit_message`, `private`, `token`, `revision`, `create_pr`, `max_shard_size`, `tags`.

        Returns:
            The commit's address.
        """
        # The room of cards stands beside this one; only publishing looks into it.
        from ..hub_cards.publish import upload_checkpoint

        return upload_checkpoint(self, repo_id, processor=processor, card=card, **kwargs)
