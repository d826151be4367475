"""Stages: the methods that sampling consists of, which a policy names, so that they can be compiled and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .inputs import LABELS


class CompiledStage:
    """Take the place of a module's method, compiled for fixed shapes and as one graph.

    Args:
        owner: the module.
        name: of its method.
        options: of `torch.compile`.
    """

    def __init__(self, owner: nn.Module, name: str, options: Mapping[str, Any]):
        self.owner, self.name = owner, name
        # Nested ones are copied, because torch takes entries out of them.
        own = {option: dict(value) if isinstance(value, Mapping) else value for option, value in options.items()}
        self.call = torch.compile(_plain(owner, name), fullgraph=True, dynamic=False, **own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable:
        return _plain(memo[id(self.owner)], self.name)  # a copy of the module has weights of its own


class PredictionByStages:
    """Take the place of a policy's `predict_action_chunk`, whose stages are compiled.

    CUDA graphs (`mode="reduce-overhead"`) reuse the memory of their results. The beginning of a chunk is marked, so
    that stages can read each other's results until then, and the chunk itself is copied.
    """

    def __init__(self, policy: PreTrainedModel):
        self.policy = policy

    def __call__(self, **inputs: Any) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return _plain(self.policy, "predict_action_chunk")(**inputs).clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable:
        return _plain(memo[id(self.policy)], "predict_action_chunk")


def compile_stages(policy: PreTrainedModel, **options: Any) -> None:
    """Replace every stage of a policy by its compiled self."""
    for owner, name in stages_of(policy).values():
        setattr(owner, name, CompiledStage(owner, name, options))
    policy.predict_action_chunk = PredictionByStages(policy)


@contextmanager
def observed_stages(policy: PreTrainedModel, around: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Replace every stage by `around(its name, the stage)` for a while."""
    stages = stages_of(policy)
    before = {stage: vars(owner).get(name) for stage, (owner, name) in stages.items()}
    try:
        for stage, (owner, name) in stages.items():
            setattr(owner, name, around(stage, getattr(owner, name)))
        yield
    finally:
        for stage, (owner, name) in stages.items():
            if before[stage] is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before[stage])


def stages_of(policy: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    """Return the module and the method of every stage that a policy has, in order; a config may leave some out."""
    found = {}
    for stage, path in policy.stages.items():
        *modules, method = path.split(".")
        owner: Any = policy
        for name in modules:
            owner = getattr(owner, name, None)
        if owner is not None:
            found[stage] = (owner, method)
    return found


def example_observation(policy: PreTrainedModel, batch_size: int) -> dict[str, Any]:
    """Return valid model inputs without labels, as the config has them, on the policy's device and in its type."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.to(policy.device, policy.dtype if value.is_floating_point() else value.dtype)

    inputs = policy.config.example_inputs(batch_size)
    return {name: move(value) for name, value in inputs.items() if name not in LABELS}


def _plain(owner: nn.Module, name: str) -> Callable:
    return getattr(type(owner), name).__get__(owner)
