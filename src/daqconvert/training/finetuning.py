"""The verb `finetune`, and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from daqconvert.calibration import CalibrationReport
from daqconvert.convert import require_quantized
from daqconvert.errors import ConversionError, TrainingError
from daqconvert.models import evaluating
from daqconvert.report.fits import Fitted
from daqconvert.report.progress import progress as progress_bar
from daqconvert.seeding import preserved_random_state
from daqconvert.training.batching.epochs import Epochs
from daqconvert.training.batching.loaders import check_length, check_loader
from daqconvert.training.checkpoint import layer_settings
from daqconvert.training.looping import train
from daqconvert.training.losses import LossFn
from daqconvert.training.objective import Objective, check_teacher, teacher_kind
from daqconvert.training.preparing import start
from daqconvert.training.processes import Processes, launched
from daqconvert.training.recipes import Recipe
from daqconvert.training.recipes import recipe as find_recipe
from daqconvert.training.run import Run, Step
from daqconvert.training.rundir import Row, RunDirectory
from daqconvert.training.signals import listening

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did.

    Attributes:
        history: One row per epoch since the start of the run, those of earlier, resumed calls included. Keys: `epoch`
            (from 1), `step` (optimizer steps so far), `lr` and `quantizer_lr` (of the last step), `train_loss`,
            `train_top1`, `val_loss`, `val_top1` (shares 0..1), `images_per_second`, `seconds`; None where there is no
            value. A recipe may add columns, such as `oscillating`.
        epochs: Number of epochs of the run so far, `len(history)`.
        best_epoch: Number of the best epoch on the validation loader, or None if no epoch was evaluated.
        best_top1: Top-1 accuracy of that epoch, 0..1, or None.
        seconds: Time that this call took.
        out_dir: The run directory, or None.
        last: Path of the checkpoint of the last epoch, or None.
        best: Path of the checkpoint of the best epoch, or None.
        calibration: What calibration found, if this call had to calibrate.
        stop: Why the run ended before its last epoch, or None.
        fitted: What was done to each layer or block before the first step, by the recipe's field that asked for it:
            `gptq` or `reconstruct`.
    """

    history: list[Row]
    epochs: int
    best_epoch: int | None
    best_top1: float | None
    seconds: float
    out_dir: Path | None = None
    last: Path | None = None
    best: Path | None = None
    calibration: CalibrationReport | None = None
    stop: str | None = None
    fitted: dict[str, list[Fitted]] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a short summary: epochs, time, last and best accuracy, where the files are."""
        final = self.history[-1] if self.history else {}
        said = [f"{self.epochs} epochs, {self.seconds:.1f} s in this call"]
        if final.get("train_loss") is not None:
            said.append(f"train loss {final['train_loss']:.4f}")
        if final.get("val_top1") is not None:
            said.append(f"top-1 {100 * final['val_top1']:.2f} %")
        if self.best_top1 is not None:
            said.append(f"best {100 * self.best_top1:.2f} % (epoch {self.best_epoch})")
        if self.stop is not None:
            said.append(f"stopped early: {self.stop}")
        for how, rows in self.fitted.items():
            if done := [row for row in rows if not row.left_alone]:
                before, after = (sum(getattr(row, key) for row in done) / len(done) for key in ("before", "after"))
                said.append(f"{how}: {len(done)} of {len(rows)}, mean error {before:.3g} -> {after:.3g}")
        where = f"\n{self.out_dir}: {', '.join(p.name for p in (self.last, self.best) if p)}" if self.out_dir else ""
        return ", ".join(said) + where


def finetune(
    qmodel: nn.Module, train_loader: Iterable[Any], val_loader: Iterable[Any] | None = None, *,
    recipe: str | Path | Recipe = "quick", out_dir: str | Path | None = None, teacher: nn.Module | None = None,
    loss_fn: LossFn | None = None, resume: bool = False, overwrite: bool = False, progress: bool = True,
    on_epoch: Callable[[Row], None] | None = None, on_step: Callable[[Step], None] | None = None,
    accelerator: Accelerator | None = None, **overrides: Any,
) -> FinetuneResult:  # fmt: skip
    """Train a quantized model in place; it is left with the best epoch's weights, in evaluation mode.

    The best epoch is that with the highest top-1 accuracy on the validation loader, or the lowest loss where there is
    no top-1. Without a validation loader, and with `final_epoch="last"`, the model has the last epoch's weights. The
    command line freezes a run by the same rule.

    If some bounds were never set, the first training batches calibrate the model. SIGTERM and the first Ctrl-C end the
    training after the step in progress, with a checkpoint; SIGUSR1 asks for a checkpoint.

    The random state of every sample and step is a function of the seed and of where the run is; the caller's random
    state is restored at the end. So a run that was killed at any moment and resumed ends with the weights of an
    uninterrupted run, bit for bit on the CPU, with one process and the same number of threads.

    Started by `accelerate launch` or `torchrun`, each process trains on its share of the batches, on its own device,
    and gradients are averaged; the batches of a step are then counted on each process. Otherwise training runs on the
    model's device.

    Args:
        qmodel: A model from `quantize`, changed in place; after an exception it holds the weights of the last step.
        train_loader: A `DataLoader` or a list, read once an epoch, the same on all processes. Its batches are
            `(input, target)`, or dicts with the target under `target`, `label` or `labels`; with `distill=1.0` they
            need no targets.
        val_loader: Labelled batches to evaluate on after each epoch; they tell which epoch is the best.
        recipe: A name that `daqconvert recipes` lists, the path of a TOML file, or a `Recipe`.
        out_dir: Directory for checkpoints and logs; None writes nothing.
        teacher: Model to distil from; by default a float copy of `qmodel` as it is before the first step.
        loss_fn: Function of `(outputs, target)` that returns the mean loss over the batch, instead of the cross
            entropy.
        resume: Go on with the run in `out_dir`; start a new one if there is none.
        overwrite: Replace the run in `out_dir`.
        progress: Show a bar where standard error is a terminal.
        on_epoch: Called with each epoch's row of the history, on the main process.
        on_step: Called after each optimizer step, on the main process.
        accelerator: An `accelerate.Accelerator` of your own; by default one is made from the launcher's settings and
            the recipe's `precision`.
        **overrides: Fields of the recipe to change, such as `epochs=10`.

    Returns:
        The history, the best accuracy, and the paths of the checkpoints.

    Raises:
        FrozenError: If the model is frozen.
        TrainingError: If the recipe is wrong, `out_dir` is in use or cannot be written, the checkpoint does not fit,
            the model is not quantized, its outputs are not logits, the loss is NaN or infinite, or SIGTERM came.
        KeyboardInterrupt: After Ctrl-C.
        DataError: If a loader is empty or a batch has not the right form.
        CalibrationError: If the data cannot calibrate the model.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 4.1.

    Example:
        >>> import daqconvert as dq, torch
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> finetune(qmodel, batches, batches, epochs=2).epochs
        2
    """
    started = time.perf_counter()
    chosen = find_recipe(recipe, **overrides)
    _check(qmodel, train_loader, val_loader, chosen, teacher, loss_fn)
    if out_dir is None and (resume or overwrite):
        raise TrainingError("finetune: resume and overwrite need an out_dir.")
    if resume and overwrite:
        raise TrainingError("finetune: pass either resume=True, to go on, or overwrite=True, to start again.")
    with ExitStack() as stack:
        processes = stack.enter_context(launched(qmodel, chosen, accelerator))
        run = _run(qmodel, train_loader, val_loader, chosen, Objective(chosen, loss_fn, teacher), processes)
        run.show = progress and processes.is_main
        if out_dir is not None:
            run.directory = processes.from_main(lambda: RunDirectory(out_dir, resume=resume, overwrite=overwrite))
            stack.callback(run.directory.drop_if_empty)
        stack.callback(qmodel.eval)
        stack.enter_context(preserved_random_state(train_loader, val_loader))
        if teacher is not None:
            stack.enter_context(evaluating(teacher))
            processes.place(teacher)
        stack.callback(run.objective.close)
        stack.callback(_close_parts, run)
        start(run, resume=resume)
        left = max(0, run.total_steps - run.position.number) or None
        bar = stack.enter_context(progress_bar(left, "finetuning", enabled=run.show))
        run.signals = stack.enter_context(listening())
        train(run, bar, on_epoch, on_step)
        run.optimizers.zero_grad()
    return _result(run, time.perf_counter() - started)


def _check(
    qmodel: nn.Module, train_loader: Any, val_loader: Any, recipe: Recipe, teacher: nn.Module | None,
    loss_fn: LossFn | None,
) -> None:  # fmt: skip
    """Raise for everything that can be found wrong before any work."""
    try:
        require_quantized(qmodel, "finetune")
    except ConversionError as error:
        raise TrainingError(str(error)) from None
    for name, tensor in (*qmodel.named_parameters(), *qmodel.named_buffers()):
        if tensor.is_meta:
            raise TrainingError(f"finetune: {name} is on the meta device: it has no values. Load the weights first.")
    if loss_fn is not None and recipe.distill == 1.0:
        raise TrainingError("loss_fn: has no effect with distill=1.0. Pass distill=0.5 or less, or no loss_fn.")
    check_teacher(teacher, qmodel, recipe)
    check_loader(train_loader, "train_loader")
    if val_loader is not None:
        check_loader(val_loader, "val_loader")
    check_length(train_loader, recipe)


def _run(
    qmodel: nn.Module, train_loader: Any, val_loader: Any, recipe: Recipe, objective: Objective, processes: Processes
) -> Run:
    processes.place(qmodel)
    accumulate = recipe.accumulate if recipe.accumulate > 1 else processes.launcher_accumulate
    epochs = Epochs(train_loader, recipe.seed, processes.index, processes.count)
    val_epochs = None
    if val_loader is not None:
        val_epochs = Epochs(val_loader, recipe.seed, processes.index, processes.count, even=False)
    steps = -(-len(epochs) // accumulate)
    return Run(
        qmodel, recipe, objective, processes, accumulate, steps, epochs, val_epochs, layer_settings(qmodel),
        teacher_kind=teacher_kind(objective.teacher, recipe),
    )  # fmt: skip


def _close_parts(run: Run) -> None:
    """Close the parts, the last one first: they remove from the model what must not outlive this call."""
    with ExitStack() as stack:
        for part in run.parts:
            stack.callback(part.close)


def _result(run: Run, seconds: float) -> FinetuneResult:
    best, directory = run.best or {}, run.directory
    return FinetuneResult(
        history=run.history,
        epochs=run.epochs_done,
        best_epoch=best.get("epoch"),
        best_top1=best.get("val_top1"),
        seconds=seconds,
        out_dir=directory.path if directory else None,
        last=directory.last if directory else None,
        best=directory.best if directory and run.best else None,
        calibration=run.calibration,
        fitted=run.fitted,
        stop=run.stop,
    )
