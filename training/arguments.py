"""PolicyTrainingArguments: transformers' arguments, with defaults and additions for policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from ..configuration.typed_values import read_as
from ..errors import InvalidConfigError

# Words too, because a command line has no others; `__post_init__` makes truth values of them.
TuneMode = Literal[True, False, "lora", "true", "false"]
_NUMBERS = (float, int, float | None, int | None)
PARTS = ("tune_llm", "tune_visual", "tune_projector", "tune_diffusion_model")


@dataclass
class PolicyTrainingArguments(TrainingArguments):
    """Set how a policy is trained; every argument of `transformers.TrainingArguments` is one of these too.

    Args:
        learning_rate_visual (`float`, *optional*): learning rate of the vision backbone; by default
            `learning_rate`.
        tune_llm, tune_visual, tune_projector, tune_diffusion_model (`bool` or `"lora"`, *optional*): how a part
            of the policy is trained: False freezes it, True trains it, "lora" trains low-rank layers in it; by default
            the policy's config decides.
        lora_rank, lora_alpha, lora_dropout, use_dora: of the low-rank layers, as in peft's `LoraConfig`.
        ema_decay (`float`, *optional*): average the weights over the steps, keeping at most this share of the average
            at each, such as 0.9999. Evaluation uses the average, and it is what a finished run publishes.
        ema_power, ema_inv_gamma (`float`, *optional*, defaults to 0.75 and 1.0): update t = 0, 1, … keeps
            1 - (1 + t / ema_inv_gamma) ** -ema_power, until that exceeds `ema_decay`.
        ema_update_after_step (`int`, *optional*, defaults to 0): steps before, whose weights are not averaged.

    Raises:
        InvalidConfigError: a decay outside [0, 1), a power or inv_gamma that is not positive, a negative step or
            seed.
    """

    learning_rate_visual: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision backbone; by default learning_rate."}
    )

    tune_llm: TuneMode | None = field(default=None, metadata={"help": "false, true or lora."})
    tune_visual: TuneMode | None = field(default=None, metadata={"help": "false, true or lora."})
    tune_projector: TuneMode | None = field(default=None, metadata={"help": "false, true or lora."})
    tune_diffusion_model: TuneMode | None = field(default=None, metadata={"help": "false, true or lora."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA layers."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA layers are multiplied by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the LoRA layers."})
    use_dora: bool = field(default=False, metadata={"help": "Train the weights' magnitudes too (DoRA)."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Average the weights over the steps, keeping at most this share, in [0, 1)."}
    )
    ema_power: float = field(default=0.75, metadata={"help": "Exponent of the average's warm-up."})
    ema_inv_gamma: float = field(default=1.0, metadata={"help": "Steps in which the average's warm-up begins."})
    ema_update_after_step: int = field(default=0, metadata={"help": "Steps whose weights are not averaged."})

    # The processor returns exactly the inputs that a policy's forward names.
    remove_unused_columns: bool = False
    # A loss that is not finite ends the run; transformers would leave it out of the logged mean.
    logging_nan_inf_filter: bool = False
    logging_steps: float = 50
    save_strategy: str = "no"
    report_to: None | str | list[str] = "none"  # noqa: RUF036  (HfArgumentParser takes the second type)
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    max_grad_norm: float = 10.0
    weight_decay: float = 1e-4

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for name, value in vars(self).items():
            if isinstance(value, str) and hints.get(name) in _NUMBERS:  # YAML reads 1e-4 as text
                setattr(self, name, read_as(value, hints[name]))
        self.report_to = "none" if self.report_to is None else self.report_to
        super().__post_init__()
        known = get_available_reporting_integrations()
        if missing := [name for name in self.report_to if name not in known]:
            raise InvalidConfigError(
                f"report_to={missing[0]!r} is not installed. Install it, or leave report_to out. Installed: "
                f"{', '.join(known) or 'none'}."
            )
        for part, mode in self.tuning.items():
            setattr(self, part, {"true": True, "false": False}.get(mode, mode) if isinstance(mode, str) else mode)
        for part, mode in self.tuning.items():
            if mode not in (None, True, False, "lora"):
                raise InvalidConfigError(f"{part}={mode!r} must be None, False, True or 'lora'.")
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise InvalidConfigError(f"{name}={getattr(self, name)} must lie between 0 and {2**32 - 1}.")
        if self.lora_rank < 1 or not 0 <= self.lora_dropout < 1:
            raise InvalidConfigError(
                f"lora_rank={self.lora_rank} must be at least 1, and lora_dropout={self.lora_dropout} in [0, 1)."
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InvalidConfigError(
                f"ema_decay={self.ema_decay} must lie in [0, 1), such as 0.9999; None disables averaging."
            )
        for name in ("ema_power", "ema_inv_gamma"):
            if getattr(self, name) <= 0:
                raise InvalidConfigError(f"{name}={getattr(self, name)} must be greater than 0.")
        if self.ema_update_after_step < 0:
            raise InvalidConfigError(f"ema_update_after_step={self.ema_update_after_step} must be at least 0.")

    @property
    def tuning(self) -> dict[str, bool | str | None]:
        """How each part of the policy is trained."""
        return {part: getattr(self, part) for part in PARTS}

    @property
    def lora_options(self) -> dict[str, Any]:
        """The arguments of peft's `LoraConfig`."""
        return {
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_dora": self.use_dora,
        }

    @property
    def ema_options(self) -> dict[str, float]:
        """The arguments of `WeightAverage`."""
        return {
            "decay": self.ema_decay,
            "power": self.ema_power,
            "inv_gamma": self.ema_inv_gamma,
            "update_after_step": self.ema_update_after_step,
        }
