"""Freezing of bounds: from a share of the run on, bounds and output scales stay as they are, and the weights train on.

Nothing moves them, gradient, momentum and weight decay included: their optimizer rests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from daqconvert.training.optim import QUANTIZERS
from daqconvert.training.parts.base import Part
from daqconvert.training.parts.moments import steps_until
from daqconvert.training.recipes import Recipe

if TYPE_CHECKING:
    from daqconvert.training.engine import Run


class FrozenBounds(Part):
    """Holds the quantizers' parameters still after the first `floor(freeze_bounds_at * total)` steps.

    Args:
        recipe: Gives `freeze_bounds_at`.
    """

    name: ClassVar[str] = "bounds"

    def __init__(self, recipe: Recipe) -> None:
        self.share = recipe.freeze_bounds_at

    def start(self, run: Run) -> None:
        """Find out when that is.

        Raises:
            TrainingError: If the length of the run is unknown.
        """
        self._last = steps_until(run, self.share, "freeze_bounds_at")

    def before_step(self, run: Run, number: int) -> None:
        """Let the optimizer of the quantizers rest when it is time."""
        if number > self._last:
            run.optimizers.resting.add(QUANTIZERS)


def make_bounds(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `freeze_bounds_at` below 1, else None."""
    return FrozenBounds(recipe) if recipe.freeze_bounds_at < 1.0 else None
