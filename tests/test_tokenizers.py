"""Tokenizers are had, or asked for by name."""

import json

import pytest

from manipulators._tokenizers import load_tokenizer
from manipulators.errors import MissingTokenizerError
from manipulators.processing.word_tokenizer import word_tokenizer


def test_no_tokenizer_is_asked_for():
    with pytest.raises(MissingTokenizerError, match="reads an instruction"):
        load_tokenizer(None)


def test_a_tokenizer_that_cannot_be_had(tmp_path):
    with pytest.raises(MissingTokenizerError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_of_a_folder(tmp_path):
    tokenizer = word_tokenizer(["Press the button", "open the button"])
    assert load_tokenizer(tokenizer) is tokenizer
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("open the button")["input_ids"] == [2, 5, 7, 4, 3]


def test_nobody_is_asked_at_the_terminal(tmp_path, monkeypatch):
    """NVIDIA's folders name Python files beside their tokenizer, about which transformers would ask."""
    word_tokenizer(["open"]).save_pretrained(tmp_path)
    remote = {"model_type": "eagle_chat", "auto_map": {"AutoConfig": "configuration_eagle_chat.Eagle2ChatConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(remote))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    assert load_tokenizer(tmp_path)("open")["input_ids"] == [2, 4, 3]
    assert not asked
