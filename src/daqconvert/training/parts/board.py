"""Scalars for TensorBoard in `tensorboard/` of the run directory, where it is installed (extra `log`).

`tensorboard --logdir runs` shows all runs. A resumed run goes on in the same curves: what was written after the
checkpoint is not shown.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from daqconvert.training.parts.asking import part_of, writes
from daqconvert.training.parts.base import Part, Step
from daqconvert.training.parts.measures import measure, sites_of
from daqconvert.training.parts.oscillation import Oscillation
from daqconvert.training.parts.steps import StepLog

if TYPE_CHECKING:
    from daqconvert.training.engine import Run
    from daqconvert.training.logs import Row


class Board(Part):
    """Writes scalars: `step/...` every ten steps, `epoch/...` the columns of the history, `SITE/...` of each layer."""

    name: ClassVar[str] = "board"

    def __init__(self) -> None:
        self._step = 0
        self._resumed = False
        self._writer: Any = None

    def before_epoch(self, run: Run, epoch: int) -> None:
        """Open the log, if there is something to write it with."""
        if self._writer is not None or not writes(run):
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        assert run.directory is not None
        folder = run.directory.path / "tensorboard"
        if not self._resumed:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink(missing_ok=True)
        purge = self._step + 1 if self._resumed else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=30)
        weakref.finalize(self, self._writer.close)  # whatever ends the run

    def after_step(self, run: Run, step: Step) -> None:
        """Write what `steps.csv` has just got."""
        self._step = step.number
        log = part_of(run, StepLog)
        if self._writer is None or log is None or log.last is None:
            return
        for key, value in log.last.items():
            if key not in ("step", "epoch") and value is not None:
                self._writer.add_scalar(f"step/{key}", value, step.number)

    def after_epoch(self, run: Run, row: Row) -> None:
        """Write the row of the history, and where bounds and scales are."""
        if self._writer is None:
            return
        for key, value in row.items():
            if key not in ("step", "epoch") and isinstance(value, (int, float)):
                self._writer.add_scalar(f"epoch/{key}", value, self._step)
        oscillation = part_of(run, Oscillation)
        shares = {} if oscillation is None else oscillation.shares
        for name, site in sites_of(run.model).items():
            for key, value in _scalars(measure(site, levels=False).plain()):
                self._writer.add_scalar(f"{name}/{key}", value, self._step)
            if name in shares:
                self._writer.add_scalar(f"{name}/oscillating", shares[name][0], self._step)
        self._writer.flush()

    def finish(self, run: Run) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()

    def meta(self) -> Any:
        """Return the last step."""
        return {"step": self._step}

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Go on after what `meta` returned."""
        self._step, self._resumed = meta["step"], True


def _scalars(found: dict[str, Any]) -> list[tuple[str, float]]:
    names = {"weight": ("lower", "upper"), "input": ("lower", "upper"), "scale": ("least", "mean", "largest")}
    return [
        (f"{key}_{part}", value)
        for key, parts in names.items()
        if found[key] is not None
        for part, value in zip(parts, found[key], strict=True)
    ]
