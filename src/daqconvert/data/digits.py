"""scikit-learn's handwritten digits: 1797 real scans of 8 x 8 pixels, in its wheel, so no download is needed.

Pixels 0..16 are divided by 16, enlarged bilinearly by a whole factor (4 by default: 32 x 32, what a small timm network
takes with its stem's strides), and normalized with `MEAN` and `STD`, measured on the pixels of the default training
split.
Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (1998), UCI machine learning repository.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from daqconvert.errors import DataError

SIDE = 8
HELD_OUT = 450
MEAN, STD = 0.305, 0.324


@dataclass(frozen=True)
class Digits:
    """The two splits: images `(N, channels, size, size)` float32, labels `(N,)` int64, and the rows they came from."""

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    train_rows: tuple[int, ...]
    val_rows: tuple[int, ...]


def load_digits(size: int = 32, channels: int = 1, held_out: int = HELD_OUT, seed: int = 0) -> Digits:
    """Return the digits, split by a seeded choice that keeps the share of every class.

    Args:
        size: Side of the images, a multiple of 8.
        channels: 1, or more for a network that takes colour: copies of the one.
        held_out: Number of images kept away from training.
        seed: Seed of the split.

    Raises:
        DataError: If scikit-learn is missing or the size is no multiple of 8.

    Example:
        >>> load_digits().train_images.shape
        torch.Size([1347, 1, 32, 32])
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("The digits need scikit-learn. Run pip install 'daqconvert[demo]'.") from error
    if size < SIDE or size % SIDE:
        raise DataError(f"Digits can be had in multiples of {SIDE} pixels, not {size}.")
    found = datasets.load_digits()
    labels = torch.from_numpy(found.target).long()
    images = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
    images = F.interpolate(images, scale_factor=size // SIDE, mode="bilinear", align_corners=False)
    images = images.sub(MEAN).div(STD).repeat(1, channels, 1, 1)
    rows = list(range(len(labels)))
    train, val = train_test_split(rows, test_size=held_out, stratify=found.target, random_state=seed)
    return Digits(images[train], labels[train], images[val], labels[val], tuple(train), tuple(val))
