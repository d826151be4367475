"""The modes of torch in which actions are predicted, whatever mode the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside the block, and each of its modules back into its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def ordinary_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compute without gradients and outside of `torch.inference_mode`.

    A tensor from inside that mode cannot be changed or trained with outside of it, and what a pipeline keeps, and what
    it caches in processor and policy, outlives the caller's block.
    """

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


@contextmanager
def draws_taken_back(device: torch.device, generator: torch.Generator | None = None) -> Iterator[None]:
    """Put torch's random generators back where the block raises, so that what follows draws what it would have drawn.

    Args:
        device: whose generator may be drawn from, beside the CPU's.
        generator: one of the caller's.
    """
    module = None if device.type == "cpu" else torch.get_device_module(device)
    state = torch.get_rng_state()
    of_device = None if module is None else module.get_rng_state(device)
    given = None if generator is None else generator.get_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        if module is not None:
            module.set_rng_state(of_device, device)
        if generator is not None:
            generator.set_state(given)
        raise
