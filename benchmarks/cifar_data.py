"""CIFAR-10 from a parquet file, decoded once into memory; crop and flip on whole batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from daqconvert.data.parquet import ParquetImages

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 5000


class TensorBatches:
    """Batches of one split, an epoch each time it is iterated; its randomness is torch's global generator.

    Args:
        images: uint8 `(N, H, W, 3)`.
        labels: int64 `(N,)`.
        batch_size: Images a batch; a training split drops the last, smaller one.
        train: Shuffle, pad by 4 and crop, flip.
        device: Where the images lie and the batches come from.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, train: bool, device: str = "cpu") -> None:
        mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
        self.images = ((images.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(device)
        self.labels, self.batch_size, self.train = labels.to(device), batch_size, train

    def __len__(self) -> int:
        count = len(self.labels)
        return count // self.batch_size if self.train else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.train else torch.arange(len(self.labels))
        for i in range(len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size].to(self.images.device)
            x = self.images[index]
            yield (augment(x) if self.train else x), self.labels[index]


def augment(x: Tensor) -> Tensor:
    """Random crop after padding by 4 zeros, and random flip, each image its own; the same on every device."""
    n, _, h, w = x.shape
    flip = (torch.rand(n) < 0.5).to(x.device)
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    rows = (torch.randint(0, 9, (n, 1)) + torch.arange(h)).to(x.device)
    columns = (torch.randint(0, 9, (n, 1)) + torch.arange(w)).to(x.device)
    index = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def cifar10(
    path: str | Path, batch_size: int, device: str = "cpu", first: int = 0
) -> tuple[TensorBatches, TensorBatches]:
    """Return training batches (all but the last 5,000 rows, or the `first` so many) and held-out batches (those)."""
    data = ParquetImages(path, cache=True)
    images, labels = data._cache, data.labels
    assert images is not None
    split = len(labels) - HELD_OUT
    used = min(first or split, split)
    return (
        TensorBatches(images[:used], labels[:used], batch_size, train=True, device=device),
        TensorBatches(images[split:], labels[split:], 500, train=False, device=device),
    )
