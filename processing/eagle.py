"""Eagle's instructions: how the language models of GR00T N1 and N1.5 are shown pictures and instructions.

Shapes: b batch, n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ..errors import FeatureValueError, InvalidConfigError, MissingTokenizerError
from .instruction import Instruction
from .word_tokenizer import with_special_tokens

IMAGE_TOKEN = "<IMG_CONTEXT>"
# The image token first: in a tokenizer of words it then always has the same id, which configs can name.
SPECIAL_TOKENS = (IMAGE_TOKEN, "<img>", "</img>", "<|im_start|>", "<|im_end|>")
_SYSTEM = "You are a helpful assistant."


@dataclass(kw_only=True)
class EagleInstruction(Instruction):
    """Write conversations in which every picture has its tokens, padded on the left to the longest of a batch.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the Eagle model's, or a tokenizer of words, which is given the special
            tokens that it lacks.
        max_instruction_tokens (`int`, *optional*): an instruction is cut to so many tokens; pictures never are.
        tokens_per_image (`int`): image tokens of a picture: 256 in the published N1.5, 64 in N1.

    Raises:
        InvalidConfigError: impossible sizes.
        MissingTokenizerError: there is no tokenizer, or one that is not an Eagle model's.
    """

    tokens_per_image: int

    config_fields: ClassVar[tuple[str, ...]] = (*Instruction.config_fields, "tokens_per_image")
    written_marks: ClassVar[tuple[str, ...]] = SPECIAL_TOKENS
    padding_side: ClassVar[str] = "left"

    def __post_init__(self):
        super().__post_init__()
        self.tokenizer = require_special_tokens(self.tokenizer)
        if self.tokens_per_image < 1:
            raise InvalidConfigError(f"tokens_per_image={self.tokens_per_image} must be at least 1.")

    def prompt(self, task: str, pictures: int = 0) -> str:
        """Return the text of a conversation that shows so many pictures, then the instruction.

        Raises:
            FeatureValueError: the instruction itself holds an image token.
        """
        if IMAGE_TOKEN in task:
            raise FeatureValueError(f"The instruction {task!r} holds {IMAGE_TOKEN}, which stands for pictures only.")
        place = f"<img>{IMAGE_TOKEN * self.tokens_per_image}</img>"
        turns = (("system", _SYSTEM), ("user", self.announced([place] * pictures) + task))
        said = "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in turns)
        return f"{said}<|im_start|>assistant\n"

    def announced(self, places: Sequence[str]) -> str:
        """Return the text in front of the instruction, from the image tokens of each picture."""
        raise NotImplementedError(f"{type(self).__name__} must say how pictures are announced")

    def prompts(self, tasks: Sequence[str], inputs: Mapping[str, Any]) -> list[str]:
        """Return the text of each observation, with tokens of the cameras that it has."""
        counts = _present_cameras(inputs, len(tasks))
        return [self.prompt(self._cut(task), count) for task, count in zip(tasks, counts, strict=True)]

    def prompt_words(self, task: str) -> str:
        """Return the instruction alone: pictures are never cut."""
        return task

    @property
    def special_tokens(self) -> int:
        """None: the conversation around the instruction is not counted."""
        return 0

    def encode(self, tasks: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return `input_ids` (b, n) and `attention_mask` (b, n), padded on the left to the longest."""
        encoded = self.tokenizer(
            self.prompts(tasks, inputs),
            padding="longest",
            padding_side=self.padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    @property
    def image_token_id(self) -> int:
        """The id of the token in whose place a picture's features stand."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def _cut(self, task: str) -> str:
        if self.max_instruction_tokens is None:
            return task
        ends = self.tokenizer(task, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return task if len(ends) <= self.max_instruction_tokens else task[: ends[self.max_instruction_tokens - 1][1]]


class EagleInstructionN1_5(EagleInstruction):
    """GR00T N1.5's: pictures are numbered, even a single one, and stand in one line with the instruction."""

    def announced(self, places: Sequence[str]) -> str:
        """Return `<image 1>` and its tokens, `<image 2>` …"""
        return "".join(f"<image {number}>{place}" for number, place in enumerate(places, start=1))


class EagleInstructionN1(EagleInstruction):
    """GR00T N1's: each picture has a line of its own, and a number where there are several."""

    def announced(self, places: Sequence[str]) -> str:
        """Return `<image 1>`, its tokens and a line break …; a single picture has no number."""
        if len(places) == 1:
            return f"{places[0]}\n"
        return "".join(f"<image {number}>{place}\n" for number, place in enumerate(places, start=1))


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


def _present_cameras(inputs: Mapping[str, Any], batch_size: int) -> list[int]:
    """Return how many pictures each observation has."""
    if "pixel_mask" in inputs:
        return inputs["pixel_mask"].sum(dim=1).tolist()
    return [inputs["pixel_values"].shape[1] if "pixel_values" in inputs else 0] * batch_size
