"""Epochs over a loader whose n-th batch is a function of (seed, epoch, n), shared out to the processes of a run.

A `DataLoader` over a data set with indices is read through a `SeededLoader`: every sample is a function of (seed,
epoch, index), whatever `num_workers`, and batches that are skipped are not loaded. Any other loader is read as it is,
with the random state set before each batch; there, batches that are skipped are read as well.

Process `r` of `n` takes batch `r` of every `n` in a row. If fewer than `n` remain at the end, some batches are taken
again, so that all processes take as many steps. A loader that is shared out already is read as it
is.
"""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from daqconvert.seeding import derived_seed, parts_of, seed_epoch, seed_generators
from daqconvert.training.batching.loaders import length


class Epochs:
    """The epochs of one loader, as one process reads them.

    Args:
        loader: The user's loader; read, never changed.
        seed: Seed of the run.
        index: Number of this process, from 0.
        count: Number of processes.
        even: Whether all processes get the same number of batches, some of them twice; else each batch is read once.

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
        """Return how many batches an epoch gives this process, 0 if the loader does not know."""
        total = length(self.loader) or 0
        return -(-total // self._count) if self.even else len(range(self._index, total, self._count))

    def batches(self, epoch: int, skip: int = 0, *, whole: bool = False) -> Iterator[Any]:
        """Yield the batches of an epoch.

        Args:
            epoch: Number of the epoch, from 1; 0 is for what comes before training.
            skip: Number of batches of this process to leave out at the start.
            whole: Whether to give every process all batches.

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
        """Return those of some batches in a row that one process takes."""
        if not self.even:
            return batches[index::count]
        return [batches[(first + index) % len(batches)] for first in range(0, len(batches), count)]

    def _groups(self, epoch: int, count: int) -> Iterator[list[Any]]:
        """Yield the loader's batches in groups of `count`, each batch read with its own random state."""
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
    """Return whether each process has its own share of a loader already, by its sampler or by Accelerate."""
    prepared = any(kind.__module__.startswith("accelerate.") for kind in type(loader).__mro__)
    return prepared or any(getattr(part, "num_replicas", 1) not in (None, 1) for part in parts_of(loader))


def can_be_seeded(loader: Any) -> bool:
    """Return whether a loader is a plain `DataLoader` over a data set with indices, which alone decide its batches."""
    plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return plain and not isinstance(loader.dataset, IterableDataset) and hasattr(loader.dataset, "__getitem__")


class SeededDataset(Dataset[Any]):
    """The user's data set, indexed by (epoch, index); the random state is set before each sample is read."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed, self._epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        epoch, index = key
        if epoch != self._epoch and get_worker_info() is not None and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # a persistent worker has a copy of its own
        self._epoch = epoch
        seed_generators(derived_seed(self.seed, epoch, index, "data"))
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # `__getitems__` would bypass `__getitem__`
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SeededLoader:
    """Reads chosen batches of the user's plain `DataLoader`, with workers of its own."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self.loader, self.seed = loader, seed
        self._chosen = _Chosen()
        self._copy: DataLoader[Any] | None = None

    def plan(self) -> list[Any]:
        """Return the indices of each batch of an epoch, as the sampler draws them from the random state now."""
        sampler = self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler
        return list(itertools.islice(sampler, length(self.loader)))

    def read(self, epoch: int, batches: list[Any]) -> Iterator[Any]:
        """Yield what the user's loader would give for these lists of indices (single ones if it does not batch)."""
        single = self.loader.batch_sampler is None
        self._chosen.keys = [(epoch, b) if single else [(epoch, index) for index in b] for b in batches]
        if self._copy is None or not self.loader.persistent_workers:
            self._copy = self._rebuilt(single)
        if batches:
            yield from self._copy

    def _rebuilt(self, single: bool) -> DataLoader[Any]:
        """Return a loader like the user's that reads the chosen keys."""
        loader = self.loader
        choice: dict[str, Any] = {"sampler": self._chosen, "batch_size": None} if single else {}
        if loader.num_workers:
            choice |= {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user's own loader has warned of the same already
            return DataLoader(
                SeededDataset(loader.dataset, self.seed), batch_sampler=None if single else self._chosen,
                num_workers=loader.num_workers, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory,
                timeout=loader.timeout, worker_init_fn=_WorkerStart(loader.worker_init_fn),
                multiprocessing_context=loader.multiprocessing_context, in_order=loader.in_order, **choice,
            )  # fmt: skip


class _Chosen(Sampler[Any]):
    """A sampler that gives the keys which `SeededLoader` has chosen."""

    def __init__(self) -> None:
        self.keys: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _WorkerStart:
    """Start of a worker: it ignores signals, because the training process handles them and ends its workers."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.own = own

    def __call__(self, worker: int) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if self.own is not None:
            self.own(worker)
