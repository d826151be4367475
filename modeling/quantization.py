"""Quantization: which layers of a policy may be stored in fewer bits, and the way back to numbers with fractions.

The arithmetic and the layers are those of bitsandbytes, torchao and the like, through transformers. What is added
here: the components of a policy declare by `quantizable` which of their modules may be quantised, and all others are
left alone. An action head stays as it was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from ..errors import CheckpointError, InvalidConfigError
from .fingerprint import remember_values
from .precision import COMPUTE_TYPES

# What the libraries' configs call the list of modules that are left as they are.
_LEFT_ALONE = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def limited_to_declared(given: Any, policy_class: type[PreTrainedModel], config: PreTrainedConfig, *args: Any) -> Any:
    """Return a quantization config that leaves alone what a policy's components do not declare as `quantizable`.

    Args:
        given: `BitsAndBytesConfig`, `TorchAoConfig`, …, or one as a dictionary; it is not changed.
        policy_class, config, args: what the policy is built from.

    Raises:
        InvalidConfigError: nothing of the policy may be quantised, or the method quantises everything.
    """
    try:
        chosen = AutoQuantizationConfig.from_dict(dict(given)) if isinstance(given, Mapping) else copy.deepcopy(given)
    except ImportError as error:
        raise missing_library(dict(given).get("quant_method"), error) from error
    field = next((name for name in _LEFT_ALONE if hasattr(chosen, name)), None)
    if field is None:
        raise InvalidConfigError(
            f"{type(chosen).__name__} cannot leave modules out, and would quantise the action head. "
            f"Use BitsAndBytesConfig or TorchAoConfig."
        )
    with torch.device("meta"), no_init_weights():
        policy = policy_class(copy.deepcopy(config), *args)
    quantizable = policy.quantizable
    if not quantizable:
        raise InvalidConfigError(
            f"quantization_config={type(chosen).__name__}: {policy_class.__name__} has no layers here that may be "
            f"quantised; only those of language models and encoders are, which its components declare as "
            f"`quantizable`. Leave quantization_config out; dtype='bfloat16' halves the memory."
        )
    # Variants of linear layers, such as attention's, whose weight is read without calling them.
    read = [
        f"{name}.{inner}"
        for name, module in quantizable.items()
        for inner, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear
    ]
    setattr(chosen, field, sorted({*(getattr(chosen, field) or ()), *_outside(policy, quantizable), *read}))
    return chosen


def missing_library(method: object, reason: ImportError) -> InvalidConfigError:
    """Return the error for a library that is to quantise, or has quantised, and is not installed."""
    return InvalidConfigError(
        f"Weights quantised by {getattr(method, 'value', method)} need its library: {reason}. Install it, or choose "
        f"BitsAndBytesConfig, which pip install 'manipulators[quantization]' brings."
    )


def _outside(module: nn.Module, names: Mapping[str, nn.Module], prefix: str = "") -> Iterator[str]:
    """Yield the outermost modules that hold none of the named ones, by name."""
    for name, child in module.named_children():
        path = prefix + name
        if path in names:
            continue
        if any(other.startswith(path + ".") for other in names):
            yield from _outside(child, names, path + ".")
        elif any(True for _ in child.parameters()):
            yield path


def quantized_names(policy: PreTrainedModel) -> list[str]:
    """Return the names of the parameters of a loaded policy that are quantised."""
    if not getattr(policy, "is_quantized", False):
        return []
    return [
        name
        for name, parameter in policy.named_parameters()
        if parameter.dtype not in COMPUTE_TYPES or type(parameter.data) is not torch.Tensor
    ]


def settle(policy: PreTrainedModel, before: Mapping[str, torch.Tensor]) -> None:
    """Finish the loading of a quantised policy: memory of its own, one way to compute, what it was before.

    On a CPU with bfloat16 instructions bitsandbytes would repack 4-bit weights at the first pass, which rounds their
    scales, so that what is saved afterwards acts differently. It also fails for widths that are no multiples of 32,
    such as those of the feed-forward in π0's vision tower.

    Args:
        policy: as transformers has loaded it.
        before: the quantised weights as their checkpoint holds them, for the fingerprint of an adapter's base.
    """
    remember_values(policy, ((name, value.to(plain_dtype(policy, name))) for name, value in before.items()))
    for module in policy.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            weight.quant_state = module.quant_state = copy.deepcopy(state)
            module.support_avx512bf16_for_cpu = False
        for name in ("CB", "SCB"):
            if isinstance(held := getattr(weight, name, None), torch.Tensor):
                setattr(weight, name, weight.data if name == "CB" else held.clone())


def require_saveable(policy: PreTrainedModel) -> None:
    """Check that the weights of a policy can be saved, before anything of a folder is changed.

    Raises:
        CheckpointError: the library that quantised them has no format of files.
    """
    quantizer = getattr(policy, "hf_quantizer", None)
    if quantizer is None or getattr(policy, "_hf_peft_config_loaded", False) or quantizer.is_serializable():
        return
    raise CheckpointError(
        f"Weights quantised by {getattr(policy.quantization_method, 'value', policy.quantization_method)} cannot be "
        f"saved. Load the policy quantised by BitsAndBytesConfig or TorchAoConfig, or save it as it was before."
    )


def plain_dtype(policy: PreTrainedModel, name: str) -> torch.dtype:
    """Return the type of a quantised parameter when it is not: the policy's, unless its part stays in float32."""
    dtype = policy.config.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    stays = not set(policy._keep_in_fp32_modules_strict or ()).isdisjoint(name.split("."))
    return torch.float32 if stays and dtype.itemsize < 4 else dtype


def require_way_back(policy: PreTrainedModel) -> None:
    """Check that quantised weights of a policy can become numbers with fractions again.

    Raises:
        InvalidConfigError: the library that quantised them knows no way back.
    """
    quantizer = getattr(policy, "hf_quantizer", None)
    if quantizer is not None and type(quantizer)._dequantize is HfQuantizer._dequantize:
        raise _no_way_back(policy)


def _no_way_back(policy: PreTrainedModel) -> InvalidConfigError:
    method = policy.config.quantization_config.quant_method
    return InvalidConfigError(
        f"Weights quantised by {getattr(method, 'value', method)} cannot be turned into floating-point numbers again. "
        f"Load the adapter onto a base that is not quantised: quantization_config=None."
    )


def dequantize(policy: PreTrainedModel) -> None:
    """Replace quantised layers of a policy by plain ones.

    Raises:
        InvalidConfigError: the library that quantised it knows no way back.
    """
    owners = [name.rpartition(".")[0] for name in quantized_names(policy)]
    try:
        policy.dequantize(dtype=torch.float32)
    except NotImplementedError as error:
        raise _no_way_back(policy) from error
    for owner in owners:  # with their biases, which bitsandbytes casts to the type that it computes in
        for name, parameter in policy.get_submodule(owner).named_parameters(prefix=owner):
            parameter.data = parameter.data.to(plain_dtype(policy, name))
    for leftover in ("values_before_quantization", "shapes_before_quantization"):
        vars(policy).pop(leftover, None)
