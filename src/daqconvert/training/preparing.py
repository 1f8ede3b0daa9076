"""GPTQ before the first step of a run: the weights' levels are chosen from inputs of its own training batches.

What a few hundred images teach many weights by gradients is soon learned by heart. Second moments of the inputs are
another matter: every position of every image counts, and each layer is a small problem of its own. After it, steps are
for what is left: norms, scales, bounds.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from daqconvert.posttraining import choose_codes
from daqconvert.training.batching.seeding import preserved_random_state
from daqconvert.training.noting import note
from daqconvert.training.objective.features import block_names

if TYPE_CHECKING:
    from daqconvert.training.engine import Run


def round_weights(run: Run) -> None:
    """Choose the weights' levels from the first `gptq` training batches, the same on every process.

    Layers that GPTQ is not for keep their nearest levels; a warning names them and says why.

    Args:
        run: Calibrated, its teacher made; its model is changed in place.
    """
    with preserved_random_state(run.train_loader):
        batches = list(itertools.islice(run.train_epochs.batches(0, whole=True), run.recipe.gptq))
    rows = choose_codes(run.model, batches, block_names(run.model), show=run.show)
    note(run, "gptq", "layers keep the nearest levels of their weights", rows)
    run.processes.agree(run.model)
