"""Random state as a function of the place in a run, so that no random state has to be stored.

The order of an epoch is a function of (seed, epoch), a sample of (seed, epoch, index), a step's dropout of (seed,
epoch, step). Whatever draws from torch, numpy, `random`, or a generator of the loader or its sampler is covered, in
workers too. A data set with a random generator of its own is not covered: only the data set could reset
that generator.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


def derived_seed(*parts: Any) -> int:
    """Return a seed, `0 .. 2**63 - 1`, as a function of the texts of its parts, such as seed, epoch and step.

    Example:
        >>> derived_seed(0, 1) == derived_seed(0, 1) != derived_seed(1, 0)
        True
    """
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_generators(value: int, *, devices: bool = False) -> None:
    """Set the random state of torch, numpy and `random`; with `devices` also on accelerators, which is slower."""
    if devices:
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def seed_epoch(seed: int, epoch: int, *loaders: Any) -> None:
    """Set the random state of torch, numpy, `random` and the loaders for one epoch.

    Epochs count from 1; 0 is the calibration. A loader or sampler with `set_epoch` is told the epoch. Persistent
    workers are started again, because their random state would go on from one epoch to the next. A loader that is None
    is skipped.
    """
    value = derived_seed(seed, epoch)
    seed_generators(value, devices=True)
    for loader in loaders:
        for part in parts_of(loader):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)
        if isinstance(loader, DataLoader) and loader.persistent_workers:
            loader._iterator = None  # torch has no public way to end persistent workers
    for generator in _generators(*loaders):
        generator.manual_seed(value)


@contextmanager
def preserved_random_state(*loaders: Any) -> Iterator[None]:
    """Restore the random state of torch, numpy, `random` and the loaders' generators after the context.

    A loader that is None is skipped; a `torch.Generator` may stand in the place of a loader.
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
    """Return the generators of loaders, their data sets and samplers, each once; a generator may stand by itself."""
    plain = [loader for loader in loaders if isinstance(loader, torch.Generator)]
    others = [loader for loader in loaders if not isinstance(loader, torch.Generator)]
    found = plain + [getattr(part, "generator", None) for loader in others for part in parts_of(loader)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
