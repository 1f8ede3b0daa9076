"""Modules whose own forward multiplies, each traced alone, and the calls that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from daqconvert.graph.calls import ProductCall, find_calls, keyed
from daqconvert.graph.scan import may_multiply
from daqconvert.graph.variants import Signature, Untraceable, Variant, trace_variants
from daqconvert.layers.registry import quantized_class


@dataclass(frozen=True)
class Traced:
    """A module whose own forward multiplies, and how."""

    path: str
    module: nn.Module
    signature: Signature
    variants: list[Variant]


def multiplying_modules(paths: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules whose own forward may multiply and no swap of classes covers, each under its first name."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in paths.items():
        cls = type(module)
        if cls.__module__.startswith("torch.nn.") or quantized_class(cls) is not None:
            continue
        if may_multiply(cls):
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def trace_modules(paths: dict[str, nn.Module]) -> tuple[list[Traced], dict[str, str]]:
    """Trace the modules that may multiply; return also, by name, why fx could not follow the others.

    Args:
        paths: Any dotted name -> module.
    """
    traced, failed = [], {}
    for path, module in multiplying_modules(paths).items():
        try:
            traced.append(Traced(path, module, *trace_variants(module)))
        except Untraceable as error:
            failed[path] = str(error)
    return traced, failed


def module_calls(one: Traced) -> Iterator[tuple[tuple[Any, ...], ProductCall, Variant]]:
    """Yield each different call of a module once: key, call, and the graph that it stands in."""
    seen = set()
    for variant in one.variants:
        for key, call in keyed(find_calls(variant.graph, one.module)):
            if key not in seen:
                seen.add(key)
                yield key, call, variant
