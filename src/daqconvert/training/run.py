"""What a part of a run is: something that acts beside the optimizers, and whose state a checkpoint keeps.

Parts are asked in one fixed order, on every process alike. Whatever a part decides is a function of the run's state,
of the recipe and of its own `tensors` and `meta`, so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from daqconvert.training.engine import Run
    from daqconvert.training.rundir import Row


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
