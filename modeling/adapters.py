"""Adapters: layers of peft inside a policy, the folder that holds them alone, and the base they belong to.

The layers and their files are peft's: LoRA, and every other method that puts layers into a model. What is added here:
the folder also holds the policy's config and says which base it was trained on, and loading is as strict as
everywhere. peft is imported where there is an adapter, and not for every policy.
"""

from __future__ import annotations

import copy
import functools
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
from .quantization import dequantize, quantized_names, require_way_back
from .sharding import is_split, split_like

logger = logging.get_logger(__name__)

_PREFIX = "base_model.model."  # peft's, in front of every name in an adapter's file
_NAME = "default"  # peft's, of an adapter that was given none


def has_adapter(policy: torch.nn.Module) -> bool:
    """Return whether adapter layers stand in a policy."""
    return bool(getattr(policy, "_hf_peft_config_loaded", False))


def is_adapter_parameter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter: a matrix of its own, or the copy of a module saved whole."""
    return ".modules_to_save." in name or any(part.startswith(_adapter_prefixes()) for part in name.split("."))


@functools.cache
def _adapter_prefixes() -> tuple[str, ...]:
    """Return what the parameters of peft's methods begin with, such as `lora_`."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return tuple(sorted(set(PEFT_TYPE_TO_PREFIX_MAPPING.values())))


def adapter_name(policy: PreTrainedModel) -> str:
    """Return the name of the policy's adapter.

    Raises:
        InvalidConfigError: it has several, of which a folder holds one.
    """
    names = list(policy.peft_config)
    if len(names) > 1:
        raise InvalidConfigError(
            f"The policy has {len(names)} adapters ({', '.join(names)}), and a checkpoint holds one. Remove the "
            f"others: policy.delete_adapter(name), or wrapped.delete_adapter(name) of a peft model."
        )
    return names[0]


def add_adapter(policy: PreTrainedModel, config: Any) -> None:
    """Put adapter layers into a policy; they alone are trained from then on, in float32.

    Raises:
        InvalidConfigError: the policy comes from no checkpoint that could be named, or peft's method puts no layers
            into a model.
    """
    _require_base(policy)
    try:
        policy.add_adapter(config, _NAME)
    except ValueError as error:
        raise InvalidConfigError(f"The adapter does not fit {type(policy).__name__}: {error}") from error
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(is_adapter_parameter(name))
        own = parameter.requires_grad and ".modules_to_save." not in name
        if own and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # small updates vanish in half precision


def record_base(policy: PreTrainedModel) -> None:
    """Remember which base a policy's new adapter stands in; nothing where the base is no checkpoint."""
    base = _base_name(policy)
    if not base:
        return
    loaded, revision = policy.loaded_from, getattr(policy.config, "_commit_hash", None)
    place = {"base": base, "revision": revision}
    if revision and loaded is not None and loaded.subfolder:
        place["subfolder"] = loaded.subfolder
    policy._adapter_base = place | {"fingerprint": fingerprint(policy, _base_parameters(policy))}
    for config in policy.peft_config.values():
        config.base_model_name_or_path, config.revision = base, revision


def unwrapped(model: Any) -> Any:
    """Return the policy that peft has wrapped, with the wrapper's adapter as its own; any other model as it is.

    The wrapper goes on to work: it shares its layers with the policy.

    Raises:
        InvalidConfigError: peft's method puts no layers into the policy, the adapter was loaded for inference, or the
            policy comes from no checkpoint that could be named.
    """
    from peft import AdaLoraModel, PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model, (PeftModel, PeftMixedModel)):
        return model
    tuner, kinds = model.base_model, sorted(str(c.peft_type.value) for c in model.peft_config.values())
    # A method with a forward pass of its own does more than its layers; AdaLoRA's is not run on a policy.
    plain = isinstance(tuner, BaseTuner) and type(tuner).forward in (BaseTuner.forward, AdaLoraModel.forward)
    # Some methods keep what their layers share outside of them; peft before 0.21 does not say which.
    if isinstance(model, PeftMixedModel) or not plain or getattr(tuner, "uses_shared_state", False):
        raise InvalidConfigError(
            f"peft's {', '.join(kinds)} is not a set of layers inside the policy, so a checkpoint of a policy cannot "
            f"hold it. Use a method that is, such as LoRA: get_peft_model(policy, LoraConfig(…))."
        )
    policy = tuner.model
    if not isinstance(policy, PreTrainedModel):
        return policy
    if any(config.inference_mode for config in model.peft_config.values()):
        raise InvalidConfigError(
            "The adapter was loaded for inference, so nothing would be trained: "
            "PeftModel.from_pretrained(policy, folder, is_trainable=True)."
        )
    _require_base(policy)
    if not has_adapter(policy):
        policy._hf_peft_config_loaded, policy.peft_config = True, model.peft_config
        record_base(policy)
    return policy


