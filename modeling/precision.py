"""The type in which a module computes, which need not be the type of what it stores."""

from __future__ import annotations

import torch
from torch import nn

# Types in which networks compute; weights of another one are quantised.
COMPUTE_TYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the type that a module's inputs are cast to: that of its first weight that is not quantised.

    A module all of whose weights are quantised says it itself, as bitsandbytes' layers do; else it is torch's default.
    """
    found = next((p.dtype for p in module.parameters() if p.dtype in COMPUTE_TYPES), None)
    return found or getattr(module, "compute_dtype", None) or torch.get_default_dtype()
