"""PI05PolicyProcessor: π0's pictures and actions, and prompts that tell the robot's state.

Shapes: b batch, s state width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers.utils import logging

from .._tokenizers import notice_instruction
from ..configuration.features import STATE
from .instruction import Instruction
from .pi0 import PI0PolicyProcessor, cleaned
from .vectors import PaddedVectors

logger = logging.get_logger(__name__)

BINS = 256  # equal parts of [-1, 1]


@dataclass(kw_only=True)
class StateInstruction(Instruction):
    """Write prompts of an instruction and the normalised state, whose numbers stand as bins; see `Instruction`.

    The instruction may be that of a part of the task, as the policy was trained on both.

    Args:
        prompt_state_dim (`int`, *optional*): see `PI05PolicyConfig`.
    """

    prompt_state_dim: int | None = None

    written_words: ClassVar[tuple[str, ...]] = ("Task: , State: ; Action:", " ".join(map(str, range(-1, BINS))))
    config_fields: ClassVar[tuple[str, ...]] = (*Instruction.config_fields, "prompt_state_dim")

    def prompts(self, tasks: Sequence[str], inputs: Mapping[str, Any]) -> list[str]:
        """Return the prompt of each observation; its state (b, s or wider) is `inputs["state"]`, normalised."""
        if not self.state_width:
            return [_prompt(task, ()) for task in tasks]
        state = inputs["state"]
        state = F.pad(state, (0, max(0, self.state_width - state.shape[-1])))[..., : self.state_width]
        return [_prompt(task, row) for task, row in zip(tasks, state_bins(state).tolist(), strict=True)]

    def notice(self, task: str) -> None:
        """Warn, once for each instruction, of words that the tokenizer does not know and of a state that is cut off.

        The instruction stands first in the prompt, so a long one costs the end of the state.
        """
        if task in self._noticed:
            return
        self._noticed.add(task)
        notice_instruction(self.tokenizer, task, self.prompt_words(task), None, 0)
        tokens = len(self.tokenizer(_prompt(task, [BINS // 2] * self.state_width))["input_ids"])
        if tokens > self.max_instruction_tokens:
            logger.warning(
                f"The prompt of the instruction {task!r} has up to {tokens} tokens with the state's "
                f"{self.state_width} numbers; it is cut to max_instruction_tokens={self.max_instruction_tokens}, so "
                f"the policy does not see its end. Use a shorter instruction, or a larger max_instruction_tokens."
            )

    def prompt_words(self, task: str) -> str:
        """Return the instruction as it stands in the prompt."""
        return cleaned(task)

    @property
    def state_width(self) -> int:
        """How many numbers the prompt tells."""
        return self.inputs[STATE].shape[0] if self.prompt_state_dim is None else self.prompt_state_dim


def state_bins(state: torch.Tensor) -> torch.Tensor:
    """Return the bin (b, s) that each number of a normalised state (b, s) lies in, int64.

    They are 0 … 255 from -1 to 1; what is above is in the last, and what is below in -1, as the policy was trained.
    """
    half = BINS // 2
    return ((state * half).floor() + half).clamp(-1, BINS - 1).long()  # a power of two: no number changes its bin


def _prompt(task: str, bins: Sequence[int]) -> str:
    if not bins:
        return f"{cleaned(task)}\n"
    return f"Task: {cleaned(task)}, State: {' '.join(map(str, bins))};\nAction: "


class StateVectors(PaddedVectors):
    """Normalise a state that is seen as bins, and may be wider than `max_state_dim`; see `PaddedVectors`."""

    steep = (STATE,)

    @property
    def padded_widths(self) -> dict[str, int]:
        """The widths that states and actions are padded to."""
        return super().padded_widths | {STATE: max(self.max_state_dim, self.robots.model_width(STATE))}


class PI05PolicyProcessor(PI0PolicyProcessor):
    """Prepare observations for π0.5, and cut its chunks to the robot's width; see `PI0PolicyProcessor`."""

    vectors_class = StateVectors
    instruction_class = StateInstruction
