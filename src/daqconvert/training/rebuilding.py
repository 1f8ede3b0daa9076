"""Block reconstruction before the first step of a run, from its own training batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from daqconvert.posttraining import reconstruct
from daqconvert.training.batching.seeding import preserved_random_state
from daqconvert.training.noting import note
from daqconvert.training.objective.features import block_names

if TYPE_CHECKING:
    from daqconvert.training.engine import Run


def reconstruct_blocks(run: Run, teacher: nn.Module) -> None:
    """Train block after block of a run's model towards the float model, `reconstruct` steps each.

    Args:
        run: Calibrated; its model is changed in place, the same on every process.
        teacher: A float copy of the model from before its weights were changed.
    """
    recipe = run.recipe
    with preserved_random_state(run.train_loader):
        batches = list(itertools.islice(_batches(run), recipe.reconstruct_batches))
        names = block_names(run.model)
        rows = reconstruct(run.model, teacher, batches, names, recipe.reconstruct, seed=recipe.seed, show=run.show)
    note(run, "reconstruct", "blocks stay as they are", rows)
    run.processes.agree(run.model)


def _batches(run: Run) -> Iterator[Any]:
    """Batches of one epoch after the other: what is augmented differs."""
    for epoch in itertools.count():
        empty = True
        for batch in run.train_epochs.batches(epoch, whole=True):
            empty = False
            yield batch
        if empty:
            return
