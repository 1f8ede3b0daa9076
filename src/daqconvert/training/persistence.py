"""How a run starts, goes on where it was interrupted, and saves itself.

Its state after an epoch is `last.safetensors`: tensors of model and optimizers, and `meta(run)`. `best.safetensors`
has the same form without optimizers; `teacher.safetensors` holds the model as it was before the first step, because a
model in memory may have been trained on since.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from daqconvert.calibration import calibrate, is_calibrated
from daqconvert.errors import TrainingError
from daqconvert.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    Checkpoint,
    check_model,
    first_few,
    layer_settings,
    model_tensors,
    read_checkpoint,
    write_checkpoint,
)
from daqconvert.training.loaders import UNLABELLED, check_first_batch, read_batch
from daqconvert.training.logs import write_log
from daqconvert.training.objective import NO_TEACHER, OWN_TEACHER, float_teacher
from daqconvert.training.optim import Optimizers
from daqconvert.training.seeding import seed_epoch

if TYPE_CHECKING:
    from daqconvert.training.engine import Run


def start(run: Run, *, resume: bool) -> None:
    """Bring model, teacher and optimizers into the state of the last checkpoint, or of step 0.

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
        if resume and run.directory.last.exists():
            checkpoint = read_checkpoint(run.directory.last)
            _check(run, checkpoint, str(run.directory.last))
    seed_epoch(run.recipe.seed, 0, run.train_loader, run.val_loader)
    if run.val_loader is not None:  # found now, not after an epoch
        check_first_batch(run.val_loader, "val_loader", needs_target=True)
    if checkpoint is None:
        _start_fresh(run)
    else:
        _restore(run, checkpoint)


def save(run: Run, *, best: bool = False) -> None:
    """Write the checkpoints and the log; `last` comes after `best`, so that it never speaks of a best that is not.

    Args:
        run: The run, after a whole epoch; without a directory nothing is written.
        best: Whether this epoch is the best so far.
    """
    if run.directory is None:
        return
    tensors, about = model_tensors(run.model), meta(run)
    if best:
        write_checkpoint(run.directory.best, tensors, about)
    state = {OPTIMIZER + key: value for key, value in run.optimizers.state_dict().items()}
    write_checkpoint(run.directory.last, {**tensors, **state}, about)
    write_log(run.directory.log, run.history)


def meta(run: Run) -> dict[str, Any]:
    """Return what a checkpoint says besides tensors.

    Args:
        run: The run.
    """
    return {
        "recipe": run.recipe.to_dict(),
        "layers": layer_settings(run.model),
        "steps_per_epoch": run.steps,
        "teacher": run.teacher_kind,
        "epochs_done": run.epochs_done,
        "history": run.history,
        "best": run.best,
    }


def _start_fresh(run: Run) -> None:
    if is_calibrated(run.model):
        needs_target = run.objective.needs_target
        check_first_batch(run.train_loader, "train_loader", needs_target=needs_target, hint=UNLABELLED)
    else:
        count = min(run.recipe.calibration_batches, run.steps or run.recipe.calibration_batches)
        batches = _calibration_batches(run)
        run.calibration = calibrate(run.model, batches, method=run.recipe.calibration_method, max_batches=count)
    if run.teacher_kind == OWN_TEACHER:
        run.objective.teacher = float_teacher(run.model)
    run.optimizers = _optimizers(run)
    if run.directory is None:
        return
    run.directory.clear()
    run.directory.write_recipe(run.recipe)
    if run.teacher_kind == OWN_TEACHER:
        write_checkpoint(run.directory.teacher, model_tensors(run.model), meta(run))
    save(run)


def _calibration_batches(run: Run) -> Iterator[Any]:
    for i, batch in enumerate(run.train_loader):
        if i == 0:
            cpu, needs_target = torch.device("cpu"), run.objective.needs_target
            read_batch(batch, cpu, "train_loader, first batch", needs_target=needs_target, hint=UNLABELLED)
        yield batch


def _optimizers(run: Run) -> Optimizers:
    return Optimizers(run.model, run.recipe, run.recipe.epochs * run.steps)


def _restore(run: Run, checkpoint: Checkpoint) -> None:
    assert run.directory is not None  # there is a checkpoint
    if run.teacher_kind == OWN_TEACHER:
        saved = read_checkpoint(run.directory.teacher)
        check_model(saved, run.model, str(run.directory.teacher))
        run.objective.teacher = float_teacher(run.model)
        run.objective.teacher.load_state_dict(saved.part(MODEL))
    run.model.load_state_dict(checkpoint.part(MODEL))
    run.optimizers = _optimizers(run)
    run.optimizers.load_state_dict(checkpoint.part(OPTIMIZER))
    run.history, run.best = list(checkpoint.meta["history"]), checkpoint.meta["best"]
    write_log(run.directory.log, run.history)


def _check(run: Run, checkpoint: Checkpoint, where: str) -> None:
    """Raise `TrainingError` unless the checkpoint is of this very run."""
    now, then = run.recipe.to_dict(), checkpoint.meta["recipe"]
    problems = [
        f"{key}: {then.get(key)!r} in the run, {now.get(key)!r} now"
        for key in sorted(now.keys() | then.keys())
        if key != "name" and now.get(key) != then.get(key)
    ]
    batches, teacher = checkpoint.meta["steps_per_epoch"], checkpoint.meta["teacher"]
    if batches != run.steps:
        problems.append(f"train_loader: {batches} batches in the run, {run.steps} now")
    if teacher != run.teacher_kind:
        problems.append(f"teacher: {_teacher(teacher)} in the run, {_teacher(run.teacher_kind)} now")
    if problems:
        raise TrainingError(
            f"{where}: belongs to another run: {first_few(problems, 5)}. Pass what the run was started with, or "
            "overwrite=True to start again."
        )
    check_model(checkpoint, run.model, where)


def _teacher(kind: str) -> str:
    words = {NO_TEACHER: "none", OWN_TEACHER: "the model's own float copy"}
    return words.get(kind, f"one passed (weights {kind[:8]})")
