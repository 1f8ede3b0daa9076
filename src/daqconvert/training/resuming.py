"""What is checked before a run goes on: that its checkpoint is whole, and of this very run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daqconvert.errors import TrainingError
from daqconvert.training.batching.loaders import length
from daqconvert.training.checkpoint import Checkpoint, check_model, first_few, read_checkpoint
from daqconvert.training.objective import NO_TEACHER, OWN_TEACHER
from daqconvert.training.recipes import completed
from daqconvert.training.rundir import RunDirectory

if TYPE_CHECKING:
    from daqconvert.training.engine import Run


def last_of(directory: RunDirectory | None) -> Checkpoint | None:
    """Return the last checkpoint of a run directory, or None where there is none.

    Args:
        directory: Of the run.

    Raises:
        TrainingError: If it is damaged or gone; names the newest earlier one that is good, and what to type.
    """
    if directory is None or not (directory.last.exists() or directory.kept()):
        return None
    try:
        return read_checkpoint(directory.last)
    except TrainingError as error:
        good = _newest_good(directory)
        if good is None:
            raise
        raise TrainingError(
            f"{error} {good} is whole: to go on from there, cp {good} {directory.last}, then resume=True."
        ) from None


def _newest_good(directory: RunDirectory) -> str | None:
    for path in directory.kept():
        try:
            read_checkpoint(path)
        except TrainingError:
            continue
        return str(path)
    return None


def teacher_of(run: Run) -> Checkpoint:
    """Return the checkpoint that holds the run's own teacher.

    Args:
        run: The run.

    Raises:
        TrainingError: If it is damaged or does not fit.
    """
    assert run.directory is not None
    saved = read_checkpoint(run.directory.teacher)
    check_model(saved, run.model, str(run.directory.teacher), run.layers)
    return saved


def check_run(run: Run, checkpoint: Checkpoint) -> None:
    """Raise unless a checkpoint is of this very run.

    Args:
        run: The run, before anything of it is changed.
        checkpoint: Its last one.

    Raises:
        TrainingError: Naming what differs.
    """
    assert run.directory is not None
    about, where = checkpoint.meta, str(run.directory.last)
    if "position" not in about:
        raise TrainingError(
            f"{where}: was written by an earlier version, and holds the model alone as far as this one can tell. Load "
            "it with load_weights, or start again with overwrite=True."
        )
    now, then = run.recipe.to_dict(), completed(about["recipe"])
    problems = [
        f"{key}: {then.get(key)!r} in the run, {now.get(key)!r} now"
        for key in sorted(now.keys() | then.keys())
        if key != "name" and now.get(key) != then.get(key)
    ]
    batches, teacher = about["batches_per_epoch"], about["teacher"]
    if batches != (length(run.train_loader) or 0):
        problems.append(f"train_loader: {batches} batches in the run, {length(run.train_loader) or 0} now")
    processes = run.processes
    launch = {"processes": processes.count, "precision": processes.precision, "accumulate": run.accumulate}
    problems += [
        f"{key}: {about[key]!r} in the run, {value!r} now"
        for key, value in launch.items()
        if about[key] != value and now.get(key) == then.get(key)
    ]
    if teacher != run.teacher_kind:
        problems.append(f"teacher: {_teacher(teacher)} in the run, {_teacher(run.teacher_kind)} now")
    if problems:
        raise TrainingError(
            f"{where}: belongs to another run: {first_few(problems, 5)}. Pass what the run was started with, or "
            "overwrite=True to start again."
        )
    check_model(checkpoint, run.model, where, run.layers)


def _teacher(kind: str) -> str:
    words = {NO_TEACHER: "none", OWN_TEACHER: "the model's own float copy"}
    return words.get(kind, f"one passed (weights {kind[:8]})")
