"""Predicting: the half of a trainer that evaluates, with predicted actions where they are wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..modeling.inputs import LABELS
from .global_mean import MeanOfEvaluation


class Predicting:
    """Return predicted actions and labels too; a base class of `PolicyTrainer`, before transformers' own."""

    _batches_predicted = 0
    _evaluation_mean: MeanOfEvaluation | None = None  # while a dataset is evaluated

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """Evaluate or predict: one mean over what counts in all batches, and the same sampled actions every time."""
        self._batches_predicted = 0
        self._evaluation_mean = MeanOfEvaluation(self.accelerator)
        try:
            output = super().evaluation_loop(*args, **kwargs)
            name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
            if self.compute_loss_func is None and name in output.metrics:
                output.metrics[name] = self._evaluation_mean.value()
            return output
        finally:
            self._evaluation_mean = None

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """Return loss, predicted actions (b, h, a) and labels of a batch; the loss alone where nothing else is wanted.

        A policy that samples is run a second time for its actions, without labels.
        """
        inputs = self._prepare_inputs(inputs)
        loss, actions = None, None
        with torch.no_grad(), self.compute_loss_context_manager():
            if inputs.get("actions") is not None:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss, actions = loss.detach().mean(), outputs.actions
            if prediction_loss_only:
                return loss, None, None
            if actions is None:
                actions = self._sampled(model, {name: x for name, x in inputs.items() if name not in LABELS})
        config = self._saved_policy.config
        width = config.robot_action_dim if config.output_features else None
        labels = tuple(_cut(name, inputs.get(name), width) for name in self.label_names)
        if any(label is None for label in labels):
            labels = None
        return loss, actions[..., :width].detach(), labels[0] if labels and len(labels) == 1 else labels

    def _sampled(self, model: nn.Module, observation: dict[str, Any]) -> torch.Tensor:
        """Return sampled actions (b, h, a), drawn by a seed for each batch; torch's random state stays as it was."""
        self._batches_predicted += 1
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed((self.args.seed + (self.args.process_index << 16) + self._batches_predicted) % 2**63)
            return model(**observation).actions


def _cut(name: str, label: torch.Tensor | None, width: int | None) -> torch.Tensor | None:
    """Return a label (b, h, …) without the dimensions that a policy pads."""
    return label[..., :width] if label is not None and name in ("actions", "action_mask") else label
