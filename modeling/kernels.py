"""Kernels of attention that a device cannot run, refused before they are tried."""

from __future__ import annotations

import torch

from ..errors import InvalidConfigError


def require_kernel(implementation: str | None, device: torch.device) -> None:
    """Check that a device has an attention kernel.

    Raises:
        InvalidConfigError: flex_attention on a CPU, where compiling it ends the process.
    """
    if implementation == "flex_attention" and device.type == "cpu":
        raise InvalidConfigError(
            "attention_implementation='flex_attention' runs on a GPU only, and the policy is on the CPU. "
            "Choose 'sdpa' or 'eager': policy.set_attn_implementation('sdpa')."
        )
