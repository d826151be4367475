"""State that FSDP2 splits among processes, written as one process writes it and read as each holds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...modeling.loading import read_tensors
from ...modeling.sharding import gathered, local, split_like


def load_whole_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Fill a model, of whose weights each process holds a part, from the whole ones in a folder."""
    own = model.state_dict()
    for path in sorted(Path(folder).glob("model*.safetensors")):
        for name, value in read_tensors(path, backend="mmap").items():
            local(own[name]).copy_(local(split_like(value, own[name])))


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's `state_dict` with whole tensors in the first process; called in every process."""
    saved = optimizer.state_dict()
    states = {}
    for number, state in saved["state"].items():
        tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
        states[number] = state | gathered(tensors)
    return saved | {"state": states}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer, whose tensors are split as its parameters are, what `whole_optimizer_state` returned."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {
            name: split_like(value, parameters[number]) if _is_like(value, parameters[number]) else value
            for name, value in state.items()
        }
        for number, state in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": states})


def _is_like(value: Any, parameter: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == parameter.shape and value.ndim > 0
