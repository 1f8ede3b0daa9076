"""Training of the float model that a run starts from, where nobody trained it before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from daqconvert.errors import TrainingError
from daqconvert.report.progress import progress

LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05


def train_float(model: nn.Module, loader: Any, epochs: int, seed: int) -> None:
    """Train a model in place, with AdamW and one cycle of the learning rate, and leave it in evaluation mode.

    Args:
        model: The model.
        loader: Batches `(images, labels)`.
        epochs: Passes over them.
        seed: Of order and augmentation.

    Raises:
        TrainingError: If the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    torch.manual_seed(seed)
    model.train()
    with progress(steps, "training in float") as bar:
        for _ in range(epochs):
            for images, labels in loader:
                loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                value = loss.item()
                if value != value:
                    raise TrainingError(
                        "Training in float: the loss is not a number. Give --checkpoint or --pretrained."
                    )
                bar.advance(loss=value)
    model.eval()
