"""Eagle's formats: how the language models of GR00T N1 and N1.5 are shown pictures and instructions.

Shapes: b batch, n tokens, h height, w width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812  (torch's own convention)
from transformers import PreTrainedTokenizerBase

from ..errors import FeatureValueError, InvalidConfigError, MissingTokenizerError
from .word_tokenizer import with_special_tokens

IMAGE_TOKEN = "<IMG_CONTEXT>"
# The image token first: in a tokenizer of words it then always has the same id, which configs can name.
SPECIAL_TOKENS = (IMAGE_TOKEN, "<img>", "</img>", "<|im_start|>", "<|im_end|>")
_SYSTEM = "You are a helpful assistant."


class EagleFormat:
    """Write prompts in which every picture has its place, and cut pictures into tiles; N1.5's and N1's differ.

    Args:
        tokens_per_tile (`int`): image tokens of one tile: 256 in the published N1.5, 64 in N1.
        image_size (`int`, *optional*, defaults to 224): height and width of a tile.
        max_tiles (`int`, *optional*): tiles that a picture of another size is cut into at most; a small copy of the
            whole picture is added where there are several.

    Raises:
        InvalidConfigError: impossible sizes, or more tiles than the model was trained on.
    """

    default_max_tiles: ClassVar[int]

    def __init__(self, tokens_per_tile: int, image_size: int = 224, max_tiles: int | None = None):
        self.tokens_per_tile = tokens_per_tile
        self.image_size = image_size
        self.max_tiles = self.default_max_tiles if max_tiles is None else max_tiles
        for name in ("tokens_per_tile", "image_size", "max_tiles"):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{type(self).__name__}: {name}={getattr(self, name)} must be at least 1.")

    def prompt(self, task: str, tiles: Sequence[int]) -> str:
        """Return the text of a conversation that shows pictures of so many tiles each, then the instruction.

        Raises:
            FeatureValueError: the instruction itself holds an image token.
        """
        if IMAGE_TOKEN in task:
            raise FeatureValueError(f"The instruction {task!r} holds {IMAGE_TOKEN}, which stands for pictures only.")
        places = [f"<img>{IMAGE_TOKEN * (self.tokens_per_tile * count)}</img>" for count in tiles]
        turns = (("system", _SYSTEM), ("user", self.pictures(places) + task))
        said = "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in turns)
        return f"{said}<|im_start|>assistant\n"

    def pictures(self, places: Sequence[str]) -> str:
        """Return the text in front of the instruction, from the image tokens of each picture."""
        raise NotImplementedError(f"{type(self).__name__} must say how pictures are announced")

    def tile(self, picture: torch.Tensor) -> torch.Tensor:
        """Return a picture (3, h, w) uint8 as the network sees it: (tiles, 3, size, size) in [-1, 1].

        A picture of a tile's size is one tile, untouched.
        """
        size = self.image_size
        columns, rows = tile_grid(*picture.shape[-2:], size, self.max_tiles)
        whole = self.resize(picture, rows * size, columns * size)
        tiles = whole.unfold(1, size, size).unfold(2, size, size)  # (3, rows, columns, size, size)
        tiles = tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)  # (rows · columns, 3, size, size)
        if len(tiles) > 1:
            tiles = torch.cat([tiles, self.resize(picture, size, size)[None]])
        return from_bytes(tiles)

    def resize(self, picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return a uint8 picture (3, h, w) at another size, bicubic with smoothing."""
        return F.interpolate(picture[None], size=(height, width), mode="bicubic", antialias=True)[0]


class EagleFormatN1_5(EagleFormat):
    """GR00T N1.5's: pictures are numbered, even a single one, and stand in one line with the instruction."""

    default_max_tiles = 12

    def pictures(self, places: Sequence[str]) -> str:
        """Return `<image 1>` and its tokens, `<image 2>` …"""
        return "".join(f"<image {number}>{place}" for number, place in enumerate(places, start=1))


class EagleFormatN1(EagleFormat):
    """GR00T N1's: each picture has a line of its own, and a number where there are several.

    Only one tile: with more, the original wrote too few image tokens, so no model was ever trained that way.
    """

    default_max_tiles = 1

    def __init__(self, tokens_per_tile: int, image_size: int = 224, max_tiles: int | None = None):
        super().__init__(tokens_per_tile, image_size, max_tiles)
        if self.max_tiles > 1:
            raise InvalidConfigError(
                f"max_tiles={max_tiles}: GR00T N1 works with one tile per picture (its max_input_tiles). The original "
                f"writes image tokens for the first tile only, so weights that know more do not exist."
            )

    def pictures(self, places: Sequence[str]) -> str:
        """Return `<image 1>`, its tokens and a line break …; a single picture has no number."""
        if len(places) == 1:
            return f"{places[0]}\n"
        return "".join(f"<image {number}>{place}\n" for number, place in enumerate(places, start=1))

    def resize(self, picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return a uint8 picture (3, h, w) at another size, bicubic as PIL rounds it, which is not as torch does."""
        image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def require_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that has Eagle's special tokens: itself, or a tokenizer of words with them added.

    Raises:
        MissingTokenizerError: it lacks some, or has no padding token.
    """
    tokenizer = with_special_tokens(tokenizer, SPECIAL_TOKENS)
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if tokenizer.pad_token_id is None:
        lacking.append("a padding token")
    if lacking:
        raise MissingTokenizerError(
            tokenizer.name_or_path or type(tokenizer).__name__,
            f"it lacks {', '.join(lacking)}, so it is not that of an Eagle model",
        )
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, Any]:
    """Return `input_ids` (b, n) and `attention_mask` (b, n) of prompts, padded on the left to the longest."""
    encoded = tokenizer(
        list(prompts), padding="longest", padding_side="left", add_special_tokens=False, return_tensors="pt"
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def tile_grid(height: int, width: int, size: int, max_tiles: int) -> tuple[int, int]:
    """Return columns and rows of the tiles whose shape suits a picture best.

    The product of two marks decides: how well the aspect is kept, and how much of the picture's area the tiles have,
    of which 60 % are enough. Of equals the one with the fewest tiles wins.
    """
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    aspect = width / height

    def mark(grid: tuple[int, int]) -> float:
        area = grid[0] * grid[1] * size * size / (width * height)
        ratio = grid[0] / grid[1]
        return min(area, 0.6) * min(ratio / aspect, aspect / ratio)

    return max(sorted(grids, key=lambda grid: grid[0] * grid[1]), key=mark)


def from_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures as float32 in [-1, 1]."""
    return (pictures.to(torch.float32) / 255 - 0.5) / 0.5
