"""Two files of the run directory that grow line by line while a run goes on.

`snapshots.jsonl` has bounds and scales after every epoch, one object per line; epoch 0 is before the first step:

    {"epoch": 3, "sites": {"layer1.0.conv1": {"bits": [2, 2], "weight": [-2.9, 3.1], ...}}}

`levels`, the number of weights on each level, is in the first line and in one more that is written at the end.
`steps.csv` has the loss by step, a line for every ten optimizer steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from daqconvert.training.optim import QUANTIZERS, WEIGHTS
from daqconvert.training.parts.measures import level_counts, measure, sites_of
from daqconvert.training.run import Part, Run, Step
from daqconvert.training.rundir import Appended, Row

Sites = dict[str, dict[str, Any]]
EVERY = 10  # steps per line of `steps.csv`
COLUMNS = ("step", "epoch", "loss", "lr", "quantizer_lr", "grad_norm", "images_per_second")


class Snapshots(Part):
    """Writes `snapshots.jsonl`, and keeps its contents for the report.

    Args:
        model: The model in training.
        folder: Where this process writes files, or None.

    Attributes:
        moments: `(epoch, measures by site)`, as far as known.
        start_levels: Weights on each level before the first step, by site.
    """

    name: ClassVar[str] = "snapshots"

    def __init__(self, model: nn.Module, folder: Path | None) -> None:
        self.model, self.folder = model, folder
        self.moments: list[tuple[int, Sites]] = []
        self.start_levels: dict[str, list[int]] = {}
        self._epoch = 0
        self._resumed = False
        self._file: Appended | None = None

    def before_epoch(self, epoch: int) -> None:
        """Open the file: a new one, or what the checkpoint knows of it."""
        if self._file is not None or self.folder is None:
            return
        self._file = Appended(self.folder / "snapshots.jsonl")
        if not self._resumed:
            self._file.clear()
        for line in self._file.keep(lambda line: json.loads(line)["epoch"] <= self._epoch):
            self._take(json.loads(line))
        if not self._resumed:
            self._add({"epoch": 0, "sites": _sites(self.model), "levels": _levels(self.model)})

    def after_epoch(self, row: Row) -> None:
        """Add a line."""
        self._epoch = row["epoch"]
        if self._file is not None:
            self._add({"epoch": self._epoch, "sites": _sites(self.model)})

    def finish(self) -> None:
        """Add a line with the number of weights on each level at the end."""
        if self._file is not None:
            self._add({"epoch": self._epoch, "levels": _levels(self.model)})

    def meta(self) -> Any:
        """Return the last epoch that has a line."""
        return {"epoch": self._epoch}

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Go on after what `meta` returned; lines of later epochs are dropped when the file is opened."""
        self._epoch, self._resumed = meta["epoch"], True

    def _add(self, found: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.add(json.dumps(found, separators=(",", ":"), allow_nan=False))
        self._take(found)

    def _take(self, found: dict[str, Any]) -> None:
        if "sites" in found:
            self.moments.append((found["epoch"], found["sites"]))
        if found["epoch"] == 0:
            self.start_levels = found.get("levels", {})


def _sites(model: nn.Module) -> Sites:
    return {name: measure(site, levels=False).plain() for name, site in sites_of(model).items()}


def _levels(model: nn.Module) -> dict[str, list[int]]:
    found = {name: level_counts(site) for name, site in sites_of(model).items()}
    return {name: list(counts) for name, counts in found.items() if counts}


class StepLog(Part):
    """Writes `steps.csv`: mean loss of the last ten steps, learning rates, norm of the gradient, images per second.

    Attributes:
        rows: `(step, loss)` of the lines so far, of the whole run.
        last: The last line as numbers by column, or None.
    """

    name: ClassVar[str] = "steps"

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[tuple[int, float]] = []
        self.last: dict[str, Any] | None = None
        self._sum, self._count, self._step = 0.0, 0, 0
        self._resumed = False
        self._file: Appended | None = None
        self._seen = (0, 0.0)  # inputs and seconds of the epoch when the last line was written

    def before_epoch(self, epoch: int) -> None:
        """Open the file: a new one, or what the checkpoint knows of it."""
        run = self.run
        self._seen = (run.position.meter.inputs, run.position.seconds)
        if self._file is not None or run.folder is None:
            return
        self._file = Appended(run.folder / "steps.csv")
        if not self._resumed:
            self._file.clear()
        kept = self._file.keep(lambda line: line == ",".join(COLUMNS) or int(line.split(",")[0]) <= self._step)
        self.rows = [(int(cells[0]), float(cells[2])) for cells in (line.split(",") for line in kept[1:])]
        if not kept:
            self._file.add(",".join(COLUMNS))

    def after_step(self, step: Step) -> None:
        """Count a step; write a line when it is the tenth."""
        run = self.run
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
        """Go on with what `meta` returned; lines of later steps are dropped when the file is opened."""
        self._step, self._sum, self._count = meta["step"], meta["sum"], meta["count"]
        self._resumed = True
