"""Sharding: FSDP2 gathers the weights of a module that is called; here methods that need them do it too."""

from __future__ import annotations

import sys

import torch
from torch import nn

# Methods beside `forward` by which a policy, a backbone or an action head is run from outside.
ENTRIES = ("predict_action_chunk", "encode", "errors", "sample", "sample_actions", "sample_latent")


def gather_for_methods(policy: nn.Module, components: dict[str, nn.Module]) -> bool:
    """Let FSDP2 gather weights for the methods of a policy and of its components that `fully_shard` was applied to.

    Returns:
        Whether a method of the policy itself has been replaced, so that it has to be looked up again.
    """
    if torch.compiler.is_compiling() or "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    changed = False
    for module in {id(module): module for module in (policy, *components.values())}.values():
        if isinstance(module, FSDPModule) and "_gathers" not in vars(module):
            module._gathers = True
            own = ENTRIES[:1] if module is policy else ENTRIES[1:]  # a policy's others run inside these or `forward`
            for name in own:
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)
            changed = changed or module is policy
    return changed
