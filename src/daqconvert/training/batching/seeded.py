"""A `DataLoader` like the user's in which a sample's random numbers are a function of (seed, epoch, index)."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from daqconvert.training.batching.loaders import length
from daqconvert.training.batching.seeding import derived_seed, seed_generators


def can_be_seeded(loader: Any) -> bool:
    """Whether a loader is a plain `DataLoader` over a data set with indices: nothing else decides what it gives."""
    plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return plain and not isinstance(loader.dataset, IterableDataset) and hasattr(loader.dataset, "__getitem__")


class SeededDataset(Dataset[Any]):
    """A data set that is asked for (epoch, index), and sets the random state before it reads.

    Args:
        dataset: The user's.
        seed: Of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed, self._epoch = dataset, seed, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        epoch, index = key
        if epoch != self._epoch and get_worker_info() is not None and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # a worker that persists has a copy that nobody else can tell
        self._epoch = epoch
        seed_generators(derived_seed(self.seed, epoch, index, "data"))
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # not `__getitems__`: it would pass us by
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SeededLoader:
    """Reads chosen batches of a plain `DataLoader`, with its own workers.

    Args:
        loader: The user's.
        seed: Of the run.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self.loader, self.seed = loader, seed
        self._chosen = _Chosen()
        self._copy: DataLoader[Any] | None = None

    def plan(self) -> list[Any]:
        """Return the indices of each batch of an epoch, as the sampler draws them from the random state now."""
        sampler = self.loader.sampler if self.loader.batch_sampler is None else self.loader.batch_sampler
        return list(itertools.islice(sampler, length(self.loader)))

    def read(self, epoch: int, batches: list[Any]) -> Iterator[Any]:
        """Yield the batches of these indices.

        Args:
            epoch: Of which they are.
            batches: Lists of indices; single indices where the loader does not batch.

        Yields:
            What the user's loader would.
        """
        single = self.loader.batch_sampler is None
        self._chosen.keys = [(epoch, b) if single else [(epoch, index) for index in b] for b in batches]
        if self._copy is None or not self.loader.persistent_workers:
            self._copy = self._rebuilt(single)
        if batches:
            yield from self._copy

    def _rebuilt(self, single: bool) -> DataLoader[Any]:
        loader = self.loader
        choice: dict[str, Any] = {"sampler": self._chosen, "batch_size": None} if single else {}
        if loader.num_workers:
            choice |= {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever there is to say was said when the user made the loader
            return DataLoader(
                SeededDataset(loader.dataset, self.seed), batch_sampler=None if single else self._chosen,
                num_workers=loader.num_workers, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory,
                timeout=loader.timeout, worker_init_fn=_WorkerStart(loader.worker_init_fn),
                multiprocessing_context=loader.multiprocessing_context, in_order=loader.in_order, **choice,
            )  # fmt: skip


class _Chosen(Sampler[Any]):
    """Batches of keys, chosen from outside."""

    def __init__(self) -> None:
        self.keys: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _WorkerStart:
    """What a worker does first: leave signals to the process that trains, which ends it when it stops itself."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.own = own

    def __call__(self, worker: int) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if self.own is not None:
            self.own(worker)
