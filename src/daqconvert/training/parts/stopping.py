"""Early stopping: training ends when no epoch was better for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from daqconvert.errors import TrainingError
from daqconvert.training.parts.base import Part
from daqconvert.training.recipes import Recipe

if TYPE_CHECKING:
    from daqconvert.training.engine import Run
    from daqconvert.training.logs import Row


class Stopping(Part):
    """Stops a run after `patience` epochs that were not better than the best one on the validation loader.

    Args:
        recipe: Gives `patience`.
    """

    name: ClassVar[str] = "stopping"

    def __init__(self, recipe: Recipe) -> None:
        self.patience = recipe.patience

    def start(self, run: Run) -> None:
        """Check that there is something to be patient with.

        Raises:
            TrainingError: If there is no validation loader.
        """
        if run.val_loader is None:
            raise TrainingError("patience: needs a val_loader to tell which epoch is better. Pass one, or patience=0.")

    def after_epoch(self, run: Run, row: Row) -> None:
        """Say that the run stops, if it does."""
        since = 0 if run.best is None else row["epoch"] - run.best["epoch"]
        if since >= self.patience:
            run.stop = f"no epoch was better than epoch {row['epoch'] - since} for {since} epochs (patience)"


def make_stopping(recipe: Recipe) -> Part | None:
    """Return the part for a recipe with `patience`, else None."""
    return Stopping(recipe) if recipe.patience else None
