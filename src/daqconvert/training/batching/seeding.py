"""Random state as a function of where a run is, so that nothing of it has to be stored.

An epoch's order is a function of (seed, epoch), a sample's of (seed, epoch, index), a step's dropout of (seed, epoch,
step). What draws from torch, numpy, `random`, or a generator of the loader or its sampler is covered, in workers too.
A data set with a random generator of its own is not: nobody else can set it back.

A `DataLoader` like the user's in which a sample's random numbers are a function of (seed, epoch, index).
"""

from __future__ import annotations

import hashlib
import itertools
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from daqconvert.training.batching.loaders import length


def derived_seed(*parts: Any) -> int:
    """Return a seed, `0 .. 2**63 - 1`, that is a function of everything that tells one moment from another.

    Args:
        *parts: As seed, epoch and step; their texts count.

    Example:
        >>> derived_seed(0, 1) == derived_seed(0, 1) != derived_seed(1, 0)
        True
    """
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_generators(value: int, *, devices: bool = False) -> None:
    """Set the random state of torch, numpy and `random`.

    Args:
        value: The seed.
        devices: Of torch's generators on accelerators too; slower.
    """
    if devices:
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def seed_epoch(seed: int, epoch: int, *loaders: Any) -> None:
    """Set the random state of torch, numpy, `random` and the loaders for one epoch.

    A loader or sampler with `set_epoch` is told the epoch. Workers that persist start anew, for their random state
    goes on from one epoch to the next.

    Args:
        seed: Of the run.
        epoch: Its number, from 1; 0 for the calibration.
        *loaders: Loaders that the epoch reads; None is passed over.
    """
    value = derived_seed(seed, epoch)
    seed_generators(value, devices=True)
    for loader in loaders:
        for part in parts_of(loader):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)
        if isinstance(loader, torch.utils.data.DataLoader) and loader.persistent_workers:
            loader._iterator = None  # torch has no public way to end persistent workers
    for generator in _generators(*loaders):
        generator.manual_seed(value)


@contextmanager
def preserved_random_state(*loaders: Any) -> Iterator[None]:
    """Give torch, numpy, `random` and the loaders' generators their random state back afterwards.

    Args:
        *loaders: Loaders whose generators are given back; None is passed over.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    states = [(generator, generator.get_state()) for generator in _generators(*loaders)]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for generator, state in states:
                generator.set_state(state)


def parts_of(loader: Any) -> list[Any]:
    """Return a loader, its data set and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = [
        loader,
        getattr(loader, "dataset", None),
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    unique = {id(part): part for part in parts if part is not None}
    return list(unique.values())


def _generators(*loaders: Any) -> list[torch.Generator]:
    found = [getattr(part, "generator", None) for loader in loaders for part in parts_of(loader)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


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
