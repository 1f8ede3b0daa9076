"""The training loop: the epochs and steps of a run, and what ends it.

What a step does is a function of the run's state (model, optimizers, parts, position, history), of the loaders, and of
(seed, epoch, step); `saving` writes the state and restores it. One optimizer step trains on a group of batches: each
goes forward and backward, the gradient is averaged over the processes, and the optimizers update the parameters.

    gradient = mean over processes of the mean over the group's batches of the gradient of each batch's loss

The random state of a step is a function of (seed, step), and of the process where there are several.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from daqconvert.batches import no_elements
from daqconvert.errors import DataError, TrainingError
from daqconvert.report.progress import Bar
from daqconvert.seeding import derived_seed, seed_generators
from daqconvert.training.batching.loaders import UNLABELLED, Inputs, inputs_count, read_batch
from daqconvert.training.evaluation import EvalResult, measured
from daqconvert.training.optim import QUANTIZERS, WEIGHTS
from daqconvert.training.run import Run, Step
from daqconvert.training.rundir import Row, kept
from daqconvert.training.saving import end_with_best, ended_by, model_copy, save
from daqconvert.training.signals import Ended

T = TypeVar("T")


def train(
    run: Run, bar: Bar, on_epoch: Callable[[Row], None] | None = None, on_step: Callable[[Step], None] | None = None
) -> None:
    """Train the epochs that are left of a prepared run; evaluate and save after each; end with the best one's weights.

    On the main process `on_epoch` is called with each epoch's row, and `on_step` after each optimizer step.
    """
    with run.processes.wrapping(run.model, find_unused=run.find_unused) as wrapped:
        while not run.finished:
            row = _train_epoch(run, wrapped, bar, on_step)
            _end_epoch(run, row)
            if on_epoch is not None and run.processes.is_main:
                on_epoch(dict(row))
    end_with_best(run)


def _train_epoch(run: Run, wrapped: Any, bar: Bar, on_step: Callable[[Step], None] | None) -> Row:
    """Train what is left of an epoch and return its row, without the evaluation."""
    position = run.position
    run.begin_training(hold_batch_norms=run.recipe.batch_norm == "freeze")
    for part in run.parts:
        part.before_epoch(position.epoch)
    before, started = position.seconds, time.perf_counter()
    batches = run.train_epochs.batches(position.epoch, position.batches)
    for group in groups_of(batches, run.accumulate):
        step, came = _take_step(run, wrapped, group)
        position.seconds = before + time.perf_counter() - started
        _after_step(run, step, came, on_step)
        _show(run, bar)
    if position.batches == 0:
        raise DataError(f"train_loader: gave no batch in epoch {position.epoch}. It must be readable once an epoch.")
    return _row(run)


def groups_of(batches: Iterable[T], count: int) -> Iterator[list[T]]:
    """Yield the batches in groups of `count`; the last group may be smaller.

    Yields:
        Lists of batches.

    Example:
        >>> list(groups_of([1, 2, 3], 2))
        [[1, 2], [3]]
    """
    group: list[T] = []
    for batch in batches:
        group.append(batch)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


def _take_step(run: Run, wrapped: Any, group: list[Any]) -> tuple[Step, list[float]]:
    """Train on the batches of one group, as the loader gives them, and move the run's position on by one step.

    `wrapped` is called instead of the run's model. The result is the step, and how often each signal came, summed over
    all processes.

    Raises:
        TrainingError: If the loss is NaN or infinite; the step does not change the parameters then.
        DataError: If a batch has no inputs.
    """
    position, processes = run.position, run.processes
    number = position.number + 1
    where = f"epoch {position.epoch}, step {position.steps + 1}{f' of {run.steps}' if run.steps else ''}"
    needs, device = run.objective.needs_target, processes.device
    read = [read_batch(b, device, where, needs_target=needs, hint=UNLABELLED, model=run.model) for b in group]
    if any(no_elements(inputs) for inputs, _ in read):
        raise DataError(f"{where}: expected a batch with inputs, found one of size 0. Leave it out of train_loader.")
    run.optimizers.set_step(number - 1)
    for part in run.parts:
        part.before_step(number)
    rank = (processes.index,) if processes.count > 1 else ()
    seed_generators(derived_seed(run.recipe.seed, number, "model", *rank), devices=device.type != "cpu")
    run.optimizers.zero_grad()
    losses = [
        _forward_and_backward(run, wrapped, inputs, target, len(group), last=i == len(group))
        for i, (inputs, target) in enumerate(read, 1)
    ]
    total, *came = processes.sum([sum(losses) / len(group), *map(float, run.signals.came)])
    loss = total / processes.count
    if not math.isfinite(loss):
        _raise_diverged(run, f"{where}: the loss is {loss}")
    norm = processes.update(run.optimizers, run.recipe.clip_grad)
    position.number, position.steps, position.batches = number, position.steps + 1, position.batches + len(group)
    return Step(number, run.total_steps, position.epoch, loss, norm), came


def _forward_and_backward(run: Run, wrapped: Any, inputs: Inputs, target: Any, share: int, *, last: bool) -> float:
    """Add the gradients of one of a step's `share` batches, count it in the meter, and return its loss."""
    processes = run.processes
    with processes.syncing(wrapped, last):
        with processes.autocast():
            loss, outputs = run.objective(wrapped, inputs, target)
        processes.backward(loss / share if share > 1 else loss)
    value = float(loss.detach())
    outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
    run.position.meter.add(value, inputs_count(inputs), outputs, target, strict=False)
    return value


