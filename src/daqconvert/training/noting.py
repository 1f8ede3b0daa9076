"""What was fitted before the first step of a run: kept with it, and no layer is left alone in silence."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from daqconvert.report.fits import Fitted

if TYPE_CHECKING:
    from daqconvert.training.engine import Run

LOGGER = logging.getLogger(__name__)
SHOWN = 3

Fits = dict[str, list[Fitted]]


def note(run: Run, field: str, what: str, rows: list[Fitted]) -> None:
    """Keep what became of each for the report, and warn, once for all processes, of what was left alone.

    Args:
        run: Whose main process warns: how many of how many, the first names, and why.
        field: Of the recipe.
        what: Becomes of what was left alone, as `"layers keep their levels"`.
        rows: Of all.
    """
    run.fitted[field] = rows
    left = [row for row in rows if row.left_alone]
    if left and run.processes.is_main:
        names = ", ".join(f"{row.name} ({row.left_alone})" for row in left[:SHOWN])
        more = ", ..." if left[SHOWN:] else ""
        LOGGER.warning("%s: %d of %d %s: %s%s.", field, len(left), len(rows), what, names, more)


def to_meta(fitted: Fits) -> dict[str, list[dict[str, Any]]]:
    """Return it as a checkpoint holds it."""
    return {field: [dataclasses.asdict(row) for row in rows] for field, rows in fitted.items()}


def from_meta(about: Mapping[str, list[dict[str, Any]]]) -> Fits:
    """Return what `to_meta` was given."""
    return {field: [Fitted(**row) for row in rows] for field, rows in about.items()}
