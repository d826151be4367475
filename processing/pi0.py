"""PI0PolicyProcessor: pictures of one size, instructions in PaliGemma's tokens, states and actions of one width."""

from __future__ import annotations

from dataclasses import dataclass

from .instruction import Instruction
from .pictures import PaddedPictures
from .processor import PolicyProcessor
from .vectors import PaddedVectors


def cleaned(task: str) -> str:
    """Return an instruction as openpi writes it: trimmed, with spaces for underscores and line breaks."""
    return task.strip().replace("_", " ").replace("\n", " ")


@dataclass(kw_only=True)
class PaliGemmaInstruction(Instruction):
    """Write instructions as PaliGemma was trained on them; see `Instruction`.

    Args:
        clean_instructions (`bool`, *optional*, defaults to False): trim instructions, and read underscores and line
            breaks in them as spaces, as openpi does and LeRobot does not.
    """

    clean_instructions: bool = False

    def prompt(self, task: str) -> str:
        """Return the instruction and a line break, which is PaliGemma's mark of its end."""
        if self.clean_instructions:
            task = cleaned(task)
        return task if task.endswith("\n") else f"{task}\n"


class PI0PolicyProcessor(PolicyProcessor):
    """Prepare observations for π0, and cut its chunks to the robot's width; see `PolicyProcessor` and the parts.

    States and actions are normalised in their own width, then padded: the policy sees padded widths only.
    """

    pictures_class = PaddedPictures
    vectors_class = PaddedVectors
    instruction_class = PaliGemmaInstruction