def _after_step(run: Run, step: Step, came: list[float], on_step: Callable[[Step], None] | None) -> None:
    """Let the parts act, and write a checkpoint if it is time or a signal asked for one."""
    for part in run.parts:
        part.after_step(step)
    if on_step is not None and run.processes.is_main:
        on_step(step)
    asked, ending = run.signals.take(run.signals.came if run.processes.count == 1 else came)
    every = run.recipe.checkpoint_steps
    if asked or (every and step.number % every == 0):
        _save(run)
    if ending is not None:
        raise ended_by(run, ending)


def _save(run: Run) -> None:
    """Write a checkpoint in the middle of an epoch."""
    _require_finite(run)
    save(run)


def _show(run: Run, bar: Bar) -> None:
    if not bar.shown:  # no need to read the hits, which would wait for the device
        bar.advance()
        return
    meter, rates = run.position.meter, _rates(run)
    shown: dict[str, Any] = {} if meter.top1 is None else {"top1": meter.top1}
    speed = meter.inputs / max(1e-9, run.position.seconds)
    epoch = f"{run.position.epoch}/{run.recipe.epochs}"
    bar.advance(epoch=epoch, loss=meter.loss, **shown, lr=rates[WEIGHTS], q_lr=rates[QUANTIZERS], per_s=speed)


def _rates(run: Run) -> dict[str, float]:
    """Return the learning rates of the last step."""
    return {WEIGHTS: 0.0, QUANTIZERS: 0.0} | run.optimizers.rates(run.position.number - 1)


def _row(run: Run) -> Row:
    """Return what is known of the epoch before its evaluation, over all processes."""
    position, rates = run.position, _rates(run)
    meter, seconds = position.meter.over(run.processes), max(1e-9, position.seconds)
    return {
        "epoch": position.epoch, "step": position.number, "lr": rates[WEIGHTS], "quantizer_lr": rates[QUANTIZERS],
        "train_loss": meter.loss, "train_top1": meter.top1, "val_loss": None, "val_top1": None,
        "images_per_second": round(meter.inputs / seconds, 1), "seconds": round(seconds, 3),
    }  # fmt: skip


def _end_epoch(run: Run, row: Row) -> None:
    """Evaluate an epoch and save it; after the last one let the parts put the model into its final state."""
    _require_finite(run)
    best = None
    if run.val_epochs is not None:
        try:
            best = _evaluate(run, row)
        except Ended as ending:  # the epoch is trained; a resumed run evaluates it
            save(run)
            raise ended_by(run, ending.signal) from None
    for part in run.parts:
        part.after_epoch(row)
    run.history.append(row)
    run.position.next_epoch()
    if run.finished:
        for part in run.parts:
            part.finish()
        run.processes.agree(run.model)
    save(run, best=best)


def _evaluate(run: Run, row: Row) -> dict[str, Tensor] | None:
    """Add the evaluation to a row; return the model's tensors if it is the best so far."""
    assert run.val_epochs is not None
    seed_generators(derived_seed(run.recipe.seed, run.position.epoch, "evaluate"), devices=True)
    with ExitStack() as stack:
        for part in run.parts:
            stack.enter_context(part.evaluating())
        run.processes.agree(run.model)
        result = _measured(run, _interruptible(run, run.val_epochs.batches(run.position.epoch)))
        row["val_loss"], row["val_top1"] = result.loss, result.top1
        if run.best is not None and _merit(row) <= _merit(run.best):
            return None
        run.best, run.best_tensors = row, model_copy(run)
        return run.best_tensors


def _measured(run: Run, batches: Iterator[Any]) -> EvalResult:
    loss_fn, show = run.objective.loss_fn, run.show
    total = len(run.val_epochs or ()) or None
    return measured(run.model, batches, loss_fn=loss_fn, progress=show, total=total, processes=run.processes)


def _interruptible(run: Run, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches until a signal ends training; with several processes all of them, as each has to finish.

    Raises:
        Ended: When a signal ends training.
    """
    for batch in batches:
        ending = run.signals.take(run.signals.came)[1] if run.processes.count == 1 else None
        if ending is not None:
            raise Ended(ending)
        yield batch


def _merit(row: Row) -> tuple[float, float]:
    """Return what epochs are compared by, larger is better: top-1, if known, then the loss; NaN is the worst loss."""
    loss, top1 = row["val_loss"], row["val_top1"]
    return (0.0 if top1 is None else top1, -math.inf if math.isnan(loss) else -loss)


def _require_finite(run: Run) -> None:
    """Raise if training left NaN or infinite values behind: they must not become the last checkpoint."""
    tensors: dict[str, Tensor] = dict(run.model.named_parameters())
    for name, module in run.model.named_modules():
        if isinstance(module, _BatchNorm):  # other buffers may be infinite on purpose, as masks are
            tensors.update((f"{name}.{key}", buffer) for key, buffer in module.named_buffers(recurse=False))
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            _raise_diverged(run, f"epoch {run.position.epoch}: after it {name} holds NaN or infinite values")


def _raise_diverged(run: Run, what: str) -> NoReturn:
    """End a run whose values are not finite any more, with an error that says what is kept and what to try."""
    raise TrainingError(
        f"{what}. Training stopped; {kept(run.directory, run.saved)}. Try a smaller lr (now {run.recipe.lr:g}), "
        f"quantizer_lr (now {run.recipe.quantizer_lr:g}) or clip_grad=1.0."
    )
