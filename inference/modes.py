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
