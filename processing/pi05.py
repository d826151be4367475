"""PI05PolicyProcessor: π0's pictures and actions, and prompts that tell the robot's state.

Shapes: b batch, s state width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration.features import STATE
from .instruction import Instruction
from .pi0 import PI0PolicyProcessor
from .vectors import PaddedVectors

BINS = 256  # equal parts of [-1, 1]


@dataclass(kw_only=True)
class StateInstruction(Instruction):
    """Write prompts of an instruction and the normalised state, whose numbers stand as bins; see `Instruction`."""

    def prompts(self, tasks: Sequence[str], inputs: Mapping[str, Any]) -> list[str]:
        """Return the prompt of each observation; its state (b, s or wider) is `inputs["state"]`, normalised."""
        bins = state_bins(inputs["state"][..., : self.state_width])
        return [_prompt(task, row) for task, row in zip(tasks, bins.tolist(), strict=True)]

    def prompt_words(self, task: str) -> str:
        """Return the instruction as it stands in the prompt; `special_tokens` counts the rest."""
        return _cleaned(task)

    @property
    def special_tokens(self) -> int:
        """How many tokens a prompt takes at most beside the instruction: those of a state of three digits each."""
        rest = _prompt("", [BINS // 2] * self.state_width)
        return len(self.tokenizer(rest)["input_ids"])

    @property
    def state_width(self) -> int:
        """How many numbers the robot's state has, s."""
        return self.inputs[STATE].shape[0]


def state_bins(state: torch.Tensor) -> torch.Tensor:
    """Return the bin (b, s) that each number of a normalised state (b, s) lies in, int64.

    They are 0 … 255 from -1 to 1; what is above is in the last, and what is below in -1, as the policy was trained.
    """
    half = BINS // 2
    return ((state * half).floor() + half).clamp(-1, BINS - 1).long()  # a power of two: no number changes its bin


def _prompt(task: str, bins: Sequence[int]) -> str:
    return f"Task: {_cleaned(task)}, State: {' '.join(map(str, bins))};\nAction: "


def _cleaned(task: str) -> str:
    return task.strip().replace("_", " ").replace("\n", " ")


class StateVectors(PaddedVectors):
    """Normalise a state that is seen as bins; see `PaddedVectors`."""

    steep = (STATE,)


class PI05PolicyProcessor(PI0PolicyProcessor):
    """Prepare observations for π0.5, and cut its chunks to the robot's width; see `PI0PolicyProcessor`."""

    vectors_class = StateVectors
    instruction_class = StateInstruction
