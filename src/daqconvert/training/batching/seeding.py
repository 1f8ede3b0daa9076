"""Random state as a function of where a run is, so that nothing of it has to be stored.

An epoch's order is a function of (seed, epoch), a sample's of (seed, epoch, index), a step's dropout of (seed, epoch,
step). What draws from torch, numpy, `random`, or a generator of the loader or its sampler is covered, in workers too.
A data set with a random generator of its own is not: nobody else can set it back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


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
