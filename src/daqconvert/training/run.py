"""What a part of a run is: something that acts beside the optimizers, and whose state a checkpoint keeps.

Parts are asked in one fixed order, on every process alike. Whatever a part decides is a function of the run's state,
of the recipe and of its own `tensors` and `meta`, so that a resumed run goes on as if it had never stopped.

Where a run stands between two checkpoints: the epoch in progress and what it has measured so far.

What parts ask of a run: whether this process writes files, and for one another.

When something of a run begins or ends: shares of its steps.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from daqconvert.calibration import CalibrationReport
from daqconvert.errors import TrainingError
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
    """The epoch in progress.

    Attributes:
        number: Optimizer steps of the run so far.
        epoch: From 1.
        batches: Batches of this epoch that this process has trained on.
        steps: Optimizer steps of this epoch so far.
        seconds: What they took.
        meter: Loss and hits of this epoch, on this process.
    """

    number: int = 0
    epoch: int = 1
    batches: int = 0
    steps: int = 0
    seconds: float = 0.0
    meter: Meter = field(default_factory=Meter)

    def next_epoch(self) -> None:
        """Stand before the first batch of the next epoch."""
        self.epoch, self.batches, self.steps, self.seconds, self.meter = self.epoch + 1, 0, 0, 0.0, Meter()

    def __str__(self) -> str:
        """Return `epoch 2`, where one is whole, or `epoch 2, step 17`."""
        return f"epoch {self.epoch}, step {self.steps}" if self.batches else f"epoch {self.epoch - 1}"

    def to_meta(self, processes: Processes) -> dict[str, Any]:
        """Return the position as JSON can hold it, its meter over all processes, which all have to ask."""
        return {
            "number": self.number, "epoch": self.epoch, "batches": self.batches, "steps": self.steps,
            "seconds": self.seconds, "meter": processes.sum(self.meter.sums()),
        }  # fmt: skip

    @staticmethod
    def from_meta(meta: dict[str, Any], processes: Processes) -> Position:
        """Return the position that `to_meta` described; the main process goes on with everybody's meter.

        Args:
            meta: As returned there.
            processes: Of the run.
        """
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
        epoch: From 1.
        loss: Of its batch, the mean over processes.
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
    """Base of the parts; every method does nothing here.

    Attributes:
        name: Prefix of its tensors in a checkpoint, and key of its `meta`.
    """

    name: ClassVar[str] = ""

    def start(self, run: Run) -> None:
        """Take notice of a run whose model, bounds and optimizers are ready; before `load` where it is resumed."""

    def before_epoch(self, run: Run, epoch: int) -> None:
        """Act before the first step that this call takes of an epoch; the model is in training mode."""

    def before_step(self, run: Run, number: int) -> None:
        """Act before optimizer step `number`, counted from 1."""

    def after_step(self, run: Run, step: Step) -> None:
        """Act after an optimizer step, before a checkpoint of it.

        Raises:
            TrainingError: If training must stop here; the last checkpoint stays as it is.
        """

    def evaluating(self, run: Run) -> AbstractContextManager[None]:
        """Return a context in which the model is as it shall be evaluated and kept as `best`, back as it was after."""
        return nullcontext()

    def after_epoch(self, run: Run, row: Row) -> None:
        """Act after an epoch and its evaluation; may add columns to the row of the history, and set `run.stop`."""

    def finish(self, run: Run) -> None:
        """Leave the model as it shall be after the last epoch."""

    def close(self, run: Run) -> None:
        """Take off the model what must not outlive the call of `finetune`, also after an exception."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint keeps, by name."""
        return {}

    def meta(self) -> Any:
        """Return what else a checkpoint keeps, as JSON can hold it; None for nothing."""
        return None

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Take the state that `tensors` and `meta` returned in the run that is resumed; called after `start`."""


P = TypeVar("P", bound=Part)


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
        optimizers: Made before the first step.
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


def writes(run: Run) -> bool:
    """Whether this process writes the files of a run: the main one, where there is a directory."""
    return run.directory is not None and run.processes.is_main


def part_of(run: Run, kind: type[P]) -> P | None:
    """Return the part of a class that a run has, or None.

    Args:
        run: The run.
        kind: The class.
    """
    return next((part for part in run.parts if isinstance(part, kind)), None)


def steps_until(run: Run, share: float, field: str) -> int:
    """Return how many optimizer steps lie before a share of a run: `floor(share * total)`, all of them at share 1.

    Args:
        run: The run.
        share: From 0 to 1.
        field: Of the recipe, for the message.

    Raises:
        TrainingError: If the length of the run is unknown.
    """
    total = run.total_steps
    if not total:
        raise TrainingError(
            f"{field}: is a share of the run, and train_loader has no length, so nobody knows when that is. Give the "
            f"loader a __len__, or leave {field} out."
        )
    return math.floor(share * total + 1e-9)  # 0.3 * 10 is 3 steps, whatever 0.3 is in binary
