"""Whether a module's code could multiply matrices by itself: read off its bytecode, so that few modules need a trace.

Followed are the forward, the methods of the class that it names, and the functions that it names outside torch.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from daqconvert.layers.operations import METHODS, NAMES

PRODUCT_NAMES = frozenset({*NAMES, *METHODS, "einsum", "_conv_forward", "bilinear", "deform_conv2d"})
PRODUCT_NAMES |= {"scaled_dot_product_attention", "multi_head_attention_forward"}
_OPERATORS = {"@", "@="}
_KNOWN: dict[type[nn.Module], bool] = {}


def may_multiply(cls: type[nn.Module]) -> bool:
    """Return whether the forward of a class names a product of matrices anywhere.

    Args:
        cls: Class of a module.

    Example:
        >>> may_multiply(nn.Sequential), may_multiply(nn.Linear)
        (False, True)
    """
    if cls not in _KNOWN:
        _KNOWN[cls] = _search(cls, list(_functions_of(cls, "forward")))
    return _KNOWN[cls]


@cache
def function_may_multiply(function: FunctionType) -> bool:
    """Return whether a function names a product of matrices anywhere."""
    return _search(object, [function])


def _search(cls: type, waiting: list[FunctionType]) -> bool:
    seen: set[CodeType] = set()
    while waiting:
        function = waiting.pop()
        for code in _codes(function.__code__):
            if code in seen:
                continue
            seen.add(code)
            if PRODUCT_NAMES & {*code.co_names} or _has_operator(code):
                return True
            for name in code.co_names:
                waiting.extend(_functions_of(cls, name))
                waiting.extend(_own_function(function.__globals__.get(name)))
    return False


def _functions_of(cls: type, name: str) -> Iterator[FunctionType]:
    """What a method name may call, `super()` included; `nn.Module`'s own methods compute nothing."""
    for base in cls.__mro__:
        value = vars(base).get(name)
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if base is not nn.Module and isinstance(value, FunctionType):
            yield value


def _own_function(value: Any) -> Iterator[FunctionType]:
    value = getattr(value, "__wrapped__", value)
    if isinstance(value, FunctionType) and not value.__module__.startswith("torch."):
        yield value


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _has_operator(code: CodeType) -> bool:
    return any(i.opname.startswith("BINARY_") and i.argrepr in _OPERATORS for i in dis.get_instructions(code))
