"""What a model is called with and what it returns: the tensors among both, and the names that a file gives them.

An input goes by the name of its argument, an output by its place in the result: `output`, or `output_logits` and
`output_hidden_0` where there are several. Dataclasses, named tuples and mappings are results like any other.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    SequenceKey,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
)

from daqconvert.batches import named_values
from daqconvert.errors import ExportError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def example_arguments(example_inputs: Any, move: bool = True) -> Arguments:
    """Return example inputs as positional and keyword arguments, on the CPU in float32 unless `move` is False.

    Raises:
        ExportError: Unless they are a tensor, a tuple or list of positional arguments or a dict of keyword arguments,
            and hold a tensor.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif (named := named_values(example_inputs)) is not None:
        kwargs = named
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        raise ExportError(
            "export: example_inputs: expected a tensor, a tuple of positional arguments, or a dict of keyword "
            f"arguments with at least one tensor; found {type(example_inputs).__name__}."
        )
    return to_float32((args, kwargs)) if move else (args, kwargs)


def to_float32(value: Any) -> Any:
    """Move every tensor of a nested structure to the CPU, floating-point ones as float32."""
    return tree_map_only(Tensor, lambda t: t.detach().cpu().float() if t.is_floating_point() else t.cpu(), value)


def input_tensors(arguments: Arguments) -> list[Tensor]:
    """Return the tensors among arguments, nested ones too, in order."""
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def input_names(model: nn.Module, arguments: Arguments) -> list[str]:
    """Return a name for each of `input_tensors`: that of its argument and, in a nested one, its place there."""
    args, kwargs = arguments
    try:
        found = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward that is not written in Python
        found = []
    single = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(args)]
    rest = next((p.name for p in found if p.kind == p.VAR_POSITIONAL), "input")
    single += [f"{rest}_{i}" for i in range(len(args) - len(single))]
    return _names([(name, value) for name, value in (*zip(single, args, strict=True), *kwargs.items())])


def keyword_names(kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the tensors among keyword arguments, each with the name that `input_names` gives it."""
    names = _names(list(kwargs.items()))
    return list(zip(names, input_tensors(((), dict(kwargs))), strict=True))


def plain_result(result: Any) -> Any:
    """Return a model's result with dicts for its dataclasses, named tuples and own mappings, nested ones too.

    Example:
        >>> plain_result(torch.max(torch.tensor([[1, 2]]), dim=1))
        (tensor([2]), tensor([1]))
    """
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: plain_result(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        kind: Any = OrderedDict if type(result) is OrderedDict else dict
        return kind((key, plain_result(value)) for key, value in result.items())
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        return {key: plain_result(value) for key, value in result._asdict().items()}
    if isinstance(result, (tuple, list)):
        sequence: Any = list if isinstance(result, list) else tuple
        return sequence(plain_result(value) for value in result)
    return result


def output_tensors(result: Any) -> list[Tensor]:
    """Return the tensors in a model's result, nested ones too, in order."""
    return [leaf for leaf in tree_leaves(plain_result(result)) if isinstance(leaf, Tensor)]


def output_names(result: Any) -> list[str]:
    """Return a name for each of `output_tensors`: `output` if it is the only one, else by its place in the result."""
    names = _names([("output", plain_result(result))])
    return ["output"] if len(names) == 1 else names


def left_out(result: Any) -> list[str]:
    """Return what a result holds besides tensors and None, in words: no file of tensors can give it back.

    Example:
        >>> left_out({"logits": torch.zeros(2), "classes": 2, "loss": None})
        ["['classes'] (int)"]
    """
    leaves = tree_flatten_with_path(plain_result(result))[0]
    others = [(path, leaf) for path, leaf in leaves if not (leaf is None or isinstance(leaf, Tensor))]
    return [f"{''.join(map(str, path)) or 'the result'} ({type(leaf).__name__})" for path, leaf in others]


def _names(values: list[tuple[str, Any]]) -> list[str]:
    """Return distinct names for the tensors of named values: `NAME`, or in a nested value `NAME_PLACE`.

    A dot in a key becomes an underscore, unless another key has that name then.
    """
    found: list[tuple[str, str]] = []
    for name, value in values:
        for path, leaf in tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                words = [_word(key) for key in path]
                found.append(("_".join([name, *(w.replace(".", "_") for w in words)]), "_".join([name, *words])))
    often = Counter(short for short, _ in found)
    return distinct([exact if often[short] > 1 else short for short, exact in found])


def _word(key: Any) -> str:
    """Return the index, key or attribute that a step into a nested value is."""
    if isinstance(key, SequenceKey):
        return str(key.idx)
    return str(key.name if isinstance(key, GetAttrKey) else key.key if isinstance(key, MappingKey) else key)


def distinct(names: list[str], taken: set[str] | None = None) -> list[str]:
    """Return names with a number added to each that is in `taken` or stands in the list before.

    Example:
        >>> distinct(["a", "a", "b"], {"b"})
        ['a', 'a_1', 'b_1']
    """
    used = set(taken or ())
    found = []
    for name in names:
        number, new = 0, name
        while new in used or (number and new in names):
            number += 1
            new = f"{name}_{number}"
        used.add(new)
        found.append(new)
    return found
