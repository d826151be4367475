"""Eagle's prompts, with tokens that can be counted by hand; and tokenizers that know its special tokens or do not."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from manipulators.errors import FeatureValueError, InvalidConfigError, MissingTokenizerError
from manipulators.processing.eagle import (
    IMAGE_TOKEN,
    SPECIAL_TOKENS,
    EagleInstructionN1,
    EagleInstructionN1_5,
    require_special_tokens,
)
from manipulators.processing.word_tokenizer import word_tokenizer

FRAME = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


ONE_PICTURE = {"pixel_values": torch.zeros(2, 1, 3, 4, 4)}


def build(instruction_class, tokenizer=None, tokens_per_image=2):
    tokenizer = tokenizer or word_tokenizer(["press it"])
    return instruction_class(inputs={}, outputs={}, tokenizer=tokenizer, tokens_per_image=tokens_per_image)


@pytest.mark.parametrize(
    ("instruction_class", "pictures", "expected"),
    [
        (EagleInstructionN1_5, 1, "<image 1><img>CC</img>Press it"),
        (EagleInstructionN1_5, 2, "<image 1><img>CC</img><image 2><img>CC</img>Press it"),
        (EagleInstructionN1_5, 0, "Press it"),
        (EagleInstructionN1, 1, "<img>CC</img>\nPress it"),
        (EagleInstructionN1, 2, "<image 1><img>CC</img>\n<image 2><img>CC</img>\nPress it"),
        (EagleInstructionN1, 0, "Press it"),
    ],
)
def test_prompts(instruction_class, pictures, expected):
    prompt = build(instruction_class).prompt("Press it", pictures)
    assert prompt == FRAME.format(expected.replace("C", IMAGE_TOKEN))


def test_instructions_hold_no_image_tokens():
    with pytest.raises(FeatureValueError, match="which stands for pictures only"):
        build(EagleInstructionN1_5).prompt(f"look {IMAGE_TOKEN}", 1)


def test_impossible_number_of_tokens():
    with pytest.raises(InvalidConfigError, match="tokens_per_image=0 must be at least 1"):
        build(EagleInstructionN1_5, tokens_per_image=0)


# --- tokenizers -------------------------------------------------------------------------------------------


def test_words_with_special_tokens():
    """Their ids do not depend on the words: <IMG_CONTEXT> is 4; the words follow in their order."""
    tokenizer = require_special_tokens(word_tokenizer(["press the button"]))
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [4, 5, 6, 7, 8]
    assert [vocabulary[word] for word in ("button", "press", "the")] == [9, 10, 11]
    assert require_special_tokens(tokenizer) is tokenizer


def test_padding_on_the_left():
    tokenizer = require_special_tokens(word_tokenizer(["press the button"]))
    encoded = build(EagleInstructionN1_5, tokenizer).encode(["press", "press the button"], ONE_PICTURE)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert ids[0, :3].tolist() == [0, 0, 7] and mask[0, :3].tolist() == [0, 0, 1]
    assert mask[1].all() and torch.equal(ids[0, 3:-5], ids[1, 1:-7])
    assert (ids == 4).sum(dim=1).tolist() == [2, 2]


def test_saved_words_keep_their_special_tokens(tmp_path):
    tokenizer = require_special_tokens(word_tokenizer(["press"]))
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert require_special_tokens(loaded) is loaded
    ids = [build(EagleInstructionN1, t).encode(["press"], ONE_PICTURE)["input_ids"] for t in (loaded, tokenizer)]
    assert torch.equal(*ids)


def test_tokenizer_of_another_model():
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "<img>": 1}, [])))
    with pytest.raises(MissingTokenizerError, match=r"lacks <IMG_CONTEXT>, </img>, .*, a padding token.*Eagle model"):
        require_special_tokens(other)
