"""The run directory: which files `finetune` writes, and the rules for a directory that is there already."""

from __future__ import annotations

from pathlib import Path

from daqconvert.errors import TrainingError
from daqconvert.files import write_text
from daqconvert.training.checkpoint import NOT_WRITTEN
from daqconvert.training.recipes import Recipe


class RunDirectory:
    """The files of one run; other files in the directory are never touched.

    Attributes:
        path: The directory.
        last: Checkpoint after the last whole epoch: model, optimizers, history.
        best: The model of the best epoch, where there is a validation loader.
        teacher: The float model that distillation started with.
        log: One line per epoch.
        recipe: The recipe, as TOML.

    Args:
        out_dir: The directory; made where it is not there.
        resume: Go on with the checkpoint in it, if there is one.
        overwrite: Replace the run in it.

    Raises:
        TrainingError: If it cannot be written to, is no directory, or is not empty and neither `resume` nor
            `overwrite` is set.
    """

    def __init__(self, out_dir: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(out_dir)
        self.last, self.best = self.path / "last.safetensors", self.path / "best.safetensors"
        self.teacher, self.log = self.path / "teacher.safetensors", self.path / "log.csv"
        self.recipe = self.path / "recipe.toml"
        self._made: list[Path] = []
        try:
            self._open(resume, overwrite)
        except OSError as error:
            self.drop_if_empty()
            raise TrainingError(
                f"out_dir {self.path}: cannot be used ({error.strerror or error}). Choose a directory that can be "
                "written to."
            ) from None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that a run writes."""
        return (self.last, self.best, self.teacher, self.log, self.recipe)

    def _open(self, resume: bool, overwrite: bool) -> None:
        if self.path.is_dir() and any(self.path.iterdir()) and not (resume or overwrite):
            hint = "resume=True to go on, overwrite=True to start again" if self.last.exists() else "overwrite=True"
            raise TrainingError(f"out_dir {self.path}: exists and is not empty. Pass {hint}, or choose another.")
        missing = [parent for parent in (self.path, *self.path.parents) if not parent.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._made = missing
        for file in self.files:
            for leftover in file.parent.glob(f".{file.name}.*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        probe = self.path / ".probe"
        try:
            write_text(
                probe, "", TrainingError
            )  # a directory that cannot be written to is found now, not an epoch later
        except TrainingError as error:
            raise error.__cause__ or error from None
        probe.unlink()

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        for file in self.files:
            file.unlink(missing_ok=True)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write `recipe.toml`, from which the run can be repeated."""
        write_text(self.recipe, recipe.to_toml(), TrainingError, NOT_WRITTEN)

    def drop_if_empty(self) -> None:
        """Remove the directories that were made for this run, if nothing was written."""
        for directory in self._made:
            if not directory.is_dir() or any(directory.iterdir()):
                return
            directory.rmdir()
