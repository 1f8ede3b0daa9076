"""Where the values of a tensor come from, followed operator by operator through a running model.

Kept per storage, so views need no rule. Held by `StorageWeakRef`: a weak reference keeps the storage's address from
being used again, so a stale entry never speaks for another tensor. (A fake tensor's storage is one without memory.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# What returns its operands' values at other places, and zeros beside them
MOVES = frozenset(
    """clone _unsafe_view constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d cat stack index index_select gather take embedding im2col repeat
    repeat_interleave roll flip pixel_shuffle pixel_unshuffle channel_shuffle""".split()
)
BLANKS = frozenset("empty empty_strided empty_like new_empty new_empty_strided zeros zeros_like new_zeros".split())


@dataclass(frozen=True)
class Origin:
    """What is known of the values of one storage.

    Attributes:
        data: Whether they depend on the model's inputs, or are a layer's output.
        origins: Names of the parameters and buffers that they are computed from; empty where `data`.
        quantized: Whether they are what a quantizer returned, moved about at most.
        blank: Whether nothing, or zeros alone, has been written yet.
    """

    data: bool = False
    origins: frozenset[str] = frozenset()
    quantized: bool = False
    blank: bool = False


CONSTANT = Origin()


@dataclass(frozen=True)
class _Facts:
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
    """Sources by storage."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Origin]] = {}

    def of(self, tensor: Tensor | None) -> Origin:
        """Return the source of a tensor; a constant where nothing is known."""
        ref = None if tensor is None else _storage(tensor)
        found = None if ref is None else self._known.get(ref.cdata)
        return CONSTANT if found is None else found[1]

    def set(self, tensor: Tensor, source: Origin) -> None:
        """Say where a tensor's values come from."""
        ref = _storage(tensor)
        if ref is not None:
            self._known[ref.cdata] = (ref, source)

    def mark(self, value: Any, *, given: Any = (), data: bool = False, quantized: bool = False) -> None:
        """Add to what is known of the tensors in `value`.

        Args:
            value: Tensors, nested.
            given: Tensors, nested: what shares memory with one of them stays as it is.
            data: They depend on the model's inputs.
            quantized: They are what a quantizer returned.
        """
        kept = {ref.cdata for t in tensors_in(given) if (ref := _storage(t)) is not None}
        for tensor in tensors_in(value):
            ref = _storage(tensor)
            if ref is not None and ref.cdata not in kept:
                before = self.of(tensor)
                origins = frozenset[str]() if data else before.origins
                self.set(tensor, Origin(before.data or data, origins, before.quantized or quantized))

    def follow(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note the sources of what an operator returned or wrote."""
        facts = _facts(operator)
        inputs = list(tensors_in((args, kwargs)))
        result = self._result(facts, args, kwargs, inputs)
        for i, name in facts.written:
            target = kwargs[name] if name in kwargs else args[i] if i < len(args) else None
            for tensor in tensors_in(target):
                self.set(tensor, result)
        known = {ref.cdata for t in inputs if (ref := _storage(t)) is not None}
        for tensor in tensors_in(out):
            ref = _storage(tensor)
            if ref is not None and ref.cdata not in known:
                self.set(tensor, result)

    def _result(self, facts: _Facts, args: Any, kwargs: Any, inputs: list[Tensor]) -> Origin:
        if facts.creates:
            return Origin(blank=facts.name in BLANKS)
        sources = [self.of(t) for t in inputs]
        if facts.name == "zero_" and sources and sources[0].blank:
            return sources[0]
        data = any(s.data for s in sources)
        origins = frozenset().union(*(s.origins for s in sources)) if sources and not data else frozenset()
        if facts.name == "copy_":  # how padding_mode="circular" fills its memory
            quantized = sources[1].quantized and (sources[0].blank or sources[0].quantized)
        else:
            values = [s for t, s in zip(inputs, sources, strict=True) if t.is_floating_point()]
            quantized = _keeps(facts, args, kwargs) and bool(values) and all(s.quantized for s in values)
        return Origin(data, origins, quantized)


def tensors_in(value: Any, *, deep: bool = False) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings; `deep`: in the attributes of other objects too."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    elif deep and not isinstance(value, (tuple, list, type)) and hasattr(value, "__dict__"):
        value = list(vars(value).values())
        deep = False  # one level: what a detector's ImageList or a graph's batch keeps
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, deep=deep)


def _keeps(facts: _Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operator returns its operands' own values."""
    if facts.name == "constant_pad_nd":
        return not (kwargs.get("value", args[2] if len(args) > 2 else 0))
    if facts.name == "div":  # the float16 path divides integers by the largest of them
        return not isinstance(args[1], Tensor) and not kwargs
    return facts.moves


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    if tensor.layout is not torch.strided:
        return None
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a subclass without memory of its own
        return None
