"""The engine behind `finetune`: one run, its epochs and its stops.

Epochs and steps count from 1. What a step does is a function of the run's state - model, optimizers, parts, position,
history -, of the loaders, and of (seed, epoch, step); `persistence` writes that state and brings it back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from daqconvert.calibration import CalibrationReport
from daqconvert.errors import DataError, TrainingError
from daqconvert.report.fits import Fitted
from daqconvert.report.progress import Bar
from daqconvert.training.batching.epochs import Epochs
from daqconvert.training.batching.seeding import derived_seed, seed_generators
from daqconvert.training.evaluation import EvalResult, measured
from daqconvert.training.objective import NO_TEACHER, Objective
from daqconvert.training.optim import QUANTIZERS, WEIGHTS, Optimizers
from daqconvert.training.parts.base import Part, Step
from daqconvert.training.persistence import ended_by, model_copy, save
from daqconvert.training.position import Position
from daqconvert.training.processes import Processes
from daqconvert.training.recipes import Recipe
from daqconvert.training.rundir import Row, RunDirectory
from daqconvert.training.signals import Ended, Signals
from daqconvert.training.stepping import groups_of, take_step


@dataclass
class Run:
    """One training run and its state, as one of its processes has it.

    Attributes:
        model: The quantized model, trained in place.
        train_loader: Batches to train on.
        val_loader: Batches to evaluate on, or None.
        recipe: How to train.
        objective: The loss.
        processes: Among which it runs.
        accumulate: Batches of a step, on each process.
        train_epochs: The epochs of `train_loader`, as this process reads them.
        val_epochs: The same of `val_loader`, or None.
        steps: Optimizer steps of an epoch; 0 where unknown.
        layers: Settings of the layers as they were passed; a part may change them while it trains.
        parts: What acts on the run besides.
        directory: Where checkpoints go, or None.
        show: Whether to show progress, on this process.
        teacher_kind: What checkpoints note of the teacher.
        history: One row per epoch done.
        best: Row of the best epoch, or None.
        calibration: What calibration found, if it was needed.
        fitted: What became of each layer or block before the first step: by field of the recipe, `gptq` and
            `reconstruct`.
        position: The epoch in progress.
        stop: Why training ends before its last epoch, or None; a part may set it after an epoch.
        saved: What the last checkpoint holds, as `epoch 3`; None before there is one.
        saved_step: Optimizer steps of it.
        signals: What came from outside.
        optimizers: Made by `persistence.start`.
    """

    model: nn.Module
    train_loader: Any
    val_loader: Any
    recipe: Recipe
    objective: Objective
    processes: Processes
    accumulate: int
    train_epochs: Epochs
    val_epochs: Epochs | None
    steps: int
    layers: dict[str, dict[str, Any]]
    parts: list[Part]
    directory: RunDirectory | None = None
    show: bool = True
    teacher_kind: str = NO_TEACHER
    history: list[Row] = field(default_factory=list)
    best: Row | None = None
    calibration: CalibrationReport | None = None
    fitted: dict[str, list[Fitted]] = field(default_factory=dict)
    position: Position = field(default_factory=Position)
    stop: str | None = None
    saved: str | None = None
    saved_step: int | None = None
    signals: Signals = field(default_factory=Signals)
    optimizers: Optimizers = field(init=False)

    @property
    def epochs_done(self) -> int:
        """Whole epochs behind the state."""
        return len(self.history)

    @property
    def steps_done(self) -> int:
        """Optimizer steps behind the state."""
        return self.position.number

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, 0 where unknown."""
        return self.recipe.epochs * self.steps

    @property
    def finished(self) -> bool:
        """Whether there is no epoch left, or a part has ended the run."""
        return self.stop is not None or self.epochs_done >= self.recipe.epochs

    def train(
        self, bar: Bar, on_epoch: Callable[[Row], None] | None = None, on_step: Callable[[Step], None] | None = None
    ) -> None:
        """Train what is left; after each epoch evaluate, save, and tell `on_epoch`.

        Args:
            bar: Shows the progress.
            on_epoch: Called with each epoch's row, on the main process.
            on_step: Called after each optimizer step, on the main process.
        """
        with self.processes.wrapping(self.model) as wrapped:
            while not self.finished:
                row = self._train_epoch(wrapped, bar, on_step)
                self._end_epoch(row)
                if on_epoch is not None and self.processes.is_main:
                    on_epoch(dict(row))

    def _train_epoch(self, wrapped: Any, bar: Bar, on_step: Callable[[Step], None] | None) -> Row:
        """Train what is left of an epoch and return its row, without the evaluation."""
        position = self.position
        set_training(self.model, freeze_batch_norm=self.recipe.batch_norm == "freeze")
        for part in self.parts:
            part.before_epoch(self, position.epoch)
        before, started = position.seconds, time.perf_counter()
        batches = self.train_epochs.batches(position.epoch, position.batches)
        for group in groups_of(batches, self.accumulate):
            step, came = take_step(self, wrapped, group)
            position.seconds = before + time.perf_counter() - started
            self._after_step(step, came, on_step)
            self._show(bar)
        if position.batches == 0:
            raise DataError(
                f"train_loader: gave no batch in epoch {position.epoch}. It must be readable once an epoch."
            )
        return self._row()

    def _after_step(self, step: Step, came: list[float], on_step: Callable[[Step], None] | None) -> None:
        """Let the parts act, and write a checkpoint if it is time or somebody asked for one."""
        for part in self.parts:
            part.after_step(self, step)
        if on_step is not None and self.processes.is_main:
            on_step(step)
        asked, ending = self.signals.take(self.signals.came if self.processes.count == 1 else came)
        every = self.recipe.checkpoint_steps
        if asked or (every and step.number % every == 0):
            self._save()
        if ending is not None:
            raise ended_by(self, ending)

    def _show(self, bar: Bar) -> None:
        if not bar.shown:  # the hits are on the device until somebody reads them
            bar.advance()
            return
        meter, rates = self.position.meter, self._rates()
        shown: dict[str, Any] = {} if meter.top1 is None else {"top1": meter.top1}
        speed = meter.inputs / max(1e-9, self.position.seconds)
        epoch = f"{self.position.epoch}/{self.recipe.epochs}"
        bar.advance(epoch=epoch, loss=meter.loss, **shown, lr=rates[WEIGHTS], q_lr=rates[QUANTIZERS], per_s=speed)

    def _rates(self) -> dict[str, float]:
        """Learning rates of the last step."""
        return {WEIGHTS: 0.0, QUANTIZERS: 0.0} | self.optimizers.rates(self.position.number - 1)

    def _row(self) -> Row:
        """What is known of the epoch before its evaluation, over all processes."""
        position, rates = self.position, self._rates()
        meter, seconds = position.meter.over(self.processes), max(1e-9, position.seconds)
        return {
            "epoch": position.epoch, "step": position.number, "lr": rates[WEIGHTS], "quantizer_lr": rates[QUANTIZERS],
            "train_loss": meter.loss, "train_top1": meter.top1, "val_loss": None, "val_top1": None,
            "images_per_second": round(meter.inputs / seconds, 1), "seconds": round(seconds, 3),
        }  # fmt: skip

    def _end_epoch(self, row: Row) -> None:
        """Evaluate and save a whole epoch; after the last one leave the model as it shall be."""
        self.require_finite()
        best = None
        if self.val_epochs is not None:
            try:
                best = self._evaluate(row)
            except Ended as ending:  # the epoch is trained, and evaluated when the run goes on
                save(self)
                raise ended_by(self, ending.signal) from None
        for part in self.parts:
            part.after_epoch(self, row)
        self.history.append(row)
        self.position.next_epoch()
        if self.finished:
            for part in self.parts:
                part.finish(self)
            self.processes.agree(self.model)
        save(self, best=best)

    def _evaluate(self, row: Row) -> dict[str, Tensor] | None:
        """Add the evaluation to a row; return the model's tensors if it is the best so far."""
        assert self.val_epochs is not None
        seed_generators(derived_seed(self.recipe.seed, self.position.epoch, "evaluate"), devices=True)
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.evaluating(self))
            self.processes.agree(self.model)
            result = self._measured(self._interruptible(self.val_epochs.batches(self.position.epoch)))
            row["val_loss"], row["val_top1"] = result.loss, result.top1
            if self.best is not None and _merit(row) <= _merit(self.best):
                return None
            self.best = row
            return model_copy(self)

    def _measured(self, batches: Iterator[Any]) -> EvalResult:
        loss_fn, show = self.objective.loss_fn, self.show
        total = len(self.val_epochs or ()) or None
        return measured(self.model, batches, loss_fn=loss_fn, progress=show, total=total, processes=self.processes)

    def _interruptible(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Leave the evaluation when a signal ends training; several processes finish it, as they have to together."""
        for batch in batches:
            ending = self.signals.take(self.signals.came)[1] if self.processes.count == 1 else None
            if ending is not None:
                raise Ended(ending)
            yield batch

    def _save(self) -> None:
        """Write a checkpoint in the middle of an epoch."""
        self.require_finite()
        save(self)

    def require_finite(self) -> None:
        """Raise if training left NaN or infinite values behind: they must not become the last checkpoint."""
        tensors: dict[str, Tensor] = dict(self.model.named_parameters())
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):  # other buffers may be infinite on purpose, as masks are
                tensors.update((f"{name}.{key}", buffer) for key, buffer in module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise self.diverged(f"epoch {self.position.epoch}: after it {name} holds NaN or infinite values")

    def diverged(self, what: str) -> TrainingError:
        """Return the error of a run whose values are not finite any more."""
        kept = "no out_dir was given, so there is no checkpoint"
        if self.directory is not None:
            kept = f"{self.directory.last} holds the state after {self.saved}"
        return TrainingError(
            f"{what}. Training stopped; {kept}. Try a smaller lr (now {self.recipe.lr:g}), quantizer_lr (now "
            f"{self.recipe.quantizer_lr:g}) or clip_grad=1.0."
        )


def set_training(model: nn.Module, *, freeze_batch_norm: bool) -> None:
    """Put a model into training mode, its batch norms into evaluation mode where they are frozen."""
    model.train()
    if freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _merit(row: Row) -> tuple[float, float]:
    """Top-1, then a small loss; where there is no top-1 the loss alone. NaN is worst."""
    loss, top1 = row["val_loss"], row["val_top1"]
    return (0.0 if top1 is None else top1, -math.inf if math.isnan(loss) else -loss)
