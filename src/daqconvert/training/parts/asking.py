"""What parts ask of a run: whether this process writes files, and for one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from daqconvert.training.parts.base import Part

if TYPE_CHECKING:
    from daqconvert.training.engine import Run

P = TypeVar("P", bound=Part)


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
