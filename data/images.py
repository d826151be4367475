"""Images kept in the data files as PNG or JPEG."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image


def encode_png(image: np.ndarray) -> bytes:
    """Return a uint8 image (h, w, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(value: Mapping) -> np.ndarray:
    """Return the image of a table's cell, `{"bytes": …}`, as uint8 (h, w, 3).

    Raises:
        OSError, TypeError: the cell holds no image.
    """
    with Image.open(io.BytesIO(value["bytes"])) as image:
        return np.array(image.convert("RGB"))
