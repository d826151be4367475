"""Eagle's prompts and tiles, with numbers that can be counted by hand; and tokenizers that know them or do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from manipulators.errors import FeatureValueError, InvalidConfigError, MissingTokenizerError
from manipulators.processing.eagle import (
    IMAGE_TOKEN,
    SPECIAL_TOKENS,
    EagleFormatN1,
    EagleFormatN1_5,
    from_bytes,
    require_special_tokens,
    tile_grid,
    tokenize,
)
from manipulators.processing.word_tokenizer import word_tokenizer

FRAME = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("layout", "tiles", "expected"),
    [
        (EagleFormatN1_5(2), [1], "<image 1><img>CC</img>Press it"),
        (EagleFormatN1_5(2), [1, 3], "<image 1><img>CC</img><image 2><img>CCCCCC</img>Press it"),
        (EagleFormatN1_5(2), [], "Press it"),
        (EagleFormatN1(2), [1], "<img>CC</img>\nPress it"),
        (EagleFormatN1(2), [1, 1], "<image 1><img>CC</img>\n<image 2><img>CC</img>\nPress it"),
        (EagleFormatN1(2), [], "Press it"),
    ],
)
def test_prompts(layout, tiles, expected):
    assert layout.prompt("Press it", tiles) == FRAME.format(expected.replace("C", IMAGE_TOKEN))


def test_instructions_hold_no_image_tokens():
    with pytest.raises(FeatureValueError, match="which stands for pictures only"):
        EagleFormatN1_5(2).prompt(f"look {IMAGE_TOKEN}", [1])


@pytest.mark.parametrize("field", ["tokens_per_tile", "image_size", "max_tiles"])
def test_impossible_sizes(field):
    with pytest.raises(InvalidConfigError, match=f"{field}=0 must be at least 1"):
        EagleFormatN1_5(**{"tokens_per_tile": 4, field: 0})


# --- tiles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [
        (224, 224, (1, 1)),
        (180, 320, (2, 1)),
        (480, 640, (4, 3)),
        (640, 480, (3, 4)),
        (289, 289, (1, 1)),
        (290, 290, (2, 2)),
        (448, 448, (2, 2)),
        (720, 1280, (4, 3)),
        (224, 2240, (10, 1)),
        (10, 10, (1, 1)),
    ],
)
def test_tile_grids(height, width, grid):
    """One tile has 60 % of a picture's area up to 289 pixels; at 448, 2 × 2 is as good as 3 × 3, and has fewer."""
    columns, rows = tile_grid(height, width, 224, 12)
    assert (columns, rows) == grid


def test_tiles_stand_in_reading_order():
    """Six squares of one grey each; the whole picture made small comes last."""
    levels = torch.tensor([[0, 50, 100], [150, 200, 250]], dtype=torch.uint8)
    picture = levels.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, -1, -1)
    tiles = EagleFormatN1_5(1, image_size=4).tile(picture)
    assert tiles.shape == (7, 3, 4, 4)
    assert ((tiles[:6].mean(dim=(1, 2, 3)) + 1) * 127.5).round().tolist() == [0, 50, 100, 150, 200, 250]
    assert tiles[6].mean().item() == pytest.approx(125 / 127.5 - 1, abs=0.02)


def test_picture_of_a_tiles_size_is_untouched():
    picture = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    for layout in (EagleFormatN1_5(1, image_size=8), EagleFormatN1(1, image_size=8)):
        assert torch.equal(layout.tile(picture), from_bytes(picture)[None])


def test_bytes_reach_from_minus_one_to_one():
    assert from_bytes(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([-1, -0.6, 1])


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 64), width=st.integers(8, 64), max_tiles=st.integers(1, 12))
def test_as_many_tiles_as_the_grid_says(height, width, max_tiles):
    """So that a prompt never has other tokens than pictures."""
    layout = EagleFormatN1_5(3, image_size=8, max_tiles=max_tiles)
    tiles = layout.tile(torch.zeros(3, height, width, dtype=torch.uint8))
    columns, rows = tile_grid(height, width, 8, max_tiles)
    assert columns * rows <= max_tiles
    assert len(tiles) == columns * rows + (columns * rows > 1)
    assert layout.prompt("go", [len(tiles)]).count(IMAGE_TOKEN) == 3 * len(tiles)


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
    layout = EagleFormatN1_5(2)
    encoded = tokenize(tokenizer, [layout.prompt(text, [1]) for text in ("press", "press the button")])
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert ids[0, :3].tolist() == [0, 0, 7] and mask[0, :3].tolist() == [0, 0, 1]
    assert mask[1].all() and torch.equal(ids[0, 3:-5], ids[1, 1:-7])
    assert (ids == 4).sum(dim=1).tolist() == [2, 2]


def test_saved_words_keep_their_special_tokens(tmp_path):
    tokenizer = require_special_tokens(word_tokenizer(["press"]))
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert require_special_tokens(loaded) is loaded
    prompts = [EagleFormatN1(2).prompt("press", [1, 1])]
    assert torch.equal(tokenize(loaded, prompts)["input_ids"], tokenize(tokenizer, prompts)["input_ids"])


def test_tokenizer_of_another_model():
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "<img>": 1}, [])))
    with pytest.raises(MissingTokenizerError, match=r"lacks <IMG_CONTEXT>, </img>, .*, a padding token.*Eagle model"):
        require_special_tokens(other)
