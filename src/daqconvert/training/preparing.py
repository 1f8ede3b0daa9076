"""GPTQ before the first step of a run: the weights' levels are chosen from inputs of its own training batches.

What a few hundred images teach many weights by gradients is soon learned by heart. Second moments of the inputs are
another matter: every position of every image counts, and each layer is a small problem of its own. After it, steps are
for what is left: norms, scales, bounds.

Block reconstruction before the first step of a run, from its own training batches.

What was fitted before the first step of a run: kept with it, and no layer is left alone in silence.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.calibration import calibrate, is_calibrated
from daqconvert.models import float_copy
from daqconvert.posttraining import block_names, choose_codes, reconstruct
from daqconvert.report.fits import Fitted
from daqconvert.training.batching.loaders import UNLABELLED, check_first_batch, length, read_batch
from daqconvert.training.batching.seeding import preserved_random_state
from daqconvert.training.checkpoint import (
    model_tensors,
    write_checkpoint,
)
from daqconvert.training.objective import OWN_TEACHER
from daqconvert.training.run import Run
from daqconvert.training.saving import check_run, last_of, make_optimizers_and_parts, meta, model_copy, restore, save


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


LOGGER = logging.getLogger(__name__)
SHOWN = 3


def note(run: Run, field: str, what: str, rows: list[Fitted]) -> None:
    """Keep what became of each for the report, and warn, once for all processes, of what was left alone.

    Args:
        run: Whose main process warns: how many of how many, the first names, and why.
        field: Of the recipe.
        what: Becomes of what was left alone, as `"layers keep their levels"`.
        rows: Of all.
    """
    run.fitted[field] = rows
    left = [row for row in rows if row.left_alone]
    if left and run.processes.is_main:
        names = ", ".join(f"{row.name} ({row.left_alone})" for row in left[:SHOWN])
        more = ", ..." if left[SHOWN:] else ""
        LOGGER.warning("%s: %d of %d %s: %s%s.", field, len(left), len(rows), what, names, more)


def start(run: Run, *, resume: bool) -> None:
    """Bring model, teacher, optimizers and parts into the state of the last checkpoint, or of step 0.

    Args:
        run: Fresh, changed in place.
        resume: Go on with the checkpoint in its directory, if there is one.

    Raises:
        TrainingError: If the checkpoint is damaged or of another run; nothing is changed then.
        DataError: If a loader is empty or its first batch has not the right form.
        CalibrationError: If the data cannot calibrate the model.
    """
    checkpoint = None
    if run.directory is not None:
        model_tensors(run.model)  # raises if the model has state that a checkpoint cannot hold
        if resume:
            checkpoint = run.processes.from_main(lambda: last_of(run.directory))
    if checkpoint is not None:
        check_run(run, checkpoint)
    if run.val_epochs is not None:  # found now, not after an epoch
        check_first_batch(run.val_epochs.batches(0, whole=True), "val_loader", needs_target=True)
    if checkpoint is None:
        _start_fresh(run)
    else:
        restore(run, checkpoint)


def _start_fresh(run: Run) -> None:
    if is_calibrated(run.model):
        needs_target = run.objective.needs_target
        batches = run.train_epochs.batches(0, whole=True)
        check_first_batch(batches, "train_loader", needs_target=needs_target, hint=UNLABELLED)
    else:
        most = run.recipe.calibration_batches
        count = min(most, length(run.train_loader) or most)
        batches = _calibration_batches(run)
        run.calibration = calibrate(
            run.model, batches, method=run.recipe.calibration_method, max_batches=count, progress=run.show
        )
    run.processes.agree(run.model)
    if run.teacher_kind == OWN_TEACHER:
        run.objective.teacher = float_copy(run.model)
    initial = model_copy(run) if run.teacher_kind == OWN_TEACHER else {}
    before = None
    if run.recipe.reconstruct:  # weights that GPTQ has not changed teach
        before = run.objective.teacher if run.teacher_kind == OWN_TEACHER else float_copy(run.model)
    if run.recipe.gptq:
        round_weights(run)
    if before is not None:
        reconstruct_blocks(run, before)
    make_optimizers_and_parts(run)
    if run.directory is None:
        return
    about = meta(run)
    run.processes.from_main(lambda: _write_start(run, initial, about))
    save(run)


def _write_start(run: Run, initial: dict[str, Tensor], about: dict[str, Any]) -> None:
    assert run.directory is not None
    run.directory.clear()
    run.directory.write_recipe(run.recipe)
    if run.teacher_kind == OWN_TEACHER:
        write_checkpoint(run.directory.teacher, initial, about)


def _calibration_batches(run: Run) -> Iterator[Any]:
    """The first batches, the same on every process."""
    for i, batch in enumerate(run.train_epochs.batches(0, whole=True)):
        if i == 0:
            cpu, needs_target = torch.device("cpu"), run.objective.needs_target
            read_batch(batch, cpu, "train_loader, first batch", needs_target=needs_target, hint=UNLABELLED)
        yield batch
