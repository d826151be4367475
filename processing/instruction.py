"""Instruction: the task in words, as the token ids that a policy's language model reads.

Shapes: b batch, n tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from .._tokenizers import notice_instruction, read_instructions, require_fitting_tokenizer, require_plain_words
from ..configuration.policy import PolicyConfig
from ..errors import FeatureShapeError, MissingFeatureError, MissingTokenizerError
from .observation import TASK
from .part import ProcessorPart

# Robots that share a processor may predict at once, and a fast tokenizer refuses to be changed while it works.
_TOKENIZING = threading.Lock()


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
    written_marks: ClassVar[tuple[str, ...]] = ()  # special tokens that `prompt` writes
    padding_side: ClassVar[str] = "right"
    written_words: ClassVar[tuple[str, ...]] = ()  # what else it writes, which a tokenizer of whole words must know

    def __post_init__(self):
        if self.tokenizer is None:
            raise MissingTokenizerError(None)
        self._noticed: set[str] = set()

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
            padding_side=self.padding_side,
            truncation=True,
            max_length=self.max_instruction_tokens,
            return_tensors="pt",
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def check_agreement(self, config: PolicyConfig) -> None:
        """Check that the policy's language model knows the tokenizer's tokens, and its end of a text.

        Raises:
            CheckpointError: it has fewer tokens, or looks for another token at the end.
        """
        require_fitting_tokenizer(self.tokenizer, config, self.written_marks)

    def notice(self, task: str) -> None:
        """Warn, once for each instruction, of words that the tokenizer does not know and of what is cut off."""
        if task in self._noticed:
            return
        self._noticed.add(task)
        limit, taken = self.max_instruction_tokens, self.special_tokens
        notice_instruction(self.tokenizer, task, self.prompt_words(task), limit, taken)

    def prompt_words(self, task: str) -> str:
        """Return the part of a prompt that `max_instruction_tokens` counts: here, all of it."""
        return self.prompt(task)

    @property
    def special_tokens(self) -> int:
        """How many of `max_instruction_tokens` the tokenizer takes for its own marks."""
        return self.tokenizer.num_special_tokens_to_add()

    def tokens(self, task: str | Sequence[str] | None, batch_size: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `encode` makes of an instruction that is read, noticed and tokenised by one thread at a time.

        Arguments as of `read` and `prompts`.
        """
        tasks = self.read(task, batch_size)
        with _TOKENIZING:
            for text in dict.fromkeys(tasks):
                self.notice(text)
            return self.encode(tasks, inputs)

    def read(self, task: str | Sequence[str] | None, batch_size: int) -> list[str]:
        """Return one instruction for each observation of a batch.

        Raises:
            MissingFeatureError: there is none.
            FeatureValueError, FeatureShapeError: something else than text, an empty one, or another number.
        """
        if task is None:
            raise MissingFeatureError([TASK], (), [*self.inputs, TASK])
        texts = read_instructions(task, batch_size)
        for text in texts:
            if text not in self._noticed:
                require_plain_words(self.tokenizer, text, self.written_marks)
        if len(texts) != batch_size:
            raise FeatureShapeError(TASK, (len(texts),), f"one instruction, or one for each of {batch_size}")
        return texts
