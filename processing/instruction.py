"""Instruction: the task in words, as the token ids that a policy's language model reads.

Shapes: b batch, n tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration.policy import PolicyConfig
from ..errors import CheckpointError, FeatureShapeError, FeatureValueError, MissingFeatureError, MissingTokenizerError
from .observation import TASK
from .part import ProcessorPart

logger = logging.get_logger(__name__)

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
            padding_side="right",
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
        remedy = "Take the tokenizer that it was trained with: tokenizer=folder_or_id"
        marks = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        marks -= set(self.written_marks)  # PaliGemma's tokenizer has an <image> that no instruction holds
        highest = max((i for token, i in self.tokenizer.get_vocab().items() if token not in marks), default=0)
        if config.vocabulary_size is not None and highest >= config.vocabulary_size:
            raise CheckpointError(
                f"The tokenizer has ids up to {highest}, the policy's language model {config.vocabulary_size} tokens. "
                f"{remedy}; a policy trained anew must say a vocab_size of at least {highest + 1}."
            )
        mine, theirs = self.tokenizer.eos_token_id, config.end_token_id
        if theirs not in (None, mine):
            raise CheckpointError(
                f"The tokenizer ends a text with the id {mine} ({self.tokenizer.eos_token!r}), and the policy's "
                f"language model summarises it at eos_token_id={theirs}, so that it would ignore every instruction. "
                f"{remedy}; a policy trained anew must say eos_token_id={mine}."
            )

    def notice(self, task: str) -> None:
        """Warn, once for each instruction, of words that the tokenizer does not know and of what is cut off."""
        if task in self._noticed:
            return
        self._noticed.add(task)
        ids = self.tokenizer(self.prompt_words(task), add_special_tokens=False)["input_ids"]
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown != self.tokenizer.eos_token_id and unknown in ids:
            known = [word for word in self.tokenizer.get_vocab() if word not in self.tokenizer.all_special_tokens]
            shown = f" It knows: {', '.join(sorted(known))}." if len(known) <= 50 else ""
            logger.warning(
                f"The instruction {task!r} has words that the tokenizer does not know; to the policy they are all "
                f"{self.tokenizer.unk_token!r}.{shown}"
            )
        room = None if self.max_instruction_tokens is None else self.max_instruction_tokens - self.special_tokens
        if room is not None and len(ids) > room:
            kept = self.tokenizer.decode(ids[:room])
            logger.warning(
                f"The instruction {task!r} has {len(ids)} tokens; it is cut to max_instruction_tokens="
                f"{self.max_instruction_tokens}, and the policy reads {kept!r}."
            )

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
        if not isinstance(task, (str, Sequence)):
            raise FeatureValueError(f"An instruction is a str, or a list of one for each observation; got {task!r}.")
        texts = [task] * batch_size if isinstance(task, str) else list(task)
        for text in texts:
            if not isinstance(text, str):
                raise FeatureValueError(f"An instruction is a str; got {text!r}.")
            if text not in self._noticed:
                self._require_words(text)
        if len(texts) != batch_size:
            raise FeatureShapeError(TASK, (len(texts),), f"one instruction, or one for each of {batch_size}")
        return texts

    def _require_words(self, text: str) -> None:
        """Check that an instruction is made of words that a tokenizer can read, and of none of its marks."""
        if not text.strip():
            raise FeatureValueError(
                'The instruction is empty. Say what is to be done: task="pick up the red block", in the words of '
                "the training data."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FeatureValueError(f"The instruction {text!r} is no text: {error}.") from error
        tokens = self.tokenizer.added_tokens_decoder.values()
        marks = {str(token) for token in tokens if token.special} | set(self.written_marks)
        if found := sorted(mark for mark in marks if mark in text):
            raise FeatureValueError(
                f"The instruction {text!r} holds {', '.join(found)}, which the tokenizer keeps for itself; say what "
                f"is to be done in words."
            )
