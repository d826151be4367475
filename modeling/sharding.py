"""Sharding: FSDP2 gathers the weights of a module that is called; here methods and files that need them do it too."""

from __future__ import annotations

import sys
from collections.abc import Mapping

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


# --- weights as files hold them ---------------------------------------------------------------------------


def is_split(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether some tensors are split among processes."""
    return any(map(_is_shard, tensors.values()))


def is_first_process() -> bool:
    """Return whether this process is the only one, or the first of those that work together."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whole tensors on the CPU in the first process, and nothing in the others; called in every process."""
    whole = {}
    for name, value in tensors.items():
        value = value.detach().full_tensor() if _is_shard(value) else value.detach()
        if is_first_process():  # one tensor at a time is whole in the others
            whole[name] = value.cpu()
    return whole


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if _is_shard(tensor) else tensor


def split_like(whole: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor as `model` is split, on its device; nothing is communicated."""
    whole = whole.to(model.device)
    if not _is_shard(model):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, model.device_mesh, model.placements, src_data_rank=None)


def as_split(part: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return the tensor of which each process holds a part, as it does of `model`."""
    if not _is_shard(model):
        return part
    from torch.distributed.tensor import DTensor

    place = (model.device_mesh, model.placements)
    return DTensor.from_local(part, *place, run_check=False, shape=model.shape, stride=model.stride())


def _is_shard(tensor: object) -> bool:
    """Return whether a tensor is split among processes; the module is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
