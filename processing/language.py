"""LanguageProcessor: the processor of a policy that reads an instruction, where it has none of its own."""

from __future__ import annotations

from .instruction import Instruction
from .processor import PolicyProcessor


class LanguageProcessor(PolicyProcessor):
    """Prepare observations with an instruction; see `PolicyProcessor`."""

    instruction_class = Instruction
