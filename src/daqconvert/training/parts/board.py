"""Scalars for TensorBoard in `tensorboard/` of the run directory, if tensorboard is installed (extra `log`).

`tensorboard --logdir runs` shows all runs. A resumed run goes on in the same curves: what was written after its
checkpoint is not shown.

The files are written here and not by torch's `SummaryWriter`, which writes from a thread of its own: an error there,
such as a full disk, cannot be caught. The records are the same: torch makes the summaries, tensorboard frames them.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from daqconvert.training.parts.measures import measure, sites_of
from daqconvert.training.parts.oscillation import Oscillation
from daqconvert.training.parts.snapshots import StepLog
from daqconvert.training.run import Part, Step
from daqconvert.training.rundir import Appended, Row, telling


class Board(Part):
    """Writes scalars: `step/...` every ten steps, `epoch/...` the columns of the history, `SITE/...` of each layer.

    Args:
        model: The model in training.
        folder: Where this process writes files, or None.
        steps: The part that makes the scalars of the steps; it has to act before this one.
        oscillation: The part that has the shares of oscillating weights; None where they are not followed.
    """

    name: ClassVar[str] = "board"

    def __init__(self, model: nn.Module, folder: Path | None, steps: StepLog, oscillation: Oscillation | None) -> None:
        self.model, self.folder, self.steps, self.oscillation = model, folder, steps, oscillation
        self._step = 0
        self._resumed = False
        self._file: EventFile | None = None

    def before_epoch(self, epoch: int) -> None:
        """Open the log, if there is something to write it with."""
        if self._file is not None or self.folder is None:
            return
        folder = self.folder / "tensorboard"
        if not self._resumed:
            for old in folder.glob("events.out.tfevents.*"):
                Appended(old).clear()
        with suppress(ImportError):
            self._file = EventFile(folder, self._step + 1 if self._resumed else None)

    def after_step(self, step: Step) -> None:
        """Write the line that `steps.csv` has just got, if it got one."""
        self._step = step.number
        if self._file is None or self.steps.last is None:
            return
        values = {key: value for key, value in self.steps.last.items() if key not in ("step", "epoch")}
        self._file.add(step.number, {f"step/{key}": value for key, value in values.items() if value is not None})

    def after_epoch(self, row: Row) -> None:
        """Write the row of the history, and where bounds and scales are."""
        if self._file is None:
            return
        scalars = {
            f"epoch/{key}": value
            for key, value in row.items()
            if key not in ("step", "epoch") and isinstance(value, (int, float))
        }
        shares = {} if self.oscillation is None else self.oscillation.shares
        for name, site in sites_of(self.model).items():
            found = measure(site, levels=False).plain()
            scalars |= {f"{name}/{key}": value for key, value in _scalars(found)}
            if name in shares:
                scalars[f"{name}/oscillating"] = shares[name][0]
        self._file.add(self._step, scalars)

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


class EventFile:
    """A file of scalars for TensorBoard, in a folder that is made if it is missing.

    With `purge`, a step, TensorBoard does not show what earlier files of the folder hold from that step on.

    Raises:
        ImportError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path, purge: int | None = None) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar

        self._event, self._records, self._scalar = event_pb2.Event, RecordWriter, scalar
        self._told: set[Path] = set()
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{platform.node()}.{os.getpid()}"
        self.path = folder / name
        events = [self._event(wall_time=time.time(), file_version="brain.Event:2")]
        if purge is not None:
            status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            events.append(self._event(wall_time=time.time(), step=purge, session_log=status))
        self._write(events)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars, by tag, for a step."""
        now = time.time()
        self._write(
            [self._event(wall_time=now, step=step, summary=self._scalar(tag, value)) for tag, value in scalars.items()]
        )

    def _write(self, events: list[Any]) -> None:
        framed = io.BytesIO()
        records = self._records(framed)
        for event in events:
            records.write(event.SerializeToString())
        with telling(self.path, self._told):
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("ab") as file:
                file.write(framed.getvalue())
