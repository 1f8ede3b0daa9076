"""Batch norms of a run: freezing their statistics at some point, and estimating them anew before every evaluation.

A running statistic is an average over many steps. With few levels, a small step of the weights changes a layer's
output a lot, so the average describes none of the models that it was taken from. Statistics that are estimated anew,
with the weights as they are and all batches counting alike, describe the present model.

Source: "Rethinking 'Batch' in BatchNorm" (Wu, Johnson, 2021), https://arxiv.org/abs/2105.07576, section 3 (PreciseBN).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import nn

from daqconvert.errors import TrainingError
from daqconvert.posttraining import batch_norms, reestimate
from daqconvert.seeding import preserved_random_state
from daqconvert.training.batching.epochs import Epochs
from daqconvert.training.batching.loaders import read_batch
from daqconvert.training.parts.scheduled import steps_until
from daqconvert.training.processes import Processes
from daqconvert.training.run import Part


class FrozenBatchNorm(Part):
    """After a share of the run's steps, normalizes with the running statistics and does not update them any more."""

    name: ClassVar[str] = "batch_norm"

    def __init__(self, model: nn.Module, total: int, share: float) -> None:
        self.model, self.total, self.share = model, total, share
        self._frozen = False

    def start(self) -> None:
        """Compute the last step that updates the statistics.

        Raises:
            TrainingError: If the model has no batch norm, or the length of the run is unknown.
        """
        _require_batch_norms(self.model, "batch_norm_freeze_at")
        self._last = steps_until(self.share, self.total, "batch_norm_freeze_at")

    def before_epoch(self, epoch: int) -> None:
        """Note that all modules are in training mode again."""
        self._frozen = False

    def before_step(self, number: int) -> None:
        """Put batch norms in evaluation mode when it is time."""
        if number > self._last and not self._frozen:
            for module in batch_norms(self.model):
                module.eval()
            self._frozen = True


class FreshStatistics(Part):
    """Estimates running statistics once, from the first training batches, before the first step.

    For `batch_norm="freeze"`: training then uses statistics of the quantized model. At few bits those of the float
    model describe it badly. A teacher that is a float copy of the model was made before, and keeps the float ones.

    Args:
        model: The model in training.
        epochs: The batches to train on.
        processes: The processes of the run.
        count: Number of batches to estimate from.
        wanted: Whether to estimate; False where blocks were reconstructed, because reconstruction has estimated the
            statistics and trained the blocks with them.
    """

    name: ClassVar[str] = "statistics"

    def __init__(self, model: nn.Module, epochs: Epochs, processes: Processes, count: int, *, wanted: bool) -> None:
        self.model, self.epochs, self.processes, self.count, self.wanted = model, epochs, processes, count, wanted

    def start(self) -> None:
        """Estimate, if there are batch norms; a resumed run loads the statistics of its checkpoint after this."""
        if self.wanted and batch_norms(self.model):  # `fewshot` is for networks without them, too
            _estimate(self.model, self.epochs, self.processes, 0, self.count)


class Reestimation(Part):
    """Estimates running statistics anew, from the first training batches of the epoch, before its evaluation.

    Training is not affected: after the evaluation the statistics are as they were, bit for bit. After the last epoch
    the model keeps the estimated ones.

    Args:
        model: The model in training.
        epochs: The batches to train on.
        processes: The processes of the run.
        count: Number of batches to estimate from.
    """

    name: ClassVar[str] = "reestimation"

    def __init__(self, model: nn.Module, epochs: Epochs, processes: Processes, count: int) -> None:
        self.model, self.epochs, self.processes, self.count = model, epochs, processes, count
        self._epoch = 0

    def start(self) -> None:
        """Check that there is something to estimate.

        Raises:
            TrainingError: If the model has no batch norm.
        """
        _require_batch_norms(self.model, "reestimate")

    def before_epoch(self, epoch: int) -> None:
        """Note the epoch whose batches are taken."""
        self._epoch = epoch

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Estimate, and restore the statistics afterwards."""
        buffers = [b for module in batch_norms(self.model) for b in module.buffers(recurse=False)]
        before = [buffer.clone() for buffer in buffers]
        try:
            self.finish()
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def finish(self) -> None:
        """Estimate for the weights as they are, from the batches of the epoch."""
        _estimate(self.model, self.epochs, self.processes, self._epoch, self.count)


def _estimate(model: nn.Module, epochs: Epochs, processes: Processes, epoch: int, count: int) -> None:
    """Estimate from the first batches of an epoch, the same on every process; the random state is restored."""
    with preserved_random_state(epochs.loader):
        batches = itertools.islice(epochs.batches(epoch, whole=True), count)
        where, device = "train_loader (reestimate)", processes.device
        inputs = (read_batch(batch, device, where, needs_target=False, model=model)[0] for batch in batches)
        reestimate(model, inputs, autocast=processes.autocast)


def _require_batch_norms(model: nn.Module, field: str) -> None:
    """Raise if a field of the recipe has no effect because the model has no batch norm."""
    if not batch_norms(model):
        raise TrainingError(
            f"{field}: has no effect, because {type(model).__name__} has no batch norm with running statistics. "
            f"Leave {field} out."
        )