def require_saved(policy: PreTrainedModel) -> None:
    """Check that a policy's adapter can be saved, and with it everything that is trained: nothing else is saved.

    Raises:
        InvalidConfigError: other parameters are trained too, or layers of peft's method share what is saved.
    """
    name = adapter_name(policy)
    kind = policy.peft_config[name].peft_type.value
    shared = (
        f"Layers of peft's {kind} share matrices, which a checkpoint of a policy cannot hold. Where its config has "
        f"save_projection, set it to False; else use a method without such matrices, such as LoRA."
    )
    try:
        tensors = list(policy.get_adapter_state_dict(name).values())
    except (ValueError, KeyError) as error:  # peft looks for them outside the policy
        raise InvalidConfigError(f"{shared} ({error})") from error
    held = {tensor.data_ptr() for tensor in tensors if tensor.numel()}
    if len(held) < sum(tensor.numel() > 0 for tensor in tensors):
        raise InvalidConfigError(shared)
    lost = [n for n, p in policy.named_parameters() if p.requires_grad and p.numel() and p.data_ptr() not in held]
    if lost:
        raise InvalidConfigError(
            f"{len(lost)} parameters are trained beside the adapter, which alone is saved: {', '.join(lost[:4])}"
            f"{', …' if len(lost) > 4 else ''}. Name their modules in modules_to_save= of the adapter's config, or "
            f"freeze them: parameter.requires_grad_(False)."
        )


def _base_name(policy: PreTrainedModel) -> str:
    return str(getattr(policy.config, "_name_or_path", "") or "")


def _require_base(policy: PreTrainedModel) -> None:
    if not _base_name(policy):
        raise InvalidConfigError(
            "An adapter is saved without its base, so the base must be a checkpoint: save the policy, and load it "
            "with AutoPolicy.from_pretrained(folder). Checkpoints of other projects: manipulators convert SRC DST."
        )


def base_of_adapter(policy: PreTrainedModel) -> str | None:
    """Return the folder or Hub id of what the policy's adapter is trained on; None where that is not recorded."""
    return getattr(policy, "_adapter_base", {}).get("base")


def _base_parameters(policy: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that a policy has without its adapter, under the names that they have without it."""
    if not has_adapter(policy):
        return dict(policy.named_parameters())
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    own: set[int] = set()
    for module in policy.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inner = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
            own |= {id(parameter) for parameter in module.parameters()} - {id(p) for p in inner.parameters()}
    held = {name: parameter for name, parameter in policy.named_parameters() if id(parameter) not in own}
    return {name.replace(".base_layer.", ".").replace(".original_module.", "."): p for name, p in held.items()}


def adapter_tensors(policy: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the names that its file has."""
    return {_PREFIX + name: value for name, value in policy.get_adapter_state_dict(adapter_name(policy)).items()}


def save_base_record(policy: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Write what an adapter's folder needs beside peft's files: the policy's config, and what its base was."""
    policy.config.save_pretrained(folder)
    path = Path(folder, ADAPTER_CONFIG)
    values = read_json(path)
    for name in ("target_modules", "exclude_modules"):  # sets, which peft writes in any order
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    write_text(path, json.dumps(values, indent=2, sort_keys=True))
    record = getattr(policy, "_adapter_base", None)  # none when the base was no checkpoint
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
    if is_split(own):
        tensors = {name: split_like(value, own[name]) for name, value in tensors.items()}
    named = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    set_peft_model_state_dict(policy, named, adapter_name=adapter_name(policy))


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

    adapter = adapter_name(policy)
    config, tensors = policy.peft_config[adapter], policy.get_adapter_state_dict(adapter)
    for name, module in list(policy.named_modules()):
        if isinstance(module, BaseTunerLayer):
            policy.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            policy.set_submodule(name, module.original_module)
    _forget_adapter(policy)
    dequantize(policy)
    policy.add_adapter(config, adapter)
    set_peft_model_state_dict(policy, tensors, adapter_name=adapter)


def _forget_adapter(policy: PreTrainedModel) -> None:
    policy._hf_peft_config_loaded = False
    for leftover in ("peft_config", "_adapter_base"):
        vars(policy).pop(leftover, None)


def merged(policy: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a policy in which the adapter has become part of the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if quantized_names(policy):
        require_way_back(policy)
    copied = copy.deepcopy(policy)
    if quantized_names(policy):
        _onto_plain_weights(copied)
    for name, module in list(copied.named_modules()):
        if hasattr(module, "unload_and_optionally_merge_module"):  # layers that are wrapped in another way
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        elif isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save[adapter_name(policy)]
        else:
            continue
        copied.set_submodule(name, plain)
    _forget_adapter(copied)
    copied.requires_grad_(True)
    copied.freeze_parts()
    return copied
