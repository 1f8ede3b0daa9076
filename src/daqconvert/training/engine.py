"""The engine behind `finetune`: one run, its epochs and steps.

Epochs count from 1, steps from 0. What an epoch does is a function of the run's state - model, optimizers,
history -, of the loaders, and of (seed, epoch); `persistence` writes that state and brings it back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from daqconvert.batches import model_device
from daqconvert.calibration import CalibrationReport
from daqconvert.errors import DataError, TrainingError
from daqconvert.report.progress import Bar
from daqconvert.training.evaluation import Meter, evaluate
from daqconvert.training.loaders import UNLABELLED, inputs_count, read_batch
from daqconvert.training.logs import Row
from daqconvert.training.objective import NO_TEACHER, Objective
from daqconvert.training.optim import QUANTIZERS, WEIGHTS, Optimizers
from daqconvert.training.persistence import save
from daqconvert.training.recipes import Recipe
from daqconvert.training.rundir import RunDirectory
from daqconvert.training.seeding import seed_epoch


@dataclass
class Run:
    """One training run and its state.

    Attributes:
        model: The quantized model, trained in place.
        train_loader: Batches to train on.
        val_loader: Batches to evaluate on, or None.
        recipe: How to train.
        steps: Batches of an epoch; 0 where unknown.
        objective: The loss.
        directory: Where checkpoints go, or None.
        show: Whether to show progress.
        teacher_kind: What checkpoints note of the teacher.
        history: One row per epoch done.
        best: Row of the best epoch, or None.
        calibration: What calibration found, if it was needed.
        optimizers: Made by `persistence.start`.
    """

    model: nn.Module
    train_loader: Any
    val_loader: Any
    recipe: Recipe
    steps: int
    objective: Objective
    directory: RunDirectory | None = None
    show: bool = True
    teacher_kind: str = NO_TEACHER
    history: list[Row] = field(default_factory=list)
    best: Row | None = None
    calibration: CalibrationReport | None = None
    optimizers: Optimizers = field(init=False)

    @property
    def epochs_done(self) -> int:
        """Whole epochs behind the state."""
        return len(self.history)

    @property
    def steps_done(self) -> int:
        """Optimizer steps behind the state."""
        return int(self.history[-1]["step"]) if self.history else 0

    def train(self, bar: Bar, on_epoch: Callable[[Row], None] | None = None) -> None:
        """Train the epochs that are left; after each evaluate, save, and tell `on_epoch`."""
        for epoch in range(self.epochs_done + 1, self.recipe.epochs + 1):
            row = self._train_epoch(epoch, bar)
            self._require_finite(epoch)
            if self.val_loader is not None:
                result = evaluate(self.model, self.val_loader, loss_fn=self.objective.loss_fn, progress=self.show)
                row["val_loss"], row["val_top1"] = result.loss, result.top1
            improved = self.val_loader is not None and (self.best is None or _merit(row) > _merit(self.best))
            self.history.append(row)
            if improved:
                self.best = row
            save(self, best=improved)
            if on_epoch is not None:
                on_epoch(dict(row))

    def _train_epoch(self, epoch: int, bar: Bar) -> Row:
        """Train one epoch and return its row, without the evaluation."""
        seed_epoch(self.recipe.seed, epoch, self.train_loader, self.val_loader)
        _set_training(self.model, freeze_batch_norm=self.recipe.batch_norm == "freeze")
        device, meter, started, first = model_device(self.model), Meter(), time.perf_counter(), self.steps_done
        done, rates = 0, {WEIGHTS: 0.0, QUANTIZERS: 0.0}
        for batch in self.train_loader:
            where = f"epoch {epoch}, step {done + 1}{f' of {self.steps}' if self.steps else ''}"
            needs_target = self.objective.needs_target
            inputs, target = read_batch(batch, device, where, needs_target=needs_target, hint=UNLABELLED)
            rates = self.optimizers.set_step(first + done)
            loss, outputs = self._step(inputs, target, where)
            meter.add(loss, inputs_count(inputs), outputs, target, strict=False)
            done += 1
            speed = meter.inputs / (time.perf_counter() - started)
            shown: dict[str, Any] = {} if meter.top1 is None else {"top1": meter.top1}
            bar.advance(
                epoch=f"{epoch}/{self.recipe.epochs}", loss=meter.loss, **shown, lr=rates[WEIGHTS], per_s=speed
            )
        if done == 0:
            raise DataError(f"train_loader: gave no batch in epoch {epoch}. It must be readable once an epoch.")
        seconds = time.perf_counter() - started
        return {
            "epoch": epoch, "step": first + done, "lr": rates[WEIGHTS], "quantizer_lr": rates[QUANTIZERS],
            "train_loss": meter.loss, "train_top1": meter.top1, "val_loss": None, "val_top1": None,
            "images_per_second": round(meter.inputs / seconds, 1), "seconds": round(seconds, 3),
        }  # fmt: skip

    def _step(self, inputs: Any, target: Any, where: str) -> tuple[float, Any]:
        """Train on one batch; return loss and outputs."""
        loss, outputs = self.objective(self.model, inputs, target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"{where}: the loss is {value}")
        self.optimizers.zero_grad()
        loss.backward()
        if self.recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.optimizers.parameters, self.recipe.clip_grad)
        self.optimizers.step()
        return value, outputs.detach() if isinstance(outputs, Tensor) else outputs

    def _require_finite(self, epoch: int) -> None:
        """Raise if an epoch left NaN or infinite values behind: they must not become the last checkpoint."""
        tensors: dict[str, Tensor] = dict(self.model.named_parameters())
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):  # other buffers may be infinite on purpose, as masks are
                tensors.update((f"{name}.{key}", buffer) for key, buffer in module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise self._diverged(f"epoch {epoch}: after it {name} holds NaN or infinite values")

    def _diverged(self, what: str) -> TrainingError:
        kept = "no out_dir was given, so there is no checkpoint"
        if self.directory is not None:
            kept = f"{self.directory.last} holds the state after epoch {self.epochs_done}"
        return TrainingError(
            f"{what}. Training stopped; {kept}. Try a smaller lr (now {self.recipe.lr:g}), quantizer_lr (now "
            f"{self.recipe.quantizer_lr:g}) or clip_grad=1.0."
        )


def _set_training(model: nn.Module, *, freeze_batch_norm: bool) -> None:
    model.train()
    if freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _merit(row: Row) -> tuple[float, float]:
    """Top-1, then a small loss; where there is no top-1 the loss alone. NaN is worst."""
    loss, top1 = row["val_loss"], row["val_top1"]
    return (0.0 if top1 is None else top1, -math.inf if math.isnan(loss) else -loss)
