"""PolicyTrainingArguments: transformers' arguments, with defaults and additions for policies."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class PolicyTrainingArguments(TrainingArguments):
    """Set how a policy is trained; every argument of `transformers.TrainingArguments` is one of these too.

    Args:
        learning_rate_visual (`float`, *optional*): learning rate of the vision backbone; by default
            `learning_rate`.
    """

    learning_rate_visual: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision backbone; by default learning_rate."}
    )

    # The processor's output is exactly what a policy's forward names; there is nothing to remove.
    remove_unused_columns: bool = False
    # A loss that is not finite ends the run, instead of being left out of the mean that is shown.
    logging_nan_inf_filter: bool = False
    logging_steps: float = 50
    save_strategy: str = "no"
    report_to: str | list[str] | None = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    max_grad_norm: float = 10.0
    weight_decay: float = 1e-4
