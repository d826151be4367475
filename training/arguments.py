"""PolicyTrainingArguments: transformers' arguments, with defaults and additions for policies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..configuration.typed_values import read_as
from ..errors import InvalidConfigError, nearest
from .processes import requested_strategy, require_company, require_possible_strategy, runs_on_cpu

# Words too, because a command line has no others; `__post_init__` makes truth values of them.
TuneMode = Literal[True, False, "lora", "true", "false"]
_NUMBERS = (float, int, float | None, int | None)
# The lowest value of a number, and whether it may be that; transformers lets others train nothing, or NaN.
_LOWEST = {
    "learning_rate": (0, False),
    "learning_rate_visual": (0, True),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "num_train_epochs": (0, False),
    "save_steps": (0, False),
    "logging_steps": (0, True),
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "lora_alpha": (0, False),
    "ema_power": (0, False),
    "ema_inv_gamma": (0, False),
    "ema_update_after_step": (0, True),
}
_SAMPLING = ("random", "sequential", "group_by_length")
_MAY_BE_INFINITE = ("max_grad_norm",)  # gradients are measured and not clipped
PARTS = ("tune_llm", "tune_visual", "tune_projector", "tune_diffusion_model")


# Packages of trackers that are not named like them. transformers looks for some when it calls them, not before.
_PACKAGES = {"comet_ml": "comet-ml"}
_LOOKED_FOR_LATER = ("azure_ml", "flyte", "kubeflow")


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
        InvalidConfigError: a tracker that is not installed, or a number that is NaN or out of its range.
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
        # accelerate would let each of several processes train by itself where there is no GPU.
        self.use_cpu = runs_on_cpu(self.use_cpu)
        require_possible_strategy(requested_strategy(vars(self)), self.use_cpu)
        super().__post_init__()
        require_company(self)
        _require_trackers(self.report_to)
        for part, mode in self.tuning.items():
            setattr(self, part, {"true": True, "false": False}.get(mode, mode) if isinstance(mode, str) else mode)
        self.check()

    def check(self) -> None:
        """Check what is set here; a search over hyperparameters sets it after the arguments were made.

        Raises:
            InvalidConfigError: as above.
        """
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
        _require_possible(self)

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


def _require_trackers(names: list[str]) -> None:
    """Check that what losses are reported to is there, before anything is loaded or recorded."""
    known, installed = INTEGRATION_TO_CALLBACK, get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise InvalidConfigError(f"report_to={name!r} is no tracker. {nearest(name, known)}")
        if name not in installed and name not in _LOOKED_FOR_LATER:
            package = _PACKAGES.get(name, name)
            raise InvalidConfigError(
                f"report_to={name!r}, but {package} is not installed, or is disabled: pip install {package}"
            )


def _require_possible(arguments: PolicyTrainingArguments) -> None:
    """Check that every number can be trained with."""
    for name, value in vars(arguments).items():
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and name not in _MAY_BE_INFINITE)):
            raise InvalidConfigError(f"{name}={value} must be a finite number.")
    for name, (lowest, may_equal) in _LOWEST.items():
        value = getattr(arguments, name)
        if value is not None and (value < lowest or (value == lowest and not may_equal)):
            raise InvalidConfigError(f"{name}={value} must be {'at least' if may_equal else 'greater than'} {lowest}.")
    if arguments.train_sampling_strategy not in _SAMPLING:
        raise InvalidConfigError(
            f"train_sampling_strategy={arguments.train_sampling_strategy!r} does not exist. Choose one of: "
            f"{', '.join(_SAMPLING)}."
        )
    if arguments.max_steps < 1 and arguments.max_steps != -1:
        raise InvalidConfigError(
            f"max_steps={arguments.max_steps} must be at least 1; -1 counts epochs in place of steps."
        )
