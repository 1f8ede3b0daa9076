"""Batch norms of a run: freezing their statistics at some point, and estimating them anew before every evaluation.

A running statistic is an average over steps, each with other weights; with few levels a small step of the weights
moves what a layer returns a lot, so the average describes no model that ever was. Estimated anew, from batches that
pass the weights as they are, with equal weight each, it describes this one.

Source: "Rethinking 'Batch' in BatchNorm" (Wu, Johnson, 2021), https://arxiv.org/abs/2105.07576, section 3 (PreciseBN).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch.nn.modules.batchnorm import _BatchNorm

from daqconvert.errors import TrainingError
from daqconvert.posttraining import batch_norms, reestimate
from daqconvert.training.batching.loaders import read_batch
from daqconvert.training.batching.seeding import preserved_random_state
from daqconvert.training.recipes import Recipe
from daqconvert.training.run import Part, Run, steps_until


def _required(run: Run, field: str) -> list[_BatchNorm]:
    found = batch_norms(run.model)
    if not found:
        raise TrainingError(
            f"{field}: has no effect, for {type(run.model).__name__} has no batch norm with running statistics. "
            f"Leave {field} out."
        )
    return found


class FrozenBatchNorm(Part):
    """Keeps running statistics, and uses them, after the first `floor(batch_norm_freeze_at * total)` steps.

    Args:
        recipe: Gives `batch_norm_freeze_at`.
    """

    name: ClassVar[str] = "batch_norm"

    def __init__(self, recipe: Recipe) -> None:
        self.share = recipe.batch_norm_freeze_at
        self._frozen = False

    def start(self, run: Run) -> None:
        """Find out when that is.

        Raises:
            TrainingError: If the model has no batch norm, or the length of the run is unknown.
        """
        _required(run, "batch_norm_freeze_at")
        self._last = steps_until(run, self.share, "batch_norm_freeze_at")

    def before_epoch(self, run: Run, epoch: int) -> None:
        """Take notice that all modules are in training mode again."""
        self._frozen = False

    def before_step(self, run: Run, number: int) -> None:
        """Put batch norms in evaluation mode when it is time."""
        if number > self._last and not self._frozen:
            for module in batch_norms(run.model):
                module.eval()
            self._frozen = True


class FreshStatistics(Part):
    """Estimates running statistics once, from the first `reestimate` training batches, before the first step.

    For `batch_norm="freeze"`: what training uses from there on are statistics of the quantized model. At few bits
    those of the float model describe it badly; a teacher that is the float model has taken its own before.

    Args:
        recipe: Gives `reestimate`.
    """

    name: ClassVar[str] = "statistics"

    def __init__(self, recipe: Recipe) -> None:
        self.count = recipe.reestimate

    def start(self, run: Run) -> None:
        """Estimate, where there are batch norms; a run that is resumed takes those of its checkpoint after this.

        Not where blocks were reconstructed: their statistics were estimated then, and they were trained with them.
        """
        reconstructed = any(not row.left_alone for row in run.fitted.get("reconstruct", ()))
        if batch_norms(run.model) and not reconstructed:  # `fewshot` is for networks without them, too
            _estimate(run, 0, self.count)


class Reestimation(Part):
    """Estimates running statistics anew from the first `reestimate` training batches of the epoch.

    Training does not see it: afterwards the statistics are as they were, bit for bit. After the last epoch they stay.

    Args:
        recipe: Gives `reestimate`.
    """

    name: ClassVar[str] = "reestimation"

    def __init__(self, recipe: Recipe) -> None:
        self.count = recipe.reestimate

    def start(self, run: Run) -> None:
        """Check that there is something to estimate.

        Raises:
            TrainingError: If the model has no batch norm.
        """
        _required(run, "reestimate")

    @contextmanager
    def evaluating(self, run: Run) -> Iterator[None]:
        """Estimate, and give the statistics back afterwards."""
        buffers = [b for module in batch_norms(run.model) for b in module.buffers(recurse=False)]
        before = [buffer.clone() for buffer in buffers]
        try:
            _estimate(run, run.position.epoch, self.count)
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def finish(self, run: Run) -> None:
        """Estimate for the weights that the run ends with, from the batches of its last evaluation."""
        _estimate(run, run.epochs_done, self.count)


def _estimate(run: Run, epoch: int, count: int) -> None:
    """Estimate from the first batches of an epoch, the same on every process; random state is given back."""
    with preserved_random_state(run.train_loader):
        batches = itertools.islice(run.train_epochs.batches(epoch, whole=True), count)
        where, device = "train_loader (reestimate)", run.processes.device
        inputs = (read_batch(batch, device, where, needs_target=False)[0] for batch in batches)
        reestimate(run.model, inputs, autocast=run.processes.autocast)


def make_frozen_batch_norm(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `batch_norm_freeze_at` below 1, else None."""
    return FrozenBatchNorm(recipe) if recipe.batch_norm_freeze_at < 1.0 else None


def make_fresh_statistics(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `reestimate` and statistics that stay, else None."""
    return FreshStatistics(recipe) if recipe.reestimate and recipe.batch_norm == "freeze" else None


def make_reestimation(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `reestimate` and statistics that move, else None."""
    return Reestimation(recipe) if recipe.reestimate and recipe.batch_norm == "train" else None
