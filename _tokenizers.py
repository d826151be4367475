"""Tokenizers and instructions: loaded, and checked in one way at every door that reads text.

A processor reads instructions, and so does a component that is given a batch under the dataset's names.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import CheckpointError, FeatureValueError, MissingTokenizerError

logger = logging.get_logger(__name__)


def load_tokenizer(source: PreTrainedTokenizerBase | str | os.PathLike | None) -> PreTrainedTokenizerBase:
    """Return a tokenizer: itself, or the one that a folder or Hub id holds.

    Raises:
        MissingTokenizerError: there is none, or it cannot be loaded: a gated or unreachable repository.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if source is None:
        raise MissingTokenizerError(None)
    try:
        # With an explicit False, transformers does not ask at the terminal about code in the repository.
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # what a damaged file raises is of many kinds
        raise MissingTokenizerError(str(source), f"{type(error).__name__}: {error}") from error


def read_instructions(task: str | Sequence[str], count: int | None = None) -> list[str]:
    """Return instructions as a list of texts; one for all is repeated `count` times.

    Raises:
        FeatureValueError: something else than text, or an empty one.
    """
    if not isinstance(task, (str, Sequence)):
        raise FeatureValueError(f"An instruction is a str, or a list of one for each observation; got {task!r}.")
    texts = [task] * (1 if count is None else count) if isinstance(task, str) else list(task)
    for text in texts:
        if not isinstance(text, str):
            raise FeatureValueError(f"An instruction is a str; got {text!r}.")
        if not text.strip():
            raise FeatureValueError(
                'The instruction is empty. Say what is to be done: task="pick up the red block", in the words of '
                "the training data."
            )
    return texts


def require_plain_words(tokenizer: PreTrainedTokenizerBase, text: str, written_marks: Collection[str] = ()) -> None:
    """Check that an instruction is made of characters that a tokenizer can read, and of none of its marks.

    Args:
        tokenizer: of the language model.
        text: the instruction.
        written_marks: special tokens that prompts hold.

    Raises:
        FeatureValueError: half a character, or a special token.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FeatureValueError(f"The instruction {text!r} is no text: {error}.") from error
    tokens = tokenizer.added_tokens_decoder.values()
    marks = {str(token) for token in tokens if token.special} | set(written_marks)
    if found := sorted(mark for mark in marks if mark in text):
        raise FeatureValueError(
            f"The instruction {text!r} holds {', '.join(found)}, which the tokenizer keeps for itself; say what is to "
            f"be done in words."
        )


def notice_instruction(
    tokenizer: PreTrainedTokenizerBase, task: str, words: str, length: int | None, special_tokens: int
) -> None:
    """Warn of words that a tokenizer does not know, and of what is cut off.

    Args:
        tokenizer: of the language model.
        task: the instruction, for messages.
        words: the text of it that `length` counts.
        length: tokens of an instruction; None: it is never cut.
        special_tokens: how many of them the tokenizer takes for its own marks.
    """
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id and unknown in ids:
        known = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
        shown = f" It knows: {', '.join(sorted(known))}." if len(known) <= 50 else ""
        logger.warning(
            f"The instruction {task!r} has words that the tokenizer does not know; to the policy they are all "
            f"{tokenizer.unk_token!r}.{shown}"
        )
    room = None if length is None else length - special_tokens
    if room is not None and len(ids) > room:
        logger.warning(
            f"The instruction {task!r} has {len(ids)} tokens; it is cut to max_instruction_tokens={length}, and the "
            f"policy reads {tokenizer.decode(ids[:room])!r}."
        )


def require_fitting_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: Any, written_marks: Collection[str] = ()
) -> None:
    """Check that a policy's language model knows a tokenizer's tokens, and its end of a text.

    Args:
        tokenizer: of the instructions.
        config: the policy's, with `vocabulary_size` and `end_token_id`.
        written_marks: special tokens that prompts hold.

    Raises:
        CheckpointError: it has fewer tokens, or looks for another token at the end.
    """
    remedy = "Take the tokenizer that it was trained with: tokenizer=folder_or_id"
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    marks -= set(written_marks)  # PaliGemma's tokenizer has an <image> that no instruction holds
    highest = max((i for token, i in tokenizer.get_vocab().items() if token not in marks), default=0)
    if config.vocabulary_size is not None and highest >= config.vocabulary_size:
        raise CheckpointError(
            f"The tokenizer has ids up to {highest}, the policy's language model {config.vocabulary_size} tokens. "
            f"{remedy}; a policy trained anew must say a vocab_size of at least {highest + 1}."
        )
    mine, theirs = tokenizer.eos_token_id, config.end_token_id
    if theirs not in (None, mine):
        raise CheckpointError(
            f"The tokenizer ends a text with the id {mine} ({tokenizer.eos_token!r}), and the policy's "
            f"language model summarises it at eos_token_id={theirs}, so that it would ignore every instruction. "
            f"{remedy}; a policy trained anew must say eos_token_id={mine}."
        )
