"""What a checkpoint says about the run that wrote it, and whether a resumed run is the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, logging

from ..._files import read_json, write_text
from ...data.identity import identity_of
from ...errors import ResumeMismatchError
from ...modeling.policy import PolicyModel
from ...processing.processor import PolicyProcessor
from ..arguments import PARTS, PolicyTrainingArguments

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"

# Arguments that decide what a step does. Others may change: how long, how often and where to.
_DECIDING = (
    *("learning_rate", "learning_rate_visual", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("seed", "data_seed", "bf16", "fp16", "train_sampling_strategy", "dataloader_drop_last", "neftune_noise_alpha"),
    *(*PARTS, "lora_rank", "lora_alpha", "lora_dropout", "use_dora"),
)
_AVERAGING = ("ema_decay", "ema_power", "ema_inv_gamma", "ema_update_after_step")
_LENGTH = ("max_steps", "num_train_epochs")
# Of a config: where and by what it was written.
_BOOKKEEPING = {"_name_or_path", "architectures", "dtype", "format_version", "peft_version", "transformers_version"}
_ABSENT = "absent"


def run_record(
    policy: PolicyModel,
    processor: PolicyProcessor,
    arguments: PolicyTrainingArguments,
    dataset: Any = None,
    augmentation: Any = None,
) -> dict[str, Any]:
    """Return what decides a run beside the policy's config and its processor, as plain values."""
    averaging = _AVERAGING if arguments.ema_decay is not None else ()
    samples = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    base = getattr(policy, "loaded_from", None)
    return {
        "arguments": {name: _plain(getattr(arguments, name)) for name in (*_DECIDING, *averaging)}
        | {"samples_per_step": samples},
        "processes": arguments.world_size,
        "length": {name: _plain(getattr(arguments, name)) for name in _LENGTH},
        "weights": sorted({str(p.dtype).removeprefix("torch.") for p in policy.parameters()}),
        "base": base.source if base is not None and not base.is_adapter else None,
        "tokenizer": _vocabulary(processor),
        "augmentation": _plain(augmentation),
        "dataset": None if dataset is None else identity_of(dataset),
    }


def save_run_record(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write run.json into a checkpoint."""
    write_text(Path(folder, RUN_FILE), json.dumps(record, indent=2) + "\n")


def require_same_run(
    folder: str | os.PathLike, policy: PolicyModel, processor: PolicyProcessor, record: Mapping[str, Any]
) -> None:
    """Check that a run that goes on from a checkpoint is the one that wrote it.

    Args:
        folder: the checkpoint.
        policy, processor: of the run that goes on.
        record: its `run_record`.

    Raises:
        ResumeMismatchError: config, processor, dataset or an argument that decides what a step does is another.
        CorruptFileError: a file of the checkpoint cannot be read.
    """
    folder = Path(folder)
    different = _differences_of_config(folder / CONFIG_NAME, policy.config)
    if (folder / PROCESSOR_NAME).is_file():
        own = json.loads(processor.to_json_string())
        saved = read_json(folder / PROCESSOR_NAME)
        common = saved.keys() & own.keys()  # a later version has more fields
        different += _differences("processor", {n: saved[n] for n in common}, {n: own[n] for n in common})
    if (folder / RUN_FILE).is_file():
        saved, own = read_json(folder / RUN_FILE), _plain(record)
        if not all(name in (side.get("arguments") or {}) for side in (saved, own) for name in _AVERAGING):
            for side in (saved, own):  # the trainer says what becomes of an average that only one of both has
                for name in _AVERAGING:
                    side.get("arguments", {}).pop(name, None)
        length, saved_length = own.pop("length"), saved.pop("length", {})
        processes = own.pop("processes")
        before = saved.pop("processes", processes)  # absent where an earlier version wrote it
        different += _differences("", saved, own)
        if not different:
            _say_length(saved_length, length)
            _say_processes(before, processes)
        elif any(name == "arguments.samples_per_step" for name, *_ in different):  # of all processes together
            different += _differences("processes", before, processes)
    else:
        logger.warning(
            f"{folder} has no {RUN_FILE}: whether it goes on with the same data and arguments is not known."
        )
    if different:
        raise ResumeMismatchError(str(folder), different)


def _differences_of_config(path: Path, config: PreTrainedConfig) -> list[tuple[str, Any, Any]]:
    if not path.is_file():  # of a model that the caller wrapped
        return []
    saved = type(config).from_dict(read_json(path)).to_dict()
    both = [{n: v for n, v in c.items() if n not in _BOOKKEEPING} for c in (saved, config.to_dict())]
    return _differences("config", *map(_plain, both))


def _differences(name: str, saved: Any, own: Any) -> list[tuple[str, Any, Any]]:
    """Return the innermost names whose values differ, with both values."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        names = dict.fromkeys((*saved, *own))
        return [
            found
            for inner in names
            for found in _differences(
                f"{name}.{inner}".lstrip("."), saved.get(inner, _ABSENT), own.get(inner, _ABSENT)
            )
        ]
    if isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        same = all(not _differences("", *pair) for pair in zip(saved, own, strict=True))
        return [] if same else [(name, saved, own)]
    if isinstance(saved, float) and isinstance(own, (int, float)) and math.isclose(saved, own, rel_tol=1e-6):
        return []  # statistics computed again
    return [] if saved == own else [(name, saved, own)]


def _say_length(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, before, after in _differences("", saved, own):
        logger.warning(
            f"{name} was {before} and is {after}: from here on the learning rate follows the schedule of that length."
        )


def _say_processes(before: int, now: int) -> None:
    if before != now:
        logger.warning(
            f"The run goes on in {now} processes, and was in {before}. Its steps hold as many samples, in the same "
            f"order up to the end of an epoch; the random draws are others."
        )


def _plain(value: Any) -> Any:
    """Return a value as JSON would give it back."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return _plain(asdict(value))
    return json.loads(json.dumps(value, default=str))


def _vocabulary(processor: PolicyProcessor) -> str | None:
    """Return a digest of the tokenizer's words."""
    if processor.instruction is None:
        return None
    words = json.dumps(sorted(processor.tokenizer.get_vocab().items())).encode()
    return hashlib.sha256(words).hexdigest()[:16]
