"""How a run is written to its directory, and how it is resumed from there.

The state of a run is `last.safetensors`: tensors of model, optimizers and parts, and `meta(run)`. `best.safetensors`
has the same form, but its tensors are those of the model alone, as it was evaluated. `teacher.safetensors` holds the
model as it was before the first step: a resumed run cannot take its teacher from a model that has been trained since.
Before a run is resumed, `check_run` makes sure that the checkpoint belongs to this very run.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from daqconvert.errors import TrainingError, first_few
from daqconvert.models import float_copy
from daqconvert.report.fits import Fitted
from daqconvert.training.batching.loaders import length
from daqconvert.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    PART,
    Checkpoint,
    check_model,
    model_tensors,
    read_checkpoint,
    write_checkpoint,
)
from daqconvert.training.objective import NO_TEACHER, OWN_TEACHER
from daqconvert.training.optim import Optimizers
from daqconvert.training.parts.assembly import parts_for
from daqconvert.training.recipes import completed
from daqconvert.training.run import Position, Run
from daqconvert.training.rundir import RunDirectory, kept, write_log
from daqconvert.training.signals import Terminated


def save(run: Run, *, best: dict[str, Tensor] | None = None) -> None:
    """Write the checkpoints and the log after a step or an epoch; without a directory do nothing.

    All processes have to call this, and the main one writes. `best` holds the model's tensors if this epoch is the
    best so far. It is written before `last`, so that `last` never names a best epoch whose file is missing.
    """
    if run.directory is None:
        return
    about = meta(run)
    run.processes.agree(run.model)
    run.processes.from_main(lambda: _write(run, about, best))
    run.saved = dataclasses.replace(run.position)


def _write(run: Run, about: dict[str, Any], best: dict[str, Tensor] | None) -> None:
    directory = run.directory
    assert directory is not None
    if best is not None:
        write_checkpoint(directory.best, best, about)
    tensors = model_tensors(run.model)
    tensors |= {OPTIMIZER + key: value for key, value in run.optimizers.state_dict().items()}
    for part in run.parts:
        tensors |= {f"{PART}{part.name}/{key}": value for key, value in part.tensors().items()}
    saved = run.saved
    keep = None if saved is None or run.recipe.keep == 1 else lambda: directory.keep_last(saved.number)
    write_checkpoint(directory.last, tensors, about, keep)
    directory.prune(run.recipe.keep)
    write_log(directory.log, run.history)


def model_copy(run: Run) -> dict[str, Tensor]:
    """Return a copy of the model's tensors as they are now, on the CPU; empty on all processes but the main one."""
    if not run.processes.is_main:
        return {}
    return {key: value.detach().to("cpu", copy=True) for key, value in model_tensors(run.model).items()}


def end_with_best(run: Run) -> None:
    """Give the model the weights of the best epoch, on all processes, if the recipe asks for them and there is one."""
    if run.recipe.final_epoch != "best" or run.best is None:
        return
    if run.processes.is_main:
        tensors = {key.removeprefix(MODEL): value for key, value in run.best_tensors.items()}
        if not tensors:  # an earlier call, which this one resumed, had the best epoch
            assert run.directory is not None
            tensors = read_checkpoint(run.directory.best).part(MODEL)
        run.model.load_state_dict(tensors)
    run.processes.agree(run.model)


def meta(run: Run) -> dict[str, Any]:
    """Return what a checkpoint says besides tensors; all processes have to call this."""
    return {
        "recipe": run.recipe.to_dict(),
        "layers": run.layers,
        "batches_per_epoch": length(run.train_epochs.loader) or 0,
        "processes": run.processes.count,
        "precision": run.processes.precision,
        "accumulate": run.accumulate,
        "teacher": run.teacher_kind,
        "epochs_done": run.epochs_done,
        "history": run.history,
        "best": run.best,
        "stop": run.stop,
        "position": run.position.to_meta(run.processes),
        "scaler": run.processes.scaler_state(),
        "parts": {part.name: part.meta() for part in run.parts},
        "fitted": _fits_to_meta(run.fitted),
    }


def _fits_to_meta(fitted: dict[str, list[Fitted]]) -> dict[str, list[dict[str, Any]]]:
    """Return `run.fitted` as values for JSON."""
    return {field: [dataclasses.asdict(row) for row in rows] for field, rows in fitted.items()}


def _fits_from_meta(about: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[Fitted]]:
    """Undo `_fits_to_meta`."""
    return {field: [Fitted(**row) for row in rows] for field, rows in about.items()}


