"""A run that writes everything it can to its directory, and what is read of its files."""

import csv

import pytest
from torch.utils.data import DataLoader

from daqconvert.training import finetune

TIMES = ("images_per_second", "seconds")
OPTIONS = {
    "epochs": 4,
    "checkpoint_steps": 7,
    "recipe": "quick",
    "oscillation": "freeze",
    "oscillation_threshold": 0.01,
}


class Stopped(Exception):
    """Ends a run in the middle of an epoch."""


def batches(loader):
    """Return batches for twelve steps in an epoch."""
    return DataLoader(loader().dataset, batch_size=4, shuffle=True)


def train(make, loader, val_loader, out, stop_at=None, **changes):
    """Train a small network that writes all it can to `out`; the step `stop_at` ends the run."""

    def on_step(step):
        if step.number == stop_at:
            raise Stopped

    options = OPTIONS | {"out_dir": out, "lr": 0.05, "clip_grad": 1.0} | changes
    model = make(2, first=(2, 8), last=(4, 8))
    return finetune(model, batches(loader), val_loader, on_step=on_step, **options)


def table(path):
    """Return the rows of a CSV file without what a clock measured."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def scalars(out):
    """Return what TensorBoard reads of a run: steps and values by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
