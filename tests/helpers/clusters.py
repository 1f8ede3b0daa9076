"""Points around three centres, and a network with batch norm and dropout that learns them in a few epochs."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import daqconvert as dq

FEATURES, CLASSES = 8, 3


class Clusters(Dataset):
    """Points around three centres; `noise` is drawn anew at every access, from torch, numpy and `random`."""

    def __init__(self, count: int = 48, noise: float = 0.0, targets: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % CLASSES
        centres = 2.0 * torch.randn(CLASSES, FEATURES, generator=generator)
        self.points = centres[self.labels] + torch.randn(count, FEATURES, generator=generator)
        self.noise, self.targets = noise, targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | tuple[Tensor]:
        draws = torch.randn(FEATURES) + float(np.random.randn()) + random.gauss(0.0, 1.0)
        point = self.points[index] + self.noise * draws
        return (point, self.labels[index]) if self.targets else (point,)


class Breaking(DataLoader):
    """A loader that raises `error` before the second batch of pass `at_pass`; calibration may be the first pass."""

    error: BaseException | None = None
    at_pass = 0
    passes = 0

    def __iter__(self):
        self.passes += 1
        for i, batch in enumerate(super().__iter__()):
            if i == 1 and self.passes == self.at_pass and self.error is not None:
                raise self.error
            yield batch


def float_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(FEATURES, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, CLASSES),
        )


def quantized_model(bits: int = 2, **settings) -> nn.Module:
    return dq.quantize(float_model(), w_bits=bits, a_bits=bits, **settings)


def make_loader(kind: type = DataLoader, *, noise: float = 0.0, shuffle: bool = True, **options) -> DataLoader:
    return kind(Clusters(noise=noise), batch_size=16, shuffle=shuffle, **options)
