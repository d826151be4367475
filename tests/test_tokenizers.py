"""Tokenizers are had, or asked for by name."""

import pytest

from manipulators._tokenizers import load_tokenizer
from manipulators.errors import MissingTokenizerError
from manipulators.processing.word_tokenizer import word_tokenizer


def test_no_tokenizer_is_asked_for():
    with pytest.raises(MissingTokenizerError, match="reads an instruction"):
        load_tokenizer(None)


def test_a_tokenizer_that_cannot_be_had(tmp_path):
    with pytest.raises(MissingTokenizerError, match="cannot be had") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_of_a_folder(tmp_path):
    tokenizer = word_tokenizer(["Press the button", "open the button"])
    assert load_tokenizer(tokenizer) is tokenizer
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("open the button")["input_ids"] == [2, 5, 7, 4, 3]
