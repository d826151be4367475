"""A tokenizer of whole words, for policies that learn their instructions from scratch."""

from __future__ import annotations

from collections.abc import Iterable

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
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(name, vocabulary[name]) for name in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
