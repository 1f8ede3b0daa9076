"""Which parts a recipe needs, in the one order in which they are asked.

First what changes the model or holds it still (widths, bounds, batch norms, oscillating weights), then the average of
its weights, then what watches and stops, and last what writes down. Contexts of `evaluating` open in the same order,
so that batch norms are estimated for the averaged weights; a resumed run has its widths before the average is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

from daqconvert.training.parts.batch_norm import make_fresh_statistics, make_frozen_batch_norm, make_reestimation
from daqconvert.training.parts.board import Board
from daqconvert.training.parts.ema import make_average
from daqconvert.training.parts.guards import Guards
from daqconvert.training.parts.oscillation import Oscillation
from daqconvert.training.parts.report_page import ReportPage
from daqconvert.training.parts.scheduled import make_bounds, make_progressive, make_sharpening, make_stopping
from daqconvert.training.parts.snapshots import Snapshots, StepLog
from daqconvert.training.recipes import Recipe
from daqconvert.training.run import Part

Make = Callable[[Recipe], Part | None]

MAKERS: tuple[Make, ...] = (
    make_sharpening,  # sees the bits of the plan, before progressive changes them
    make_progressive,
    make_bounds,
    make_frozen_batch_norm,
    make_fresh_statistics,
    make_average,
    Oscillation.wanted,  # within the average, whose frozen weights it puts at their level
    make_reestimation,
    make_stopping,
    Guards,
    lambda recipe: StepLog(),
    lambda recipe: Snapshots(),
    lambda recipe: Board(),
    lambda recipe: ReportPage(),
)
"""Each returns its part, or None where a recipe does not need it."""


def parts_for(recipe: Recipe) -> list[Part]:
    """Return the parts of a run, new ones, for a recipe.

    Args:
        recipe: How to train.

    Example:
        >>> from daqconvert.training.recipes import Recipe
        >>> len(parts_for(Recipe())) == len({part.name for part in parts_for(Recipe())})
        True
    """
    return [part for make in MAKERS if (part := make(recipe)) is not None]
