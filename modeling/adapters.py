"""Adapters: LoRA layers inside a policy, the folder that holds them alone, and the base they belong to.

The layers and their files are peft's. What is added here: the folder also holds the policy's config and says which
base it was trained on, and loading is as strict as everywhere. peft is imported where there is an adapter, and not for
every policy.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .._files import read_json, write_text
from ..checkpoint import ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..errors import BaseMismatchError, CorruptFileError, InvalidConfigError
from .fingerprint import fingerprint
from .loading import (
    read_shapes,
    read_tensors,
    require_finite,
    require_same_tensors,
    require_weight_types,
    weight_files,
)
from .quantization import dequantize, quantized_names

logger = logging.get_logger(__name__)

_PREFIX = "base_model.model."  # peft's, in front of every name in an adapter's file
_NAME = "default"


def has_adapter(policy: torch.nn.Module) -> bool:
    """Return whether adapter layers stand in a policy."""
    return bool(getattr(policy, "_hf_peft_config_loaded", False))


def is_adapter_parameter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter: a LoRA matrix, or the copy of a module that is saved whole."""
    return "lora_" in name or ".modules_to_save." in name


def add_adapter(policy: PreTrainedModel, config: Any) -> None:
    """Put adapter layers into a policy; they alone are trained from then on, in float32.

    Raises:
        InvalidConfigError: the policy comes from no checkpoint that could be named.
    """
    base = str(getattr(policy.config, "_name_or_path", "") or "")
    if not base:
        raise InvalidConfigError(
            "An adapter is saved without its base, so the base must be a checkpoint: save the policy, and load it "
            "with AutoPolicy.from_pretrained(folder). Checkpoints of other projects: manipulators convert SRC DST."
        )
    loaded = policy.loaded_from
    revision = getattr(policy.config, "_commit_hash", None)
    place = {"base": base, "revision": revision}
    if revision and loaded is not None and loaded.subfolder:
        place["subfolder"] = loaded.subfolder
    policy._adapter_base = place | {"fingerprint": fingerprint(policy)}
    policy.add_adapter(config, _NAME)
    config.base_model_name_or_path, config.revision = base, revision
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(is_adapter_parameter(name))
        if "lora_" in name and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # small updates vanish in half precision


def base_of_adapter(policy: PreTrainedModel) -> str | None:
    """Return the folder or Hub id of what the policy's adapter is trained on; None where that is not recorded."""
    return getattr(policy, "_adapter_base", {}).get("base")


def adapter_tensors(policy: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the names that its file has."""
    return {_PREFIX + name: value for name, value in policy.get_adapter_state_dict(_NAME).items()}


def save_base_record(policy: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Write what an adapter's folder needs beside peft's files: the policy's config, and what its base was."""
    policy.config.save_pretrained(folder)
    path = Path(folder, ADAPTER_CONFIG)
    values = read_json(path)
    for name in ("target_modules", "exclude_modules"):  # sets, which peft writes in any order
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    write_text(path, json.dumps(values, indent=2, sort_keys=True))
    record = getattr(policy, "_adapter_base", None)  # none when transformers' own method put the adapter in
    if record is not None:
        write_text(Path(folder, ADAPTER_BASE), json.dumps(record, indent=2) + "\n")


def load_adapter_tensors(policy: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Fill the adapter in a policy from a folder.

    Raises:
        BaseMismatchError: it was trained on another base.
        MissingFileError, CorruptFileError, WeightsMismatchError, WeightsValueError: its tensors are absent, others, or
            no finite numbers.
    """
    from peft import set_peft_model_state_dict

    path = Path(folder, ADAPTER_WEIGHTS)
    tensors = read_tensors(path)
    record, base = Path(folder, ADAPTER_BASE), getattr(policy, "_adapter_base", None)
    if base is None or not record.is_file():
        logger.warning(f"{folder} has no {ADAPTER_BASE}: whether this is the base it was trained on is not known.")
    elif not _is_same(read_json(record), base["fingerprint"], record):
        raise BaseMismatchError(str(folder), base["base"], read_json(record)["base"])
    own = adapter_tensors(policy)
    require_same_tensors(path, read_shapes([path]), own)
    require_weight_types(path, {name: value.dtype for name, value in tensors.items()}, own)
    require_finite(path, tensors)
    set_peft_model_state_dict(
        policy, {name.removeprefix(_PREFIX): value for name, value in tensors.items()}, adapter_name=_NAME
    )


def attach_saved(policy: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put the adapter that a folder holds into its base, and return the base.

    Raises:
        BaseMismatchError: it was trained on another base.
        CorruptFileError, MissingFileError, WeightsMismatchError, ConflictingWeightsError: it cannot be loaded whole.
    """
    from peft import PeftConfig

    weight_files(folder)
    try:
        adapter_config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptFileError(folder / ADAPTER_CONFIG, "adapter configuration", error) from error
    adapter_config.inference_mode = False
    add_adapter(policy, adapter_config)
    load_adapter_tensors(policy, folder)
    return policy.eval()


def _is_same(record: Mapping[str, Any], found: Mapping[str, str], path: Path) -> bool:
    """Compare a recorded fingerprint with a base's, in the coarsest of the precisions that the two were read in."""
    try:
        recorded = record["fingerprint"]
        kind = "float32" if recorded["dtype"] == found["dtype"] else "bfloat16"
        if kind == "bfloat16" and "torch.float16" in found["dtype"].split():
            kind = "float16"
            if kind not in recorded:  # written before float16 was recorded
                logger.warning(f"{path} cannot tell a base in float16: whether it is the right one is not known.")
                return True
        return recorded[kind] == found[kind]
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(path, "record of a base", f"it lacks {error}") from error


def _onto_plain_weights(policy: PreTrainedModel) -> None:
    """Put the adapter of a quantised policy onto its weights with fractions, into which it can be merged exactly."""
    from peft import set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    config, tensors = policy.peft_config[_NAME], policy.get_adapter_state_dict(_NAME)
    for name, module in list(policy.named_modules()):
        if isinstance(module, BaseTunerLayer):
            policy.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            policy.set_submodule(name, module.original_module)
    _forget_adapter(policy)
    dequantize(policy)
    policy.add_adapter(config, _NAME)
    set_peft_model_state_dict(policy, tensors, adapter_name=_NAME)


def _forget_adapter(policy: PreTrainedModel) -> None:
    policy._hf_peft_config_loaded = False
    for leftover in ("peft_config", "_adapter_base"):
        vars(policy).pop(leftover, None)


def merged(policy: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a policy in which the adapter has become part of the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    copied = copy.deepcopy(policy)
    if quantized_names(policy):
        _onto_plain_weights(copied)
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save[_NAME]
        else:
            continue
        copied.set_submodule(name, plain)
    _forget_adapter(copied)
    copied.requires_grad_(True)
    copied.freeze_parts()
    return copied
