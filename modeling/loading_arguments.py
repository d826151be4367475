"""Arguments of loading weights: which there are, which are refused, and devices and types that exist."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint import refuse_code
from ..errors import CheckpointError, InvalidConfigError

# What `PreTrainedModel.from_pretrained` takes beside config fields; much of it stands in its body only.
LOADING_ARGUMENTS = frozenset(inspect.signature(PreTrainedModel.from_pretrained).parameters) - {"kwargs", "cls"} | {
    *("allow_partial", "attn_implementation", "device_map", "device_mesh", "distributed_config", "dtype"),
    *("experts_implementation", "low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder"),
    *("output_loading_info", "proxies", "quantization_config", "state_dict", "torch_dtype", "tp_plan", "tp_size"),
    *("tqdm_class", "trust_remote_code", "_from_auto", "_from_pipeline"),
}
# Arguments that would run downloaded code, or read weights of another kind or under other names → why not.
REFUSED_ARGUMENTS = {
    "trust_remote_code": "no code from a repository is ever run",
    "use_kernels": "no code from a repository is ever run",
    "kernel_config": "no code from a repository is ever run",
    "allow_all_kernels": "no code from a repository is ever run",
    "gguf_file": "weights are read from safetensors only",
    "from_tf": "weights are read from safetensors only",
    "from_flax": "weights are read from safetensors only",
    "key_mapping": "weights are loaded under the policy's own names",
}

# Values of `device_map` that are no device.
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")


def allowed_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of loading without those that say what is so anyway.

    Raises:
        CheckpointError: one asks for what is never done.
    """
    for name, reason in REFUSED_ARGUMENTS.items():
        if kwargs.get(name):
            raise CheckpointError(f"{name}={kwargs[name]!r} is refused: {reason}. Leave it out.")
    if kwargs.get("use_safetensors", True) is False:
        raise CheckpointError("Weights are read from safetensors only: other formats can run code.")
    refuse_code({"attn_implementation": kwargs.get("attn_implementation")}, "The argument")
    for name in ("dtype", "torch_dtype"):
        _check_dtype(name, kwargs.get(name))
    if isinstance(place := kwargs.get("device_map"), (str, int, torch.device)) and place not in _PLACEMENTS:
        require_device(place)
    dropped = {*REFUSED_ARGUMENTS, "use_safetensors", "ignore_mismatched_sizes", "low_cpu_mem_usage"}
    return {name: value for name, value in kwargs.items() if name not in dropped}


def _check_dtype(name: str, value: Any) -> None:
    """Check that a dtype is one of torch's floating-point types, or its name."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if value not in (None, "auto") and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InvalidConfigError(
            f"{name}={value!r} is not a type of weights. Choose 'float32', 'bfloat16' or 'float16', or 'auto'."
        )


def require_device(device: str | int | torch.device) -> torch.device:
    """Return a device that this machine has.

    Raises:
        InvalidConfigError: it has no such device.
    """
    try:
        found = torch.device(device)
        if found.type != "meta":
            torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise InvalidConfigError(f"There is no device {device!r} here; there is {here}. ({reason})") from error
    return found
