"""One training run as plain data: what it is made of, where it stands, and what acts on it beside the optimizers.

The functions that work on a run are in the modules beside this one: `preparing` (before the first step), `looping`
(steps and epochs) and `saving` (checkpoints and resuming). Epochs and steps count from 1; a step is one update by the
optimizers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from daqconvert.calibration import CalibrationReport
from daqconvert.report.fits import Fitted
from daqconvert.training.batching.epochs import Epochs
from daqconvert.training.evaluation import Meter
from daqconvert.training.objective import NO_TEACHER, Objective
from daqconvert.training.optim import Optimizers
from daqconvert.training.processes import Processes
from daqconvert.training.recipes import Recipe
from daqconvert.training.rundir import Row, RunDirectory
from daqconvert.training.signals import Signals


@dataclass
class Position:
    """Where a run stands: the epoch in progress, and what was measured in it so far.

    Attributes:
        number: Optimizer steps of the run so far.
        epoch: Number of the epoch in progress.
        batches: Batches of this epoch that this process has trained on.
        steps: Optimizer steps of this epoch so far.
        seconds: Time that those steps took.
        meter: Loss and hits of this epoch, on this process.
    """

    number: int = 0
    epoch: int = 1
    batches: int = 0
    steps: int = 0
    seconds: float = 0.0
    meter: Meter = field(default_factory=Meter)

    def next_epoch(self) -> None:
        """Move to the first batch of the next epoch."""
        self.epoch, self.batches, self.steps, self.seconds, self.meter = self.epoch + 1, 0, 0, 0.0, Meter()

    def __str__(self) -> str:
        """Return `epoch 2` after a whole epoch, `epoch 2, step 17` within one."""
        return f"epoch {self.epoch}, step {self.steps}" if self.batches else f"epoch {self.epoch - 1}"

    def to_meta(self, processes: Processes) -> dict[str, Any]:
        """Return the position as values for JSON, the meter summed over all processes; each has to call this."""
        return {
            "number": self.number, "epoch": self.epoch, "batches": self.batches, "steps": self.steps,
            "seconds": self.seconds, "meter": processes.sum(self.meter.sums()),
        }  # fmt: skip

    @staticmethod
    def from_meta(meta: dict[str, Any], processes: Processes) -> Position:
        """Return the position that `to_meta` wrote; the main process gets the sums, the others an empty meter."""
        found = Position(**{**meta, "meter": Meter()})
        if processes.is_main:
            found.meter.load(meta["meter"])
        return found


@dataclass(frozen=True)
class Step:
    """One optimizer step that was just taken.

    Attributes:
        number: Optimizer steps of the run so far, from 1.
        total: Optimizer steps of the whole run; 0 where unknown.
        epoch: The epoch that it belongs to, from 1.
        loss: Loss of its batch, the mean over processes.
        grad_norm: Norm of the gradient before clipping, or None where it was not needed.
    """

    number: int
    total: int
    epoch: int
    loss: float
    grad_norm: float | None = None

    @property
    def share(self) -> float:
        """Share of the run that is done, 0..1; 0 where its length is unknown."""
        return self.number / self.total if self.total else 0.0


class Part:
    """Something that acts on a training run beside the optimizers; the methods of this base class do nothing.

    A part is made with what it needs of the run, and its constructor's signature says what that is: the model, a
    number, a folder, or the whole run where it reads much of the run or may end it. `parts.assembly` makes the parts.
    They are called in one fixed order, on every process alike. What a part decides is a function of the run's state,
    of the recipe and of its own `tensors` and `meta`, so that a resumed run goes on as if it had never stopped.

    Attributes:
        name: Prefix of its tensors in a checkpoint, and key of its `meta`.
    """

    name: ClassVar[str] = ""

    def start(self) -> None:
        """Act before the first step, when model, bounds and optimizers are ready; before `load` in a resumed run."""

    def before_epoch(self, epoch: int) -> None:
        """Act before the first step that this call of `finetune` takes in an epoch; the model is in training mode."""

    def before_step(self, number: int) -> None:
        """Act before an optimizer step, with its number, counted from 1."""

    def after_step(self, step: Step) -> None:
        """Act after an optimizer step, before a checkpoint is written.

        Raises:
            TrainingError: If training must stop here; the last checkpoint stays as it is.
        """

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which the model is as it is to be evaluated and saved; it is restored afterwards."""
        return nullcontext()

    def after_epoch(self, row: Row) -> None:
        """Act after an epoch and its evaluation; may add columns to the epoch's row of the history."""

    def finish(self) -> None:
        """Put the model into its final state, after the last epoch."""

    def close(self) -> None:
        """Remove from the model what must not outlive the call of `finetune`, also after an exception."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint keeps, by name."""
        return {}

    def meta(self) -> Any:
        """Return what else a checkpoint keeps, as values for JSON; None for nothing."""
        return None

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Take the state that `tensors` and `meta` returned in the run that is resumed; called after `start`."""


@dataclass
class Run:
    """One training run, as one of its processes sees it.

    The attributes come in three groups: what a run is made of, what is made before its first step, where it stands.

    Attributes:
        model: The quantized model, trained in place.
        recipe: How to train.
        objective: The loss.
        processes: The processes among which it runs.
        accumulate: Batches of a step, on each process.
        steps: Optimizer steps of an epoch; 0 where unknown.
        train_epochs: The batches to train on, as this process reads them.
        val_epochs: The batches to evaluate on, as this process reads them, or None.
        layers: Settings of the layers when `finetune` was called; a part may change the model's while it trains.
        teacher_kind: Which teacher it has, as noted in checkpoints: none, the model's float copy, or one passed.
        directory: Where checkpoints go, or None.
        show: Whether to show progress, on this process.
        signals: Signals that came from outside since training began.
        find_unused: Whether a parameter may have no gradient in some step, which several processes have to look for.

        calibration: What calibration found, if it was needed.
        fitted: What was done to each layer or block before the first step, by the recipe's field that asked for it:
            `gptq` or `reconstruct`.
        optimizers: What updates the parameters.
        parts: What acts on the run beside the optimizers.

        position: The epoch in progress.
        history: One row for each epoch done.
        best: Row of the best epoch, or None.
        best_tensors: The model's tensors after it, on the main process, if this call trained it; else empty.
        stop: Why training ends before its last epoch, or None; a part may set it after an epoch.
        saved: Position that the last checkpoint holds; None before there is one.
    """

    model: nn.Module
    recipe: Recipe
    objective: Objective
    processes: Processes
    accumulate: int
    steps: int
    train_epochs: Epochs
    val_epochs: Epochs | None
    layers: dict[str, dict[str, Any]]
    teacher_kind: str = NO_TEACHER
    directory: RunDirectory | None = None
    show: bool = True
    signals: Signals = field(default_factory=Signals)
    find_unused: bool = True

    calibration: CalibrationReport | None = None
    fitted: dict[str, list[Fitted]] = field(default_factory=dict)
    optimizers: Optimizers = field(init=False)
    parts: list[Part] = field(default_factory=list)

    position: Position = field(default_factory=Position)
    history: list[Row] = field(default_factory=list)
    best: Row | None = None
    best_tensors: dict[str, Tensor] = field(default_factory=dict)
    stop: str | None = None
    saved: Position | None = None

    @property
    def epochs_done(self) -> int:
        """Number of whole epochs so far."""
        return len(self.history)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, 0 where unknown."""
        return self.recipe.epochs * self.steps

    @property
    def finished(self) -> bool:
        """Whether there is no epoch left, or a part has ended the run."""
        return self.stop is not None or self.epochs_done >= self.recipe.epochs

    def begin_training(self, *, hold_batch_norms: bool) -> None:
        """Put the model in training mode, its batch norms in evaluation mode where they are held."""
        self.model.train()
        for module in self.model.modules() if hold_batch_norms else ():
            if isinstance(module, _BatchNorm):
                module.eval()

    @property
    def folder(self) -> Path | None:
        """Folder that this process writes the run's files to; None without one, and on all but the main process."""
        return self.directory.path if self.directory is not None and self.processes.is_main else None
