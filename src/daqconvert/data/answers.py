"""Labels where there are none: what a model answers for each image, so that others can be measured against it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from daqconvert.batches import model_device
from daqconvert.data.images import Loaders
from daqconvert.models import evaluating


class Answered(Dataset[tuple[Any, int]]):
    """A data set whose labels are somebody's answers.

    Args:
        images: A data set of `(image, label)`.
        answers: `(N,)` int64.
    """

    def __init__(self, images: Dataset[Any], answers: Tensor) -> None:
        self.images = images
        self.answers = answers

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index][0], int(self.answers[index])


def answered_by(model: nn.Module, loaders: Loaders) -> Loaders:
    """Return loaders whose `val` has a model's answers as labels; unchanged where its images have labels.

    Args:
        model: Returns logits `(N, C)`.
        loaders: Of the data.

    Example:
        >>> from daqconvert.data import create_loaders
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        >>> digits = dataclasses.replace(create_loaders(None, model, batch_size=450), val_labelled=False)
        >>> images, answers = next(iter(answered_by(model, digits).val))
        >>> bool((model(images).argmax(1) == answers).all())
        True
    """
    if loaders.val_labelled:
        return loaders
    device, val = model_device(model), loaders.val
    with evaluating(model), torch.no_grad():
        answers = torch.cat([model(images.to(device)).argmax(dim=1).cpu() for images, _ in val])
    answered = DataLoader(
        Answered(val.dataset, answers), val.batch_size, num_workers=val.num_workers, pin_memory=val.pin_memory
    )
    text = f"{loaders.description}; labels to measure by: the float model's answers"
    return dataclasses.replace(loaders, val=answered, description=text)
