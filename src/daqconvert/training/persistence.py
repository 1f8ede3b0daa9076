"""How a run starts, goes on where it was interrupted, and saves itself.

Its state is `last.safetensors`: tensors of model, optimizers and parts, and `meta(run)`. `best.safetensors` has the
same form, and of tensors the model alone, as it was evaluated; `teacher.safetensors` holds the model as it was before
the first step, because a model in memory may have been trained on since.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daqconvert.calibration import calibrate, is_calibrated
from daqconvert.training.batching.loaders import UNLABELLED, check_first_batch, length, read_batch
from daqconvert.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    PART,
    Checkpoint,
    model_tensors,
    write_checkpoint,
)
from daqconvert.training.noting import from_meta, to_meta
from daqconvert.training.objective import OWN_TEACHER, float_teacher
from daqconvert.training.optim import Optimizers
from daqconvert.training.position import Position
from daqconvert.training.rebuilding import reconstruct_blocks
from daqconvert.training.resuming import check_run, last_of, teacher_of
from daqconvert.training.rounding import round_weights
from daqconvert.training.rundir import write_log
from daqconvert.training.signals import Terminated

if TYPE_CHECKING:
    from daqconvert.training.engine import Run


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
        _restore(run, checkpoint)


def save(run: Run, *, best: dict[str, Tensor] | None = None) -> None:
    """Write the checkpoints and the log; `last` comes after `best`, so that it never speaks of a best that is not.

    Args:
        run: The run, after a step or an epoch; all its processes have to call this, and the main one writes.
        best: The model's tensors if this epoch is the best so far.
    """
    if run.directory is None:
        return
    about = meta(run)
    run.processes.agree(run.model)
    run.processes.from_main(lambda: _write(run, about, best))
    run.saved, run.saved_step = str(run.position), run.position.number


def _write(run: Run, about: dict[str, Any], best: dict[str, Tensor] | None) -> None:
    directory = run.directory
    assert directory is not None
    if best is not None:
        write_checkpoint(directory.best, best, about)
    tensors = model_tensors(run.model)
    tensors |= {OPTIMIZER + key: value for key, value in run.optimizers.state_dict().items()}
    for part in run.parts:
        tensors |= {f"{PART}{part.name}/{key}": value for key, value in part.tensors().items()}
    step = run.saved_step
    keep = None if step is None or run.recipe.keep == 1 else lambda: directory.keep_last(step)
    write_checkpoint(directory.last, tensors, about, keep)
    directory.prune(run.recipe.keep)
    write_log(directory.log, run.history)


def model_copy(run: Run) -> dict[str, Tensor]:
    """Return the model's tensors as they are now, for `save`; empty where nobody will write them."""
    if run.directory is None or not run.processes.is_main:
        return {}
    return {key: value.detach().to("cpu", copy=True) for key, value in model_tensors(run.model).items()}


def meta(run: Run) -> dict[str, Any]:
    """Return what a checkpoint says besides tensors; all processes have to ask.

    Args:
        run: The run.
    """
    return {
        "recipe": run.recipe.to_dict(),
        "layers": run.layers,
        "batches_per_epoch": length(run.train_loader) or 0,
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
        "fitted": to_meta(run.fitted),
    }


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
        run.objective.teacher = float_teacher(run.model)
    initial = model_copy(run) if run.teacher_kind == OWN_TEACHER else {}
    before = None
    if run.recipe.reconstruct:  # weights that GPTQ has not changed teach
        before = run.objective.teacher if run.teacher_kind == OWN_TEACHER else float_teacher(run.model)
    if run.recipe.gptq:
        round_weights(run)
    if before is not None:
        reconstruct_blocks(run, before)
    _make_optimizers_and_parts(run)
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


def _make_optimizers_and_parts(run: Run) -> None:
    run.optimizers = Optimizers(run.model, run.recipe, run.total_steps)
    for part in run.parts:
        part.start(run)


def _restore(run: Run, checkpoint: Checkpoint) -> None:
    """Take the state of a checkpoint that was checked."""
    about, model = checkpoint.meta, checkpoint.part(MODEL)
    if run.teacher_kind == OWN_TEACHER:
        saved = run.processes.from_main(lambda: teacher_of(run))
        run.objective.teacher = float_teacher(run.model)
        run.objective.teacher.load_state_dict(saved.part(MODEL))
    run.model.load_state_dict(model)  # which bounds are trained is known now
    run.fitted = from_meta(about.get("fitted", {}))  # runs of earlier versions noted none
    _make_optimizers_and_parts(run)
    for part in run.parts:
        part.load(checkpoint.part(f"{PART}{part.name}/"), about["parts"].get(part.name))
    run.model.load_state_dict(model)  # whatever the parts did to it
    run.optimizers.load_state_dict(checkpoint.part(OPTIMIZER))
    run.processes.load_scaler(about["scaler"])
    run.history, run.best, run.stop = list(about["history"]), about["best"], about["stop"]
    run.position = Position.from_meta(about["position"], run.processes)
    run.saved, run.saved_step = str(run.position), run.position.number
    directory = run.directory
    assert directory is not None  # there is a checkpoint
    run.processes.from_main(lambda: write_log(directory.log, run.history))


def ended_by(run: Run, signal: str) -> BaseException:
    """Return what ends a run after a signal: `KeyboardInterrupt` for SIGINT, else an error that says how to go on.

    Args:
        run: The run.
        signal: Its name.
    """
    where = "no out_dir was given, so nothing is kept."
    if run.directory is not None:
        where = f"{run.directory.last} holds the state after {run.saved}. Go on with resume=True."
    said = f"{signal}: training stopped; {where}"
    return KeyboardInterrupt(said) if signal == "SIGINT" else Terminated(said)
