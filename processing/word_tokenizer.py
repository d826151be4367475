"""A tokenizer of whole words, for policies that learn their instructions from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InvalidConfigError

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token per word of `texts`, in lower case; other words are `<unk>`.

    An instruction becomes `<bos> words <eos>`. Nothing is downloaded: a few instructions need no vocabulary of a web's
    size, and a language model that starts from random weights has no other to keep to.
    """
    split = Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.lower())})
    if not words:
        raise InvalidConfigError("A word tokenizer needs instructions to take its words from; there are none.")
    return _build((), words)


def with_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer of words that knows `tokens` too, right behind its four own, before all words.

    So their ids are the same whatever the words are: 4, 5, … A tokenizer that has them, or is of another kind, is
    returned as it is.
    """
    vocabulary = tokenizer.get_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if all(token in vocabulary for token in tokens) or not isinstance(getattr(backend, "model", None), WordLevel):
        return tokenizer
    words = sorted(vocabulary.keys() - set(SPECIAL) - set(tokens), key=vocabulary.get)
    return _build(tokens, words)


def _build(tokens: Sequence[str], words: Sequence[str]) -> PreTrainedTokenizerBase:
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *tokens, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(name, vocabulary[name]) for name in ("<bos>", "<eos>")]
    )
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=list(tokens), **names)
