"""Instruction: the task in words, as the token ids that a policy's language model reads.

Shapes: b batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ..errors import FeatureShapeError, FeatureValueError, MissingFeatureError, MissingTokenizerError
from .observation import TASK
from .part import ProcessorPart


@dataclass(kw_only=True)
class Instruction(ProcessorPart):
    """Tokenise instructions, padded on the right to one length.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the policy's language model; its files are saved beside
            processor_config.json.
        max_instruction_tokens (`int`): n, tokens per instruction; longer ones are cut.

    Raises:
        MissingTokenizerError: there is no tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    max_instruction_tokens: int | None = None

    config_fields: ClassVar[tuple[str, ...]] = ("max_instruction_tokens",)

    def __post_init__(self):
        if self.tokenizer is None:
            raise MissingTokenizerError(None)

    def prompt(self, task: str) -> str:
        """Return the text that is tokenised for an instruction; subclasses write what their model was trained on."""
        return task

    def prompts(self, tasks: Sequence[str], inputs: Mapping[str, Any]) -> list[str]:
        """Return the text of each observation; subclasses that show more than the instruction read it from `inputs`.

        Args:
            tasks: one instruction for each observation.
            inputs: the other model inputs, prepared: `pixel_values`, `pixel_mask`, `state`.
        """
        return [self.prompt(task) for task in tasks]

    def encode(self, tasks: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return `input_ids` (b, n) and `attention_mask` (b, n), 1 at real tokens; arguments as of `prompts`."""
        encoded = self.tokenizer(
            self.prompts(tasks, inputs),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.max_instruction_tokens,
            return_tensors="pt",
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def read(self, task: str | Sequence[str] | None, batch_size: int) -> list[str]:
        """Return one instruction for each observation of a batch.

        Raises:
            MissingFeatureError: there is none.
            FeatureValueError, FeatureShapeError: something else than text, or another number.
        """
        if task is None:
            raise MissingFeatureError([TASK], (), [*self.inputs, TASK])
        texts = [task] * batch_size if isinstance(task, str) else list(task)
        for text in texts:
            if not isinstance(text, str):
                raise FeatureValueError(f"An instruction is a str; got {text!r}.")
        if len(texts) != batch_size:
            raise FeatureShapeError(TASK, (len(texts),), f"one instruction, or one for each of {batch_size}")
        return texts
