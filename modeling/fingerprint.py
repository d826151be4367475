"""Fingerprint: what tells one base of adapters from another, whatever type its weights are loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

_SAMPLES = 4096  # of each tensor


def fingerprint(policy: nn.Module, parameters: Mapping[str, nn.Parameter] | None = None) -> dict[str, str]:
    """Return digests of up to 4096 values of every parameter, as they are and rounded to half precision.

    The rounded ones agree between a base and the same base loaded in float16 or bfloat16. Of quantised weights those
    values count that they had before.

    Args:
        policy: whose weights they are.
        parameters: by name; all of the policy's by default, those of an adapter too.
    """
    known: Mapping[str, torch.Tensor] = getattr(policy, "values_before_quantization", {})
    shapes: Mapping[str, tuple[int, ...]] = getattr(policy, "shapes_before_quantization", {})
    parameters = dict(policy.named_parameters()) if parameters is None else parameters
    digests = {dtype: hashlib.sha256() for dtype in ("float32", "bfloat16", "float16")}
    dtypes = set()
    for name, parameter in sorted(parameters.items()):
        values = known[name] if name in known else sampled(parameter)
        dtypes.add(str(values.dtype))
        for dtype, digest in digests.items():
            digest.update(f"{name}{shapes.get(name, tuple(parameter.shape))}".encode())
            digest.update(values.float().to(getattr(torch, dtype)).float().numpy().tobytes())
    kinds = " ".join(sorted(dtypes))  # some parts stay in float32
    return {"dtype": kinds} | {dtype: digest.hexdigest() for dtype, digest in digests.items()}


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """Return up to 4096 values of a tensor, evenly spaced, on the CPU."""
    if type(tensor.data) is not torch.Tensor:
        tensor = tensor.dequantize()  # one of torchao's
    return tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLES)].cpu()


def remember_values(policy: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Record on a policy the values that quantised weights had before, as far as `fingerprint` reads them."""
    tensors = dict(tensors)
    policy.values_before_quantization = {name: sampled(value) for name, value in tensors.items()}
    policy.shapes_before_quantization = {name: tuple(value.shape) for name, value in tensors.items()}
