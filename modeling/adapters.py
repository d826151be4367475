"""Adapters: LoRA layers inside a policy, the folder that holds them alone, and the base they belong to.

The layers and their files are peft's. What is added here: the folder also holds the policy's config and says which
base it was trained on, and loading is as strict as everywhere. peft is imported where there is an adapter, and not for
every policy.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging
from transformers.utils.hub import extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from .._files import read_json, write_text
from ..errors import BaseMismatchError, CheckpointError, CorruptFileError, InvalidConfigError, MissingFileError
from .tensors import read_shapes, require_same_tensors

if TYPE_CHECKING:
    from peft import PeftConfig

    from .policy import PolicyModel

logger = logging.get_logger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
_PREFIX = "base_model.model."  # peft's, in front of every name in an adapter's file
_NAME = "default"
_SAMPLES = 4096  # of each tensor, for the fingerprint
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


def has_adapter(policy: torch.nn.Module) -> bool:
    """Return whether adapter layers stand in a policy."""
    return bool(getattr(policy, "_hf_peft_config_loaded", False))


def is_adapter_parameter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter: a LoRA matrix, or the copy of a module that is saved whole."""
    return "lora_" in name or ".modules_to_save." in name


def add_adapter(policy: PolicyModel, config: PeftConfig) -> None:
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
    revision = getattr(policy.config, "_commit_hash", None)
    policy._adapter_base = {"base": base, "revision": revision, "fingerprint": fingerprint(policy)}
    policy.add_adapter(config, _NAME)
    config.base_model_name_or_path, config.revision = base, revision
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(is_adapter_parameter(name))
        if "lora_" in name and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # small updates vanish in half precision


def fingerprint(policy: torch.nn.Module) -> dict[str, str]:
    """Return digests of up to 4096 values of every parameter, as they are and rounded to bfloat16.

    The rounded ones agree between a base and the same base loaded in bfloat16.
    """
    digests = {"float32": hashlib.sha256(), "bfloat16": hashlib.sha256()}
    for name, parameter in sorted(policy.named_parameters()):
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLES)].float().cpu()
        for dtype, digest in digests.items():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(values.to(getattr(torch, dtype)).float().numpy().tobytes())
    dtypes = sorted({str(parameter.dtype) for parameter in policy.parameters()})  # some parts stay in float32
    return {"dtype": " ".join(dtypes)} | {dtype: digest.hexdigest() for dtype, digest in digests.items()}


def adapter_tensors(policy: PolicyModel) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the names that its file has."""
    return {_PREFIX + name: value for name, value in policy.get_adapter_state_dict(_NAME).items()}


def save_base_record(policy: PolicyModel, folder: str | os.PathLike) -> None:
    """Write what an adapter's folder needs beside peft's files: the policy's config, and what its base was."""
    policy.config.save_pretrained(folder)
    record = getattr(policy, "_adapter_base", None)  # none when transformers' own method put the adapter in
    if record is not None:
        write_text(Path(folder, BASE_FILE), json.dumps(record, indent=2) + "\n")


def load_adapter_tensors(policy: PolicyModel, folder: str | os.PathLike) -> None:
    """Fill the adapter in a policy from a folder.

    Raises:
        BaseMismatchError: it was trained on another base.
        MissingFileError, CorruptFileError, WeightsMismatchError: its tensors are absent, or others.
    """
    from peft import set_peft_model_state_dict

    path = Path(folder, ADAPTER_WEIGHTS)
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in Path(folder).glob("*"))) or "nothing"
        raise MissingFileError(
            f"{folder} holds no {ADAPTER_WEIGHTS}; it holds {held}. Pickled weights are never read."
        )
    record, own = Path(folder, BASE_FILE), getattr(policy, "_adapter_base", None)
    if own is None or not record.is_file():
        logger.warning(f"{folder} has no {BASE_FILE}: whether this is the base it was trained on is not known.")
    elif not _is_same(read_json(record), own["fingerprint"], record):
        raise BaseMismatchError(str(folder), own["base"], read_json(record)["base"])
    require_same_tensors(path, read_shapes([path]), adapter_tensors(policy))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(path, "safetensors file", error) from error
    set_peft_model_state_dict(
        policy, {name.removeprefix(_PREFIX): value for name, value in tensors.items()}, adapter_name=_NAME
    )


