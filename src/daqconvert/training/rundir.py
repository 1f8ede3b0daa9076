"""The run directory: which files `finetune` writes, and the rules for a directory that is there already."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from daqconvert.errors import TrainingError
from daqconvert.files import replacing, write_text
from daqconvert.training.checkpoint import NOT_WRITTEN
from daqconvert.training.recipes import Recipe


class RunDirectory:
    """The files of one run; other files in the directory are never touched.

    Attributes:
        path: The directory.
        last: The newest checkpoint: model, optimizers, history, and everything else that a run needs to go on.
        best: The model of the best epoch, where there is a validation loader.
        teacher: The float model that distillation started with.
        log: One line per epoch.
        recipe: The recipe, as TOML.
        checkpoints: Folder of the checkpoints that were `last` before, as `step-00000120.safetensors`.

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
        self.recipe, self.checkpoints = self.path / "recipe.toml", self.path / "checkpoints"
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
        """All files that a run writes, besides earlier checkpoints."""
        return (self.last, self.best, self.teacher, self.log, self.recipe)

    def kept(self) -> list[Path]:
        """Return the earlier checkpoints, the newest first."""
        return sorted(self.checkpoints.glob("step-*.safetensors"), reverse=True)

    def keep_last(self, step: int) -> None:
        """Keep `last` under its step's number, before it is replaced; takes no space until then.

        Args:
            step: Optimizer steps that it holds.

        Raises:
            OSError: If it cannot be kept.
        """
        if not self.last.is_file():
            return
        self.checkpoints.mkdir(exist_ok=True)
        kept = self.checkpoints / f"step-{step:08d}.safetensors"
        kept.unlink(missing_ok=True)
        try:
            os.link(self.last, kept)
        except OSError:  # a file system without links
            with replacing(kept, TrainingError, NOT_WRITTEN) as temporary:
                shutil.copyfile(self.last, temporary)

    def prune(self, keep: int) -> None:
        """Remove the oldest checkpoints but `keep`, `last` among them."""
        for old in self.kept()[keep - 1 :]:
            old.unlink(missing_ok=True)
        if keep == 1 and self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()

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
        for leftover in self.checkpoints.glob(".step-*.tmp"):
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
        for file in (*self.files, *self.kept()):
            file.unlink(missing_ok=True)
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()

    def write_recipe(self, recipe: Recipe) -> None:
        """Write `recipe.toml`, from which the run can be repeated."""
        write_text(self.recipe, recipe.to_toml(), TrainingError, NOT_WRITTEN)

    def drop_if_empty(self) -> None:
        """Remove the directories that were made for this run, if nothing was written."""
        for directory in self._made:
            if not directory.is_dir() or any(directory.iterdir()):
                return
            directory.rmdir()
