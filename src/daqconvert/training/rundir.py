"""The run directory: which files `finetune` writes, and the rules for a directory that is there already.

A run needs its checkpoints to go on, so an error in writing one stops the training. `log.csv` has a line per epoch. It
is rewritten as a whole each time, from the history that the checkpoint holds: after an interruption it never has half
a line, nor an epoch that will be trained again. Other files grow line by line (`Appended`); when a run is resumed,
lines that are newer than its checkpoint are dropped from them. Training does not need these files: if one cannot be
written there is one warning, and training goes on.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daqconvert.errors import TrainingError
from daqconvert.files import replacing, write_text
from daqconvert.sources import parse_source
from daqconvert.training.checkpoint import NOT_WRITTEN
from daqconvert.training.recipes import Recipe

PAGE = "report.html"
LOGGER = logging.getLogger("daqconvert.training")

Row = dict[str, Any]
"""What is known of one epoch, by column."""

COLUMNS = (
    "epoch", "step", "lr", "quantizer_lr", "train_loss", "train_top1", "val_loss", "val_top1", "images_per_second",
    "seconds",
)  # fmt: skip


class RunDirectory:
    """The files of one run; other files in the directory are never touched.

    Attributes:
        path: The directory.
        last: The newest checkpoint: model, optimizers, history, and everything else that a run needs to go on.
        best: The model of the best epoch, where there is a validation loader.
        teacher: The float model that distillation started with.
        log: One line per epoch.
        recipe: The recipe, as TOML.
        checkpoints: Folder of earlier states of `last`, as `step-00000120.safetensors`.

    Args:
        out_dir: The directory; created if it is missing.
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
        """The files of `last`, `best`, teacher, log and recipe, which `clear` removes."""
        return (self.last, self.best, self.teacher, self.log, self.recipe)

    def kept(self) -> list[Path]:
        """Return the earlier checkpoints, the newest first."""
        return sorted(self.checkpoints.glob("step-*.safetensors"), reverse=True)

    def keep_last(self, step: int) -> None:
        """Keep `last`, the state after `step` steps, in `checkpoints`; a link takes no space until `last` changes.

        Raises:
            TrainingError: If it cannot be written.
        """
        if not self.last.is_file():
            return
        kept = self.checkpoints / f"step-{step:08d}.safetensors"
        try:
            self.checkpoints.mkdir(exist_ok=True)
            kept.unlink(missing_ok=True)
            os.link(self.last, kept)
        except OSError:  # the file system has no links, or the folder cannot be written to
            with replacing(kept, TrainingError, NOT_WRITTEN) as temporary:
                shutil.copyfile(self.last, temporary)

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the newest `keep`, of which `last` is one."""
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
            for leftover in file.parent.glob(f".{file.name}.*.tmp"):  # left by a process that was killed
                leftover.unlink(missing_ok=True)
        for leftover in self.checkpoints.glob(".step-*.tmp"):
            leftover.unlink(missing_ok=True)
        probe = self.path / ".probe"
        try:
            # a directory that cannot be written to is found now, not an epoch later
            write_text(probe, "", TrainingError)
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


def kept(directory: RunDirectory | None, saved: object = None) -> str:
    """Return what is left of a run that ends early, in words; `saved` is what the last checkpoint holds, if known."""
    if directory is None:
        return "no out_dir was given, so nothing is kept"
    return f"{directory.last} is as it was" if saved is None else f"{directory.last} holds the state after {saved}"


def shell_job(path: Path) -> dict[str, Any]:
    """Return model and data of a run as they were typed on the command line; empty where it was started in Python."""
    file = path / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def resume_command(path: Path, model: str | None) -> str:
    """Return the command that goes on with a run; a model that is code has to be named again.

    Example:
        >>> resume_command(Path("runs/my net"), "nets:build")
        "daqconvert finetune nets:build --out 'runs/my net' --resume"
    """
    named = [model] if model is not None and parse_source(model).kind == "import" else []
    return shlex.join(["daqconvert", "finetune", *named, "--out", str(path), "--resume"])


class Appended:
    """A text file that grows by whole lines; it is created with the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told: set[Path] = set()

    def lines(self) -> list[str]:
        """Return the lines of the file, without a last one that is cut off because its process was killed."""
        if not self.path.is_file():
            return []
        whole, _, _ = self.path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        return whole.split("\n") if whole else []

    def keep(self, wanted: Callable[[str], bool]) -> list[str]:
        """Drop the lines that are not wanted, and return the others.

        A line for which `wanted` raises `ValueError`, `KeyError` or `TypeError` is damaged, and is dropped too.
        """
        kept = []
        for line in self.lines():
            try:
                if wanted(line):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        if self.path.is_file():
            with telling(self.path, self._told):
                write_text(self.path, "".join(f"{line}\n" for line in kept), TrainingError)
        return kept

    def clear(self) -> None:
        """Remove the file."""
        with telling(self.path, self._told):
            self.path.unlink(missing_ok=True)

    def add(self, line: str) -> None:
        """Write a line at the end."""
        with telling(self.path, self._told), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(line + "\n")


@contextmanager
def telling(path: Path, told: set[Path]) -> Iterator[None]:
    """Warn once that a file cannot be written, instead of raising; `told` collects the files that were named."""
    try:
        yield
    except (OSError, TrainingError) as error:
        if path not in told:
            LOGGER.warning("%s: cannot be written (%s); training goes on without it.", path, error)
        told.add(path)


def csv_text(history: Sequence[Mapping[str, Any]]) -> str:
    """Return the history, one row per epoch, as CSV with a header: `COLUMNS`, then other keys of the rows.

    Example:
        >>> csv_text([{"epoch": 1, "train_loss": 0.5}]).splitlines()[1]
        '1,,,,0.5,,,,,'
    """
    stream = io.StringIO()
    columns = list(dict.fromkeys((*COLUMNS, *(key for row in history for key in row))))
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)  # a value of None is written as an empty cell
    return stream.getvalue()


def write_log(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write `log.csv`; raises `TrainingError` if that fails."""
    write_text(path, csv_text(history), TrainingError, NOT_WRITTEN)
