"""Epochs over a loader whose n-th batch is a function of (seed, epoch, n), shared out to the processes of a run.

A `DataLoader` over a data set with indices is read through one of our own (`seeded`): there every sample is a function
of (seed, epoch, index), whatever `num_workers`, and batches that are skipped are not loaded. Anything else that gives
batches is read as it is, with the random state set before each of them; batches that are skipped are read again.

Process `r` of `n` takes batch `r` of every `n` in a row; where the last ones are fewer some processes take one of
theirs twice, so that all take as many steps. A loader that was shared out before is not again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from daqconvert.training.batching.loaders import length
from daqconvert.training.batching.seeding import (
    SeededLoader,
    can_be_seeded,
    derived_seed,
    parts_of,
    seed_epoch,
    seed_generators,
)


class Epochs:
    """The epochs of one loader, as one process reads them.

    Args:
        loader: Of the user; read, never changed.
        seed: Of the run.
        index: Number of this process.
        count: How many there are.
        even: Whether all processes get as many batches, some of them twice; else each batch is read once.

    Example:
        >>> epochs = Epochs([0, 1, 2], seed=0, index=1, count=2)
        >>> len(epochs), list(epochs.batches(1)), list(epochs.batches(1, whole=True))
        (2, [1, 2], [0, 1, 2])
    """

    def __init__(self, loader: Any, seed: int, index: int = 0, count: int = 1, *, even: bool = True) -> None:
        self.loader, self.seed, self.even = loader, seed, even
        self._index, self._count = (0, 1) if is_shared(loader) else (index, count)
        self._seeded = SeededLoader(loader, seed) if can_be_seeded(loader) else None

    def __len__(self) -> int:
        """Return the batches that an epoch gives this process, 0 where the loader does not know."""
        total = length(self.loader) or 0
        return -(-total // self._count) if self.even else len(range(self._index, total, self._count))

    def batches(self, epoch: int, skip: int = 0, *, whole: bool = False) -> Iterator[Any]:
        """Yield the batches of an epoch.

        Args:
            epoch: Its number, from 1; 0 is for what comes before training.
            skip: Batches of this process to leave out at the start.
            whole: All batches, the same on every process.

        Yields:
            What the loader gives.
        """
        seed_epoch(self.seed, epoch, self.loader)
        index, count = (0, 1) if whole else (self._index, self._count)
        if self._seeded is not None:
            every = self._seeded.plan()
            yield from self._seeded.read(epoch, self._share(every, index, count)[skip:])
            return
        for group in itertools.islice(self._groups(epoch, count), skip, None):
            yield from self._share(group, index, count)

    def _share(self, batches: list[Any], index: int, count: int) -> list[Any]:
        """What one process takes of some batches in a row."""
        if not self.even:
            return batches[index::count]
        return [batches[(first + index) % len(batches)] for first in range(0, len(batches), count)]

    def _groups(self, epoch: int, count: int) -> Iterator[list[Any]]:
        """Read the loader, `count` batches at a time."""
        seed_generators(derived_seed(self.seed, epoch, "loader"))
        iterator = iter(self.loader)
        for first in itertools.count(0, count):
            group = []
            for number in range(first, first + count):
                seed_generators(derived_seed(self.seed, epoch, number, "data"))
                try:
                    group.append(next(iterator))
                except StopIteration:
                    break
            if group:
                yield group
            if len(group) < count:
                return


def is_shared(loader: Any) -> bool:
    """Whether a loader gives each process its own share already: by its sampler, or prepared by Accelerate."""
    prepared = any(kind.__module__.startswith("accelerate.") for kind in type(loader).__mro__)
    return prepared or any(getattr(part, "num_replicas", 1) not in (None, 1) for part in parts_of(loader))
