"""Pictures inside a prompt: which are real, how patches become tokens, and where those stand.

Shapes: b batch, v cameras, m real pictures of the whole batch, k tokens per picture, n tokens of a prompt, d width.
"""

from __future__ import annotations

import torch

from ...errors import FeatureShapeError, ImageTokenError


def real_pictures(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the real pictures (m, 3, h, w), sample by sample, in the cameras' order; when compiled, others behind.

    Args:
        pixel_values: (b, v, 3, h, w), or (m, 3, h, w), which is returned as it is.
        pixel_mask: (b, v) bool, False where a camera is absent.

    Raises:
        FeatureShapeError: the two do not belong together.
    """
    if pixel_values.ndim == 4 and pixel_mask is None:
        return pixel_values
    if pixel_values.ndim != 5:
        raise FeatureShapeError("pixel_values", tuple(pixel_values.shape), "(batch, cameras, 3, height, width)")
    if pixel_mask is None:
        return pixel_values.flatten(0, 1)
    if pixel_mask.shape != pixel_values.shape[:2]:
        raise FeatureShapeError("pixel_mask", tuple(pixel_mask.shape), f"{tuple(pixel_values.shape[:2])}")
    if torch.compiler.is_compiling():  # shapes must not depend on values: the others follow, and find no token
        order = pixel_mask.flatten().logical_not().to(torch.int8).argsort(stable=True)
        return pixel_values.flatten(0, 1)[order]
    return pixel_values[pixel_mask.bool()]


def pixel_shuffle(patches: torch.Tensor, stack: int) -> torch.Tensor:
    """Return every `stack` × `stack` patches of a square picture as one token, rows first as the patches were.

    A token's channels are those of its patches, row after row of the little square: version 2 of Eagle's shuffle.

    Args:
        patches: (m, side · side, c).

    Returns:
        (m, side / stack · side / stack, stack · stack · c).
    """
    side = round(patches.shape[1] ** 0.5)
    x = patches.unflatten(1, (side // stack, stack, side // stack, stack))  # (m, rows, down, columns, across, c)
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def place_pictures(
    words: torch.Tensor, pictures: torch.Tensor, input_ids: torch.Tensor, image_token_id: int
) -> torch.Tensor:
    """Return the prompt's embeddings (b, n, d) with the pictures' tokens where the image tokens are.

    Args:
        words: (b, n, d).
        pictures: (m, k, d), in the order of their tokens.
        input_ids: (b, n).
        image_token_id: which of them are image tokens.

    Raises:
        ImageTokenError: they are not k for each picture, or a prompt ends inside a picture.
    """
    is_image = input_ids == image_token_id  # (b, n)
    m, k = pictures.shape[:2]
    if not torch.compiler.is_compiling():  # counting waits for the device; a compiled policy has been counted before
        counts = is_image.sum(dim=1).tolist()
        if sum(counts) != m * k or any(count % k for count in counts):
            raise ImageTokenError(counts, image_token_id, m, k)
    return words.masked_scatter(is_image[..., None], pictures.to(words.dtype))
