"""Modules whose own forward multiplies, each traced alone, and the calls that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from daqconvert.graph.calls import ProductCall, find_calls, keyed
from daqconvert.graph.scan import holds_product, may_multiply, multiplying_methods
from daqconvert.graph.variants import Signature, Untraceable, Variant, read_signature, trace_variants
from daqconvert.layers.lookup import quantized_class
from daqconvert.models import copy_model


@dataclass(frozen=True)
class Traced:
    """A module whose own forward multiplies, with the graphs of that forward.

    Attributes:
        path: Dotted name; the first if the module has several.
        module: The module.
        signature: The arguments of its forward.
        variants: One graph for each way to call it.
        methods: Other methods that multiply by weights, by name: their arguments and graphs.
    """

    path: str
    module: nn.Module
    signature: Signature
    variants: list[Variant]
    methods: dict[str, tuple[Signature, list[Variant]]] = field(default_factory=dict)


def multiplying_modules(paths: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules, by first name, whose own forward may multiply and whose class has no quantized form."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in paths.items():
        cls = type(module)
        if cls.__module__.startswith("torch.nn.") or quantized_class(cls) is not None:
            continue
        if may_multiply(cls) or holds_product(module) or multiplying_methods(cls):
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def trace_modules(paths: dict[str, nn.Module], every: bool = True) -> tuple[list[Traced], dict[str, str]]:
    """Trace the modules that may multiply; return also, by name, why fx could not follow the others.

    Modules that are equal in everything that a trace depends on, such as the blocks of a transformer, are traced once.
    With `every`, each way to call a forward is traced, otherwise only the plain ones (`variants.trace_variants`).
    """
    traced, failed = [], {}
    known: dict[Any, tuple[Any, ...] | str] = {}
    for path, module in multiplying_modules(paths).items():
        alike = fingerprint(module)
        if "forward" in vars(module):
            known[alike] = "its forward was replaced on the object itself"
        if alike not in known:
            try:
                known[alike] = (*trace_variants(module, every), _trace_methods(module, every))
            except Untraceable as error:
                known[alike] = str(error)
        found = known[alike]
        if isinstance(found, str):
            if may_multiply(type(module)) or holds_product(module):
                failed[path] = found
        else:
            traced.append(Traced(path, module, *found))
    return traced, failed


def _trace_methods(module: nn.Module, every: bool) -> dict[str, tuple[Signature, list[Variant]]]:
    """Return the graphs of the other methods that multiply by weights; a method that fx cannot follow is left out."""
    found = {}
    for name in multiplying_methods(type(module)):
        replica = copy_model(module, to_look_at=True)  # a method may change the module
        signature = read_signature(replica, name)
        if signature is None or len(signature.defaults) == len(signature.names):
            continue
        try:
            found[name] = trace_variants(replica, every, name)
        except Untraceable:
            continue
    return found


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Return everything that a trace of a module can depend on: modules with equal fingerprints have equal traces."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        tensors = (*child._parameters.items(), *child._buffers.items())
        shapes = [(key, None if t is None else (type(t).__name__, t.dtype, t.dim(), _shape(t))) for key, t in tensors]
        values = [(k, _plain(v)) for k, v in vars(child).items() if not k.startswith("_") and k != "training"]
        parts.append((name, type(child), tuple(shapes), tuple(values)))
    return tuple(parts)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if isinstance(tensor, UninitializedParameter) else tuple(tensor.shape)


def _plain(value: Any) -> Any:
    """Return what represents an attribute in a fingerprint: a plain value with its type, any other object's `id`."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, type)):
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_plain, value))
    return id(value)


def method_variants(one: Traced) -> list[Variant]:
    """Return the graphs of all methods of a module besides its forward."""
    return [variant for _, variants in one.methods.values() for variant in variants]


def module_calls(one: Traced) -> Iterator[tuple[tuple[Any, ...], ProductCall, Variant]]:
    """Yield each different call of a module once: its key, the call, and the variant whose graph contains it."""
    seen = set()
    for variant in (*one.variants, *method_variants(one)):
        inside = variant not in one.variants
        for key, call in keyed(find_calls(variant.graph, one.module)):
            if key not in seen and not (
                inside and not call.tensors
            ):  # a product of activations is the forward's alone
                seen.add(key)
                yield key, call, variant
