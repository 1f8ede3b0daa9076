"""Where bounds, scales and weights were after every epoch: `snapshots.jsonl`, an object a line, epoch 0 first.

    {"epoch": 3, "sites": {"layer1.0.conv1": {"bits": [2, 2], "weight": [-2.9, 3.1], ...}}}

`levels`, the number of weights on each level, stands in the first line and in one that is written at the end.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from daqconvert.training.appended import Appended
from daqconvert.training.parts.asking import writes
from daqconvert.training.parts.base import Part
from daqconvert.training.parts.measures import level_counts, measure, sites_of

if TYPE_CHECKING:
    from daqconvert.training.engine import Run
    from daqconvert.training.logs import Row

Sites = dict[str, dict[str, Any]]


class Snapshots(Part):
    """Writes `snapshots.jsonl`, and keeps its contents for the report.

    Attributes:
        moments: `(epoch, measures by site)`, as far as known.
        start_levels: Weights on each level before the first step, by site.
    """

    name: ClassVar[str] = "snapshots"

    def __init__(self) -> None:
        self.moments: list[tuple[int, Sites]] = []
        self.start_levels: dict[str, list[int]] = {}
        self._epoch = 0
        self._resumed = False
        self._file: Appended | None = None

    def before_epoch(self, run: Run, epoch: int) -> None:
        """Open the file: a new one, or what the checkpoint knows of it."""
        if self._file is not None or not writes(run):
            return
        assert run.directory is not None
        self._file = Appended(run.directory.path / "snapshots.jsonl")
        if not self._resumed:
            self._file.clear()
        for line in self._file.keep(lambda line: json.loads(line)["epoch"] <= self._epoch):
            self._take(json.loads(line))
        if not self._resumed:
            self._add({"epoch": 0, "sites": _sites(run), "levels": _levels(run)})

    def after_epoch(self, run: Run, row: Row) -> None:
        """Add a line."""
        self._epoch = row["epoch"]
        if self._file is not None:
            self._add({"epoch": self._epoch, "sites": _sites(run)})

    def finish(self, run: Run) -> None:
        """Add where the weights lie at the end."""
        if self._file is not None:
            self._add({"epoch": self._epoch, "levels": _levels(run)})

    def meta(self) -> Any:
        """Return the last epoch that has a line."""
        return {"epoch": self._epoch}

    def load(self, tensors: dict[str, Tensor], meta: Any) -> None:
        """Go on after what `meta` returned; lines of later epochs go when the file is opened."""
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


def _sites(run: Run) -> Sites:
    return {name: measure(site, levels=False).plain() for name, site in sites_of(run.model).items()}


def _levels(run: Run) -> dict[str, list[int]]:
    found = {name: level_counts(site) for name, site in sites_of(run.model).items()}
    return {name: list(counts) for name, counts in found.items() if counts}
