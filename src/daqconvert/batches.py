"""Taking batches apart, and calling a model on one.

A batch is a tensor, a tuple or list whose first entry is the input and second the target, or a mapping of keyword
arguments, whose target is under one of `TARGET_KEYS`. A mapping is a dict or anything else with names for its values:
`collections.abc.Mapping`, a `UserDict` such as Hugging Face's `BatchEncoding`, a dataclass.
For a model whose forward needs several inputs, these are given as they are passed to `export`: `(a, b)`, with a target
`(a, b, target)` or `((a, b), target)`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from daqconvert.errors import DataError

TARGET_KEYS = ("target", "label", "labels")


def split_batch(batch: Any, model: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the positional arguments, the keyword arguments and the target of a batch; the target may be None.

    Without a model it is taken to need one input.

    Raises:
        DataError: If the batch is not a tensor, a non-empty tuple or list, or a mapping with texts as its keys.

    Example:
        >>> split_batch((torch.zeros(2, 3), torch.tensor([0, 1])))[2].tolist()
        [0, 1]
        >>> split_batch((torch.zeros(2, 3), torch.ones(2, 3)), nn.Bilinear(3, 3, 1))[2] is None
        True
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    fields = getattr(batch, "_fields", ()) if isinstance(batch, tuple) else ()
    if not set(TARGET_KEYS).isdisjoint(fields) and len(fields) > 1:
        batch = batch._asdict()  # a named tuple that says which entry is the target
        if len(fields) == 2:  # the other is the input, whatever the model calls it
            key = next(key for key in TARGET_KEYS if key in batch)
            target = batch.pop(key)
            return tuple(batch.values()), {}, target
    kwargs = named_values(batch)
    if kwargs is not None and all(isinstance(key, str) for key in kwargs):
        target = next((kwargs.pop(key) for key in TARGET_KEYS if key in kwargs), None)
        return (), kwargs, target
    if isinstance(batch, (tuple, list)) and batch:
        return _positional(batch, 1 if model is None else needed_inputs(model))
    found = type(batch).__name__ + (" of length 0" if isinstance(batch, (tuple, list)) else "")
    raise DataError(
        f"batch: expected a tensor, a tuple or list (input, target), or a dict of keyword arguments; found {found}."
    )


def named_values(batch: Any) -> dict[str, Any] | None:
    """Return the values of a mapping or a dataclass by name; None for anything else.

    Example:
        >>> from collections import UserDict
        >>> named_values(UserDict(x=1)), named_values([1])
        ({'x': 1}, None)
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def _positional(batch: Sequence[Any], needed: int) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    first, rest = batch[0], batch[1:]
    if needed > 1 and isinstance(first, (tuple, list)):
        return tuple(first), {}, rest[0] if rest else None
    if needed > 1 and len(batch) in (needed, needed + 1):
        return tuple(batch[:needed]), {}, batch[needed] if len(batch) > needed else None
    return (first,), {}, rest[0] if rest else None


def needed_inputs(model: nn.Module) -> int:
    """Return how many positional inputs the forward of a model cannot do without; 1 where it does not say.

    Example:
        >>> needed_inputs(nn.Linear(2, 2)), needed_inputs(nn.Bilinear(2, 2, 2))
        (1, 2)
    """
    while hasattr(model, "_orig_mod"):  # compiled
        model = model._orig_mod  # type: ignore[assignment]
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    wanted = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(one.kind in wanted and one.default is inspect.Parameter.empty for one in parameters))


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a nested structure to a device; mappings and dataclasses keep their class."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=True)
        values = named_values(leaf)
        if values is None:
            return leaf
        found = {key: to_device(item, device) for key, item in values.items()}
        if isinstance(leaf, MutableMapping):
            leaf = copy.copy(leaf)
            leaf.update(found)
            return leaf
        return found if isinstance(leaf, Mapping) else dataclasses.replace(leaf, **found)

    return tree_map(moved, value)


def model_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has neither."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model on the inputs of a batch, moved to the model's device; the target is not used."""
    args, kwargs, _ = split_batch(batch, model)
    device = model_device(model)
    return model(*to_device(args, device), **to_device(kwargs, device))


class Enough(BaseException):
    """Raised by a hook to end a forward early. It is not an `Exception`, so that no model catches it by accident."""


def run_batch_until(model: nn.Module, batch: Any) -> None:
    """Call a model on the inputs of a batch until it returns or a hook raises `Enough`."""
    with suppress(Enough):
        run_batch(model, batch)


def batch_size(batch: Any) -> int:
    """Return the length of the first tensor among the inputs of a batch; 1 if there is none."""
    args, kwargs, _ = split_batch(batch)
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    return 1


def is_empty(batch: Any) -> bool:
    """Whether all tensors among the inputs of a batch are without elements; False if there is none.

    Example:
        >>> is_empty((torch.zeros(0, 3), torch.zeros(0))), is_empty(torch.zeros(1))
        (True, False)
    """
    return no_elements(split_batch(batch)[:2])


def no_elements(inputs: Any) -> bool:
    """Whether a nested structure has tensors, all without elements."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(tensor.numel() == 0 for tensor in tensors)
