"""Where a run stands between two checkpoints: the epoch in progress and what it has measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from daqconvert.training.evaluation import Meter
from daqconvert.training.processes import Processes


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
