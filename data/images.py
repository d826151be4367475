"""Images kept in the data files as PNG or JPEG."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

# What Pillow and a cell of another form raise.
NOT_AN_IMAGE = (OSError, TypeError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError)
_MORE_THAN_EIGHT_BITS = ("I", "F")  # how Pillow's modes begin


def encode_png(image: np.ndarray) -> bytes:
    """Return a uint8 image (h, w, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(value: Mapping | bytes) -> np.ndarray:
    """Return the image of a table's cell, `{"bytes": …}` or the bytes, as uint8 (h, w, 3).

    Raises:
        one of `NOT_AN_IMAGE`: the cell holds no image, or numbers that are no colours: depth, in more than eight bits.
    """
    with Image.open(io.BytesIO(value if isinstance(value, bytes) else value["bytes"])) as image:
        if image.mode.startswith(_MORE_THAN_EIGHT_BITS):
            raise ValueError(f"it has the mode {image.mode} of numbers with more than eight bits, such as depth")
        return np.array(image.convert("RGB"))