def find_adapter(source: str | os.PathLike | None, kwargs: Mapping[str, Any]) -> Path | None:
    """Return the folder of an adapter, downloaded where `source` is a Hub id; None when `source` is no adapter."""
    if source is None:
        return None
    folder = Path(source, kwargs.get("subfolder", ""))
    if os.path.isdir(source):
        return folder if (folder / ADAPTER_CONFIG).is_file() else None
    hub = {name: kwargs[name] for name in (*_HUB_ARGUMENTS, "revision") if name in kwargs}
    try:
        if find_adapter_config_file(str(source), **hub) is None:
            return None
    except OSError:  # neither folder nor repository: whoever loads the weights says it better
        return None
    return Path(snapshot_download(str(source), allow_patterns=["*.json", ADAPTER_WEIGHTS], **hub))


def commit_of(
    source: str | os.PathLike | None, cache_dir: str | None = None, revision: str | None = None, **_: Any
) -> str | None:
    """Return the commit of the Hub repository that a policy has just been loaded from; None of a folder."""
    if source is None or os.path.isdir(source):
        return None
    path = try_to_load_from_cache(str(source), "config.json", cache_dir=cache_dir, revision=revision)
    return extract_commit_hash(path, None) if isinstance(path, str) else None


def base_of(folder: str | os.PathLike) -> tuple[str, str | None]:
    """Return where the base of an adapter was when the adapter was trained, and at which commit.

    Raises:
        CheckpointError: its folder does not say.
    """
    record = read_json(Path(folder, BASE_FILE)) if Path(folder, BASE_FILE).is_file() else {}
    config = read_json(Path(folder, ADAPTER_CONFIG))
    base = record.get("base") or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder} does not say which base its adapter belongs to. Pass base=folder_or_id.")
    return str(base), record.get("revision") or config.get("revision")


def load_adapted(
    policy_class: type[PolicyModel], folder: Path, base: str | PolicyModel | None, **kwargs: Any
) -> PolicyModel:
    """Load the base that an adapter was trained on, and the adapter into it.

    Args:
        policy_class: of the base.
        folder: of the adapter.
        base: where the base is now, or the base itself; by default where it was.
        kwargs: as in `PolicyModel.from_pretrained`.

    Raises:
        BaseMismatchError: the base is another one.
        CheckpointError and its subclasses: base or adapter cannot be loaded whole.
    """
    from peft import PeftConfig

    try:
        adapter_config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptFileError(folder / ADAPTER_CONFIG, "adapter configuration", error) from error
    if isinstance(base, torch.nn.Module):
        return _attach(base, adapter_config, folder)
    source, revision = (base, None) if base else base_of(folder)
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    kwargs.pop("revision", None)  # the adapter's
    if (folder / "config.json").is_file():
        kwargs.pop("config", None)  # AutoModel's, of the base
        config, kwargs = policy_class.config_class.from_pretrained(str(folder), return_unused_kwargs=True, **kwargs)
        kwargs["config"] = config
    try:
        policy = policy_class.from_pretrained(source, **kwargs | hub | ({"revision": revision} if revision else {}))
    except MissingFileError as error:
        raise MissingFileError(
            f"The adapter in {folder} needs its base {str(source)!r}: {error} If it is elsewhere: base=folder_or_id."
        ) from error
    policy.config._name_or_path = str(source)
    return _attach(policy, adapter_config, folder)


def _attach(policy: PolicyModel, adapter_config: PeftConfig, folder: Path) -> PolicyModel:
    """Put an adapter into its base; whether it is that, its record says."""
    adapter_config.inference_mode = False
    add_adapter(policy, adapter_config)
    load_adapter_tensors(policy, folder)
    return policy.eval()


def _is_same(record: Mapping[str, Any], found: Mapping[str, str], path: Path) -> bool:
    try:
        kind = "float32" if record["fingerprint"]["dtype"] == found["dtype"] else "bfloat16"
        return record["fingerprint"][kind] == found[kind]
    except (KeyError, TypeError) as error:
        raise CorruptFileError(path, "record of a base", f"it lacks {error}") from error


def merged(policy: PolicyModel) -> PolicyModel:
    """Return a copy of a policy in which the adapter has become part of the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    copied = copy.deepcopy(policy)
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save[_NAME]
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, plain)
    copied._hf_peft_config_loaded = False
    for leftover in ("peft_config", "_adapter_base"):
        vars(copied).pop(leftover, None)
    copied.requires_grad_(True)
    copied.freeze_parts()
    return copied
