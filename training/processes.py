"""What several processes need of a training: a strategy that is honoured, and random draws of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from .._processes import launched
from ..errors import InvalidConfigError

logger = logging.get_logger(__name__)

_SHIPPED = "accelerate launch --config_file recipes/accelerate/ddp.yaml"


def requested_strategy(values: dict[str, Any]) -> str | None:
    """Return what is to split the weights among processes, by training arguments or a launcher: FSDP, DeepSpeed."""
    for name, label in (("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")):
        if values.get(name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("true", "1"):
            return label
    return None


def require_possible_strategy(strategy: str | None, use_cpu: bool) -> None:
    """Check that weights can be split as it is asked for, before any process group is made.

    Raises:
        InvalidConfigError: they cannot.
    """
    if strategy == "DeepSpeed":
        from accelerate.utils import is_deepspeed_available

        if not is_deepspeed_available():
            raise InvalidConfigError(
                "A DeepSpeed configuration is given, but DeepSpeed is not installed: pip install deepspeed"
            )
    if strategy is not None and use_cpu:
        raise InvalidConfigError(
            f"{strategy} needs GPUs. This training runs on the CPU, where accelerate would train with DDP instead and "
            f"not say so. Leave {strategy} out, such as by {_SHIPPED}; where there are GPUs, leave out use_cpu."
        )
    if strategy == "FSDP" and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("true", "1"):
        raise InvalidConfigError(
            "fsdp_cpu_ram_efficient_loading leaves the weights of all processes but the first empty when a checkpoint "
            "is loaded, and loading here is strict in each of them. Set it to false in the file of accelerate, or "
            "pass --fsdp_cpu_ram_efficient_loading false."
        )


def require_honoured(accelerator: Accelerator, is_fsdp_enabled: bool) -> None:
    """Check that accelerate does what it was configured for.

    Raises:
        InvalidConfigError: FSDP is configured and not used, or it is its first version.
    """
    if requested_strategy({}) == "FSDP" and not is_fsdp_enabled:
        raise InvalidConfigError(
            f"FSDP is configured, and accelerate does not use it for {accelerator.distributed_type.value}. Leave it "
            f"out, such as by {_SHIPPED}."
        )
    if is_fsdp_enabled and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise InvalidConfigError(
            "FSDP 1 is configured, whose flat parameters no checkpoint here holds. Use FSDP2: fsdp_version: 2 in the "
            "file of accelerate, as in recipes/accelerate/fsdp2.yaml."
        )


def require_company(arguments: TrainingArguments) -> None:
    """Check that processes that were launched together train together.

    Raises:
        InvalidConfigError: each of them would train by itself.
    """
    count = launched().count
    if count != arguments.world_size:
        raise InvalidConfigError(
            f"{count} processes were launched, and accelerate sees {arguments.world_size}: each would train by "
            f"itself. Launch with torchrun or accelerate launch, which set LOCAL_RANK."
        )


def seed_process(arguments: TrainingArguments, checkpoint: str | None, step: int) -> None:
    """Give each process noise, times and augmentations of its own, where no checkpoint holds its random state."""
    name = f"rng_state_{arguments.process_index}.pth" if arguments.world_size > 1 else "rng_state.pth"
    if checkpoint is None or not Path(checkpoint, name).is_file():
        set_seed((arguments.seed + 1_000_003 * step + arguments.process_index) % 2**32)


def runs_on_cpu(use_cpu: bool) -> bool:
    """Return whether a training runs on the CPU: as asked for, or in several processes that have nothing else."""
    return use_cpu or (launched().count > 1 and not torch.accelerator.is_available())
