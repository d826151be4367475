"""PI0Processor: pictures of one size, instructions in PaliGemma's tokens, states and actions padded to one width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812  (torch's own convention)

from ..configuration.features import FeatureType
from ..configuration.pi0 import PI0PolicyConfig
from .padding import PaddingProcessor
from .registry import register_processor


class PI0Processor(PaddingProcessor):
    """Prepare observations for π0, and take the padding off its chunks.

    Pictures of any size are resized, padded and brought from [0, 1] to [-1, 1]. States and actions are normalised in
    their own width, then padded with zeros: the policy itself sees padded widths only.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): PaliGemma's.
        image_resolution (`tuple[int, int]`): height and width of the pictures that the network sees.
        image_padding (`str`, *optional*, defaults to `"centered"`): or `"top_left"`, see `PI0PolicyConfig`.
        clean_instructions (`bool`, *optional*, defaults to False): trim instructions, and read underscores and line
            breaks in them as spaces, as openpi does and LeRobot does not.
        kwargs: what `PaddingProcessor` takes.
    """

    compared_fields: ClassVar[tuple[str, ...]] = (
        *PaddingProcessor.compared_fields,
        "image_resolution",
        "image_padding",
    )

    # transformers finds what has files of its own, the tokenizer, by the names in this signature.
    def __init__(
        self,
        tokenizer=None,
        image_resolution=(224, 224),
        image_padding="centered",
        clean_instructions=False,
        **kwargs,
    ):
        super().__init__(tokenizer=tokenizer, **kwargs)
        self.image_resolution = list(image_resolution)
        self.image_padding = image_padding
        self.clean_instructions = clean_instructions

    @classmethod
    def from_config(cls, config: PI0PolicyConfig, statistics: Mapping | None = None, **kwargs: Any) -> PI0Processor:
        """Build the processor of a policy's config; see `LanguageProcessor.from_config`."""
        return super().from_config(
            config,
            statistics,
            image_resolution=config.image_resolution,
            image_padding=config.image_padding,
            **kwargs,
        )

    def prompt(self, task: str) -> str:
        """Return the instruction and a line break, by which PaliGemma knows that it ends."""
        if self.clean_instructions:
            task = task.strip().replace("_", " ").replace("\n", " ")
        return task if task.endswith("\n") else f"{task}\n"

    def encode(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return what the network sees: (b, 3, h, w) in [-1, 1] for a camera, (…, width) padded for a vector."""
        x = super().encode(name, x)
        feature = (self.input_features | self.output_features)[name]
        if feature.type is FeatureType.VISUAL:
            return resize_with_padding(x, *self.image_resolution, centered=self.image_padding == "centered") * 2 - 1
        return x

    def absent_picture(self, name: str) -> torch.Tensor:
        """Return a black picture (3, h, w): -1 everywhere."""
        return torch.full((3, *self.image_resolution), -1.0)


def resize_with_padding(images: torch.Tensor, height: int, width: int, centered: bool = True) -> torch.Tensor:
    """Return pictures (b, c, h, w) in [0, 1] at another size, their aspect kept and the rest black.

    The black is on both sides, or, not `centered`, above and to the left.

    Bilinear and without smoothing, as openpi's PyTorch port and LeRobot do, so that trained weights see what they
    were trained on. Source: openpi's `resize_with_pad`.
    """
    h, w = images.shape[-2:]
    if (h, w) == (height, width):
        return images
    ratio = max(w / width, h / height)
    new_h, new_w = int(h / ratio), int(w / ratio)
    resized = F.interpolate(images, size=(new_h, new_w), mode="bilinear", align_corners=False).clamp(0, 1)
    top, left = height - new_h, width - new_w
    if centered:
        top, left = top // 2, left // 2
    return F.pad(resized, (left, width - new_w - left, top, height - new_h - top))


register_processor(PI0PolicyConfig.model_type, PI0Processor)
