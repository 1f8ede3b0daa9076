"""What happens before the first step of a run is not for every layer; none is skipped in silence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from daqconvert.training.engine import Run

LOGGER = logging.getLogger(__name__)
SHOWN = 3


class _Row(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def left_alone(self) -> str: ...


def warn_of_left(run: Run, field: str, what: str, rows: Sequence[_Row]) -> None:
    """Warn, once for all processes, of what was left alone: how many of how many, the first names, and why.

    Args:
        run: Whose main process warns.
        field: Of the recipe.
        what: Becomes of them, as `"layers keep their levels"`.
        rows: Of all; `left_alone` says why, or is `""`.
    """
    left = [row for row in rows if row.left_alone]
    if left and run.processes.is_main:
        names = ", ".join(f"{row.name} ({row.left_alone})" for row in left[:SHOWN])
        more = ", ..." if left[SHOWN:] else ""
        LOGGER.warning("%s: %d of %d %s: %s%s.", field, len(left), len(rows), what, names, more)
