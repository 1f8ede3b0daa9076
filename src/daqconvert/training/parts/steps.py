"""The loss by step: `steps.csv` in the run directory, a line for every ten optimizer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from daqconvert.training.appended import Appended
from daqconvert.training.optim import QUANTIZERS, WEIGHTS
from daqconvert.training.parts.asking import writes
from daqconvert.training.parts.base import Part, Step

if TYPE_CHECKING:
    from daqconvert.training.engine import Run

EVERY = 10
COLUMNS = ("step", "epoch", "loss", "lr", "quantizer_lr", "grad_norm", "images_per_second")


class StepLog(Part):
    """Writes `steps.csv`: mean loss of the last ten steps, learning rates, norm of the gradient, images per second.

    Attributes:
        rows: `(step, loss)` of the lines so far, of the whole run.
        last: The last line as numbers by column, or None.
    """

    name: ClassVar[str] = "steps"

    def __init__(self) -> None:
        self.rows: list[tuple[int, float]] = []
        self.last: dict[str, Any] | None = None
        self._sum, self._count, self._step = 0.0, 0, 0
        self._resumed = False
        self._file: Appended | None = None
        self._seen = (0, 0.0)  # inputs and seconds of the epoch when the last line was written

    def before_epoch(self, run: Run, epoch: int) -> None:
        """Open the file: a new one, or what the checkpoint knows of it."""
        self._seen = (run.position.meter.inputs, run.position.seconds)
        if self._file is not None or not writes(run):
            return
        assert run.directory is not None
        self._file = Appended(run.directory.path / "steps.csv")
        if not self._resumed:
            self._file.clear()
        kept = self._file.keep(lambda line: line == ",".join(COLUMNS) or int(line.split(",")[0]) <= self._step)
        self.rows = [(int(cells[0]), float(cells[2])) for cells in (line.split(",") for line in kept[1:])]
        if not kept:
            self._file.add(",".join(COLUMNS))

    def after_step(self, run: Run, step: Step) -> None:
        """Count a step; write a line when it is the tenth."""
        self._sum, self._count, self._step = self._sum + step.loss, self._count + 1, step.number
        self.last = None
        if step.number % EVERY:
            return
        loss, self._sum, self._count = self._sum / self._count, 0.0, 0
        self.rows.append((step.number, loss))
        rates = run.optimizers.rates(step.number - 1)
        inputs, seconds = run.position.meter.inputs - self._seen[0], run.position.seconds - self._seen[1]
        self._seen = (run.position.meter.inputs, run.position.seconds)
        speed = round(inputs * run.processes.count / seconds, 1) if seconds > 0 else None
        values = (
            step.number, step.epoch, loss, rates.get(WEIGHTS), rates.get(QUANTIZERS), step.grad_norm, speed
        )  # fmt: skip
        self.last = dict(zip(COLUMNS, values, strict=True))
        if self._file is not None:
            self._file.add(",".join("" if value is None else f"{value!r}" for value in values))

    def meta(self) -> Any:
        """Return the step, and the losses that no line holds yet."""
        return {"step": self._step, "sum": self._sum, "count": self._count}

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Go on with what `meta` returned; lines of later steps go when the file is opened."""
        self._step, self._sum, self._count = meta["step"], meta["sum"], meta["count"]
        self._resumed = True
