"""Checks of a loader and its batches, with errors that say what to pass instead.

A loader is any iterable that can be read again and again: a `DataLoader`, a list of batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch

from daqconvert.batches import split_batch, to_device
from daqconvert.errors import DataError, TrainingError
from daqconvert.training.recipes import Recipe

UNLABELLED = " To train without targets, towards the float model: distill=1.0."

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of the model, of one batch."""


def check_loader(loader: Any, name: str) -> None:
    """Raise unless a loader can be read more than once and is not known to be empty; `name` is the argument's name.

    Raises:
        DataError: If it is not iterable, is an iterator that one pass uses up, or is empty.

    Example:
        >>> check_loader([(torch.zeros(2, 3), torch.zeros(2))], "train_loader")
    """
    if not isinstance(loader, Iterable):
        raise DataError(
            f"{name}: expected an iterable of batches, as a DataLoader or a list; found {type(loader).__name__}."
        )
    if isinstance(loader, Iterator) and length(loader) is None:
        raise DataError(
            f"{name}: expected something that can be read once an epoch, as a DataLoader or a list; found a "
            f"{type(loader).__name__}, which is used up after one pass. Pass the loader itself, or list(...) of it."
        )
    if length(loader) == 0:
        raise DataError(f"{name}: expected at least one batch, found none. Is the data set smaller than a batch?")


def length(loader: Any) -> int | None:
    """Return the number of batches, or None if the loader does not know it, such as a `DataLoader` over a stream."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def check_length(loader: Any, recipe: Recipe) -> None:
    """Raise `TrainingError` if a loader has no length and the schedule has to know where it ends."""
    if length(loader) is None and recipe.schedule != "constant":
        raise TrainingError(
            f"train_loader: has no length, and the {recipe.schedule} schedule has to know where it ends. "
            'Give the loader a __len__, or train with schedule="constant".'
        )


def read_batch(
    batch: Any,
    device: torch.device,
    where: str,
    *,
    needs_target: bool,
    hint: str = "",
    model: torch.nn.Module | None = None,
) -> tuple[Inputs, Any]:
    """Return the inputs of a batch and its target, or None if it has no target, on a device.

    A batch is a tensor; a tuple or list `(input, target)`; or a dict of keyword arguments, with the target under
    `"target"`, `"label"` or `"labels"`; of a `model` that needs several inputs, as `split_batch` says. `where` is the
    place and `hint` the advice in the error's message.

    Raises:
        DataError: If the batch has another form, or no target although it `needs_target`.

    Example:
        >>> pair = (torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> read_batch(pair, torch.device("cpu"), "batch", needs_target=True)[1].tolist()
        [0, 1]
    """
    try:
        args, kwargs, target = split_batch(batch, model)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if target is None and needs_target:
        raise DataError(
            f"{where}: expected a target: a tuple or list (input, target), or a dict with one under target, label or "
            f"labels; found {_describe(batch)}.{hint}"
        )
    return (to_device(args, device), to_device(kwargs, device)), to_device(target, device)


def _describe(batch: Any) -> str:
    if isinstance(batch, torch.Tensor):
        return f"a tensor of shape {tuple(batch.shape)} alone"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(str, batch)) or 'nothing'}"
    return f"a {type(batch).__name__} of {len(batch)}"


def inputs_count(inputs: Inputs) -> int:
    """Return the length of the first tensor of a batch's inputs, 1 where there is none."""
    args, kwargs = inputs
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim()]
    return int(tensors[0].shape[0]) if tensors else 1