def make_optimizers_and_parts(run: Run) -> None:
    """Make optimizers and parts for the model as it is now, and start every part."""
    run.optimizers = Optimizers(run.model, run.recipe, run.total_steps)
    run.parts = parts_for(run)
    for part in run.parts:
        part.start()


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Bring a run into the state of a checkpoint, which has been checked."""
    about, model = checkpoint.meta, checkpoint.part(MODEL)
    if run.teacher_kind == OWN_TEACHER:
        saved = run.processes.from_main(lambda: _teacher_of(run))
        run.objective.teacher = float_copy(run.model)
        run.objective.teacher.load_state_dict(saved.part(MODEL))
    run.model.load_state_dict(_of_no_form(model))  # `progressive` brings the model to the saved bits below
    run.fitted = _fits_from_meta(about.get("fitted", {}))  # earlier versions did not save them
    make_optimizers_and_parts(run)
    for part in run.parts:
        part.load(checkpoint.part(f"{PART}{part.name}/"), about["parts"].get(part.name))
    run.model.load_state_dict(model)  # parts may have changed the model
    run.optimizers.load_state_dict(checkpoint.part(OPTIMIZER))
    run.processes.load_scaler(about["scaler"])
    run.history, run.best, run.stop = list(about["history"]), about["best"], about["stop"]
    run.position = Position.from_meta(about["position"], run.processes)
    run.saved = dataclasses.replace(run.position)
    directory = run.directory
    assert directory is not None  # the checkpoint came from it
    run.processes.from_main(lambda: write_log(directory.log, run.history))


def _of_no_form(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors with flags that say that bounds are set, but not of which bits."""
    return {key: value.bool() if key.endswith(".calibrated") else value for key, value in model.items()}


def ended_by(run: Run, signal: str) -> BaseException:
    """Return the exception that ends a run after a signal: `KeyboardInterrupt` for SIGINT, else `Terminated`."""
    how = "" if run.directory is None else " Go on with resume=True."
    said = f"{signal}: training stopped; {kept(run.directory, run.saved)}.{how}"
    return KeyboardInterrupt(said) if signal == "SIGINT" else Terminated(said)


def last_of(directory: RunDirectory | None) -> Checkpoint | None:
    """Return the last checkpoint of a run directory, or None where there is none.

    Raises:
        TrainingError: If it is damaged or gone; says how to go on from the newest earlier one that is whole.
    """
    if directory is None or not (directory.last.exists() or directory.kept()):
        return None
    try:
        return read_checkpoint(directory.last)
    except TrainingError as error:
        good = _newest_good(directory)
        if good is None:
            raise
        copying = shlex.join(["cp", good, str(directory.last)])
        raise TrainingError(f"{error} {good} is whole: to go on from there, {copying}, then resume=True.") from None


def _newest_good(directory: RunDirectory) -> str | None:
    for path in directory.kept():
        try:
            read_checkpoint(path)
        except TrainingError:
            continue
        return str(path)
    return None


def _teacher_of(run: Run) -> Checkpoint:
    """Return the checkpoint that holds the run's own teacher.

    Raises:
        TrainingError: If it is damaged or does not fit.
    """
    assert run.directory is not None
    saved = read_checkpoint(run.directory.teacher)
    check_model(saved, run.model, str(run.directory.teacher), run.layers)
    return saved


def check_run(run: Run, checkpoint: Checkpoint) -> None:
    """Raise unless a checkpoint belongs to this very run; the run is not changed.

    Raises:
        TrainingError: If the checkpoint is from another run or an earlier version; names what differs.
    """
    assert run.directory is not None
    about, where = checkpoint.meta, str(run.directory.last)
    if "position" not in about:
        raise TrainingError(
            f"{where}: was written by an earlier version, and holds the model alone as far as this one can tell. Load "
            "it with daqconvert.load_weights, or start again with overwrite=True."
        )
    now, then = run.recipe.to_dict(), completed(about["recipe"])
    problems = [
        f"{key}: {then.get(key)!r} in the run, {now.get(key)!r} now"
        for key in sorted(now.keys() | then.keys())
        if key != "name" and now.get(key) != then.get(key)
    ]
    batches, teacher = about["batches_per_epoch"], about["teacher"]
    if batches != (length(run.train_epochs.loader) or 0):
        problems.append(f"train_loader: {batches} batches in the run, {length(run.train_epochs.loader) or 0} now")
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
