"""Which parts a recipe needs, in the one order in which they are asked.

First the average of the weights, then what changes the model or holds it still (batch norms, bounds, widths,
oscillating weights), then what watches and stops, and last what writes down. Contexts of `evaluating` open in the same
order, so that batch norms are estimated for the averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable

from daqconvert.training.parts.base import Part
from daqconvert.training.recipes import Recipe

Make = Callable[[Recipe], Part | None]

MAKERS: tuple[Make, ...] = ()
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
