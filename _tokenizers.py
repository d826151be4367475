"""Tokenizers: loaded from a folder or the Hub, or a named error that says what to pass."""

from __future__ import annotations

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .errors import MissingTokenizerError


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
