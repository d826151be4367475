"""Instructions in, token ids out; the tokenizer travels with the processor."""

import json
import threading
import time

import pytest
import torch

from manipulators import PolicyProcessor
from manipulators.configuration.act import ACTConfig
from manipulators.errors import (
    CheckpointError,
    FeatureShapeError,
    FeatureValueError,
    InvalidConfigError,
    MissingFeatureError,
    MissingTokenizerError,
)
from manipulators.processing.instruction import Instruction
from manipulators.processing.language import LanguageProcessor
from manipulators.processing.registry import processor_class
from manipulators.processing.word_tokenizer import word_tokenizer

STATE = {"observation.state": torch.zeros(3)}


@pytest.fixture(scope="module")
def tokenizer():
    # Sorted after <pad> 0, <unk> 1, <bos> 2, <eos> 3: button 4, open 5, press 6, the 7, drawer would be unknown.
    return word_tokenizer(["Press the button", "open the button"])


@pytest.fixture
def language(tokenizer, tiny_act, statistics_of):
    config = tiny_act()
    statistics = statistics_of(config)
    plain = PolicyProcessor.from_config(config, statistics)
    fields = {name: getattr(plain, name) for name in plain.field_names()}
    return LanguageProcessor(tokenizer=tokenizer, max_instruction_tokens=6, **fields)


def test_one_instruction(language):
    inputs = language(STATE, task="Press the button")
    assert inputs["input_ids"].tolist() == [[2, 6, 7, 4, 3, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]
    assert inputs["state"].shape == (1, 3)


def test_unknown_words(language):
    assert language(STATE, task="open drawer")["input_ids"].tolist() == [[2, 5, 1, 3, 0, 0]]


def test_a_str_is_meant_for_the_whole_batch(language):
    """And is not a list of letters."""
    batch = {"observation.state": torch.zeros(3, 3)}
    assert language(batch, task="open")["input_ids"].tolist() == [[2, 5, 3, 0, 0, 0]] * 3


def test_a_list_gives_one_each(language):
    batch = {"observation.state": torch.zeros(2, 3)}
    ids = language(batch, task=["open", "press"])["input_ids"]
    assert ids.tolist() == [[2, 5, 3, 0, 0, 0], [2, 6, 3, 0, 0, 0]]
    with pytest.raises(FeatureShapeError, match="one for each of 2"):
        language(batch, task=["open"])


def test_an_observation_may_carry_its_instruction(language):
    assert torch.equal(language(STATE | {"task": "open"})["input_ids"], language(STATE, task="open")["input_ids"])


def test_no_instruction_is_an_error(language):
    with pytest.raises(MissingFeatureError, match="lacks task"):
        language(STATE)
    with pytest.raises(FeatureValueError, match="is a str; got 3"):
        language(STATE, task=[3])


def test_long_instructions_are_cut(language):
    assert language(STATE, task="press " * 20)["input_ids"].shape == (1, 6)


def test_a_subclass_says_what_its_language_model_was_shown(language, monkeypatch):
    monkeypatch.setattr(Instruction, "prompt", lambda self, task: f"open {task}")
    assert language(STATE, task="press")["input_ids"].tolist() == [[2, 5, 6, 3, 0, 0]]


class StateInWords(Instruction):
    """Show the language model the sign of every normalised number of the state."""

    def prompts(self, tasks, inputs):
        signs = [" ".join("open" if x > 0 else "press" for x in row) for row in inputs["state"].tolist()]
        return [f"{task} {sign}" for task, sign in zip(tasks, signs, strict=True)]


class StateInWordsProcessor(PolicyProcessor):
    """A processor that consists of one part of its own."""

    instruction_class = StateInWords


def test_an_instruction_may_show_the_normalised_state(language, tokenizer):
    fields = {name: getattr(language, name) for name in language.field_names()}
    processor = StateInWordsProcessor(tokenizer=tokenizer, **fields)
    state = {"observation.state": torch.tensor([[9.0, -9.0, 9.0], [-9.0, -9.0, -9.0]])}
    ids = processor(state, task="the")["input_ids"]
    assert ids.tolist() == [[2, 7, 5, 6, 5, 3], [2, 7, 6, 6, 6, 3]]


def test_round_trip(language, tmp_path):
    language.save_pretrained(tmp_path)
    loaded = LanguageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == language.to_dict()
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["max_instruction_tokens"] == 6 and "tokenizer" not in saved
    for name, value in language(STATE, task="open the button").items():
        assert torch.equal(loaded(STATE, task="open the button")[name], value), name


def test_without_a_tokenizer(tiny_act):
    with pytest.raises(MissingTokenizerError, match="tokenizer=AutoTokenizer"):
        LanguageProcessor()


def test_words_come_from_somewhere():
    with pytest.raises(InvalidConfigError, match="there are none"):
        word_tokenizer([""])


def test_contract(language):
    assert "task  the instruction in words, at most 6 tokens" in str(language.contract())


def test_policies_without_instruction_have_the_plain_processor():
    assert processor_class(ACTConfig) is PolicyProcessor


@pytest.mark.parametrize("end", [3, 2])  # 2 marks an older CLIP, which takes the highest token
def test_the_end_of_a_text_is_the_networks(tiny_diffusion, statistics_of, end):
    tokenizer = word_tokenizer(["Press the button"])
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "projection_dim": 12, "num_attention_heads": 2}
    config = tiny_diffusion(use_language_conditioning=True, language_config=text | {"eos_token_id": 3})
    processor = LanguageProcessor.from_config(config, statistics_of(config), tokenizer=tokenizer)
    processor.check_agreement(config)
    config.language_config = text | {"eos_token_id": 2 if end == 2 else 5}
    with pytest.raises(CheckpointError, match=r"ends a text with the id 3 \('<eos>'\).*it would ignore every"):
        processor.check_agreement(config)


# --- what no tokenizer should be given --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("press \ud800", "is no text"),
        ("press <pad> the <eos>", "holds <eos>, <pad>, which the tokenizer keeps for itself"),
    ],
)
def test_text_that_is_no_instruction(language, task, message):
    with pytest.raises(FeatureValueError, match=message):
        language(STATE, task=task)
    with pytest.raises(FeatureValueError, match=message):
        language.check_instruction(language.read_observation(STATE), task)


def test_one_thread_tokenises_at_a_time(language):
    """A fast tokenizer is changed by every call; two robots that share a processor would get each other's padding."""
    inside, most = [], []

    def encode(tasks, inputs):
        inside.append(threading.get_ident())
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()
        return {}

    language.instruction.encode = encode
    threads = [threading.Thread(target=language, args=(STATE, "press the button")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
