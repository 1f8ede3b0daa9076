"""Images as files hold them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

TWO_SPLITS = {"train/cat": 5, "train/dog": 4, "val/cat": 2, "val/dog": 3}
"""Images of each class for training and for validation, for the fixture `make_folder`."""


def jpeg(seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """Bytes of one JPEG of random pixels, `size` as (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()
