"""Files that grow line by line while a run goes on: what a checkpoint knows nothing of is dropped when it is resumed.

Such files are for looking at; training needs none of them. So one that cannot be written is told of once, and training
goes on: what must not be lost is in the checkpoints, whose errors stop it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from daqconvert.errors import TrainingError
from daqconvert.files import write_text

LOGGER = logging.getLogger("daqconvert.training")


class Appended:
    """A text file of whole lines.

    Args:
        path: The file; made by the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told: set[Path] = set()

    def lines(self) -> list[str]:
        """Return its lines; the last one is left out where it was cut off, as by a process that was killed."""
        if not self.path.is_file():
            return []
        whole, _, _ = self.path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        return whole.split("\n") if whole else []

    def keep(self, wanted: Callable[[str], bool]) -> list[str]:
        """Drop the lines that are not wanted, and return the others.

        Args:
            wanted: Called with each line; one that raises `ValueError`, `KeyError` or `TypeError` is not wanted.
        """
        kept = []
        for line in self.lines():
            try:
                if wanted(line):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # damaged
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
        """Write one more line."""
        with telling(self.path, self._told), self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(line + "\n")


@contextmanager
def telling(path: Path, told: set[Path]) -> Iterator[None]:
    """Say once that a file cannot be written, instead of raising.

    Args:
        path: The file.
        told: The files of which it was said; added to.
    """
    try:
        yield
    except (OSError, TrainingError) as error:
        if path not in told:
            LOGGER.warning("%s: cannot be written (%s); training goes on without it.", path, error)
        told.add(path)
