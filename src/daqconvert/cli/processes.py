"""The processes of one run, as `accelerate launch` and `torchrun` start them: the first prints and writes files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from torch import nn

from daqconvert.training import Recipe
from daqconvert.training.processes import launched

T = TypeVar("T")


def count() -> int:
    """Return how many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the process that prints and writes files."""
    return number() == 0


class ProcessGroup(Protocol):
    """What the command line asks of the processes of a run."""

    def from_main(self, make: Callable[[], T]) -> T:
        """Return on every process what `make` returns on the main one."""

    def agree(self, model: nn.Module) -> None:
        """Copy a model's parameters and buffers from the main process to all."""


class SingleProcess:
    """A run on one process, which has no other to agree with."""

    def from_main(self, make: Callable[[], T]) -> T:
        """Return what `make` returns."""
        return make()

    def agree(self, model: nn.Module) -> None:
        """Leave a model as it is."""


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yield the processes among which this one was started.

    Example:
        >>> with process_group() as processes:
        ...     processes.from_main(lambda: 1)
        1
    """
    if count() == 1:
        yield SingleProcess()
        return
    with launched(nn.Module(), Recipe(precision="no")) as processes:
        yield processes
