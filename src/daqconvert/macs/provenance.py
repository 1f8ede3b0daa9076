"""Where the values of a tensor come from, followed operator by operator through a running model.

An `Origin` is stored for each storage, so a view of a tensor needs no rule of its own. Each entry holds a
`StorageWeakRef`, which keeps the storage's address from being reused, so that an entry which outlives its tensor is
never mistaken for that of another tensor. (A fake tensor has a storage too, one without memory.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MOVES = frozenset(
    """clone _unsafe_view constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d cat stack index index_select gather take embedding im2col repeat
    repeat_interleave roll flip pixel_shuffle pixel_unshuffle channel_shuffle""".split()
)
"""Operators that return the values of their operands at other positions, at most with added padding."""

BLANKS = frozenset("empty empty_strided empty_like new_empty new_empty_strided zeros zeros_like new_zeros".split())
"""Operators that return memory that is uninitialized or all zeros."""


@dataclass(frozen=True)
class Origin:
    """What is known about the values of one storage.

    Attributes:
        data: Whether the values depend on the model's inputs, or are a layer's output.
        tensors: Names of the parameters and buffers that the values are computed from; empty if `data`.
        quantized: Whether a quantizer returned the values; they may have been moved since.
        blank: Whether nothing, or only zeros, has been written to the storage so far.
    """

    data: bool = False
    tensors: frozenset[str] = frozenset()
    quantized: bool = False
    blank: bool = False


CONSTANT = Origin()


@dataclass(frozen=True)
class _Facts:
    """What an operator's schema says about it.

    Attributes:
        name: Name of the operator, without the namespace.
        written: Position and name of each argument that the operator writes into.
        moves: Whether the operator only moves values.
        creates: Whether the result does not depend on the values of any operand.
    """

    name: str
    written: tuple[tuple[int, str], ...]
    moves: bool
    creates: bool


@cache
def _facts(operator: Any) -> _Facts:
    schema = operator._schema
    name = schema.name.partition("::")[2]
    written = tuple(
        (i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    )
    copies = name.endswith("_copy") and not name.startswith("_foreach")
    creates = name in BLANKS or name.startswith("new_") or name.endswith("_like")
    return _Facts(name, written, name in MOVES or copies, creates)


class Provenance:
    """The origins of all tensors seen so far, by storage."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Origin]] = {}

    def of(self, tensor: Tensor | None) -> Origin:
        """Return the origin of a tensor; an unknown tensor is a constant."""
        ref = None if tensor is None else _storage(tensor)
        found = None if ref is None else self._known.get(ref.cdata)
        return CONSTANT if found is None else found[1]

    def knows(self, tensor: Tensor) -> bool:
        """Whether anything was recorded of a tensor; True also if it has no memory to record it by."""
        ref = _storage(tensor)
        return ref is None or ref.cdata in self._known

    def set(self, tensor: Tensor, origin: Origin) -> None:
        """Record where a tensor's values come from."""
        ref = _storage(tensor)
        if ref is not None:
            self._known[ref.cdata] = (ref, origin)

    def mark(self, value: Any, *, given: Any = (), data: bool = False, quantized: bool = False) -> None:
        """Mark the tensors nested in `value` as `data`, as `quantized`, or both, in addition to what is known of them.

        A tensor that shares its memory with one nested in `given` is not marked.
        """
        kept = {ref.cdata for t in tensors_in(given) if (ref := _storage(t)) is not None}
        for tensor in tensors_in(value):
            ref = _storage(tensor)
            if ref is not None and ref.cdata not in kept:
                before = self.of(tensor)
                tensors = frozenset[str]() if data else before.tensors
                self.set(tensor, Origin(before.data or data, tensors, before.quantized or quantized))

    def follow(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Record the origin of the tensors that an operator returned or wrote."""
        facts = _facts(operator)
        inputs = list(tensors_in((args, kwargs)))
        result = self._result(facts, args, kwargs, inputs)
        for i, name in facts.written:
            written = kwargs[name] if name in kwargs else args[i] if i < len(args) else None
            for tensor in tensors_in(written):
                self.set(tensor, result)
        known = {ref.cdata for t in inputs if (ref := _storage(t)) is not None}
        for tensor in tensors_in(out):
            ref = _storage(tensor)
            if ref is not None and ref.cdata not in known:
                self.set(tensor, result)

    def _result(self, facts: _Facts, args: Any, kwargs: Any, inputs: list[Tensor]) -> Origin:
        if facts.creates:
            return Origin(blank=facts.name in BLANKS)
        origins = [self.of(t) for t in inputs]
        if facts.name == "zero_" and origins and origins[0].blank:
            return origins[0]
        data = any(o.data for o in origins)
        tensors = frozenset().union(*(o.tensors for o in origins)) if origins and not data else frozenset()
        if facts.name == "copy_":  # padding_mode="circular" fills its memory this way
            quantized = origins[1].quantized and (origins[0].blank or origins[0].quantized)
        else:
            values = [o for t, o in zip(inputs, origins, strict=True) if t.is_floating_point()]
            quantized = _keeps(facts, args, kwargs) and bool(values) and all(o.quantized for o in values)
        return Origin(data, tensors, quantized)


def tensors_in(value: Any, *, deep: bool = False) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings; with `deep`, also those in attributes of objects."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    elif deep and not isinstance(value, (tuple, list, type)) and hasattr(value, "__dict__"):
        value = list(vars(value).values())
        deep = False  # attributes of one level, such as the tensors of a detector's ImageList or of a graph's batch
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, deep=deep)


def _keeps(facts: _Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operator returns its operands' values, moved at most, so that quantized values stay quantized."""
    if facts.name == "constant_pad_nd":
        return not (kwargs.get("value", args[2] if len(args) > 2 else 0))
    if facts.name == "div":  # the float16 path (`layers.site.safe_products`) divides operands
        return not isinstance(args[1], Tensor) and not kwargs
    return facts.moves


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    if tensor.layout is not torch.strided:
        return None
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a tensor subclass without memory of its own
        return None
