"""Whether a module's code could multiply matrices itself, judged from its bytecode, so that few modules need a trace.

Searched are the bytecode of the forward, of the methods that it names, and of the functions outside torch that it
names.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import _lru_cache_wrapper, cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from daqconvert.layers.functions import MULTIPLYING

PRODUCT_NAMES = frozenset({*MULTIPLYING, "imatmul", "_conv_forward", "scaled_dot_product_attention"})
ASKED_ATTRIBUTES = {
    *("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_leaf", "itemsize", "nbytes", "is_quantized"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_mps", "is_xpu", "is_xla", "is_nested"),
    *("names", "is_mkldnn", "is_vulkan", "is_ipu"),
}
ASKED_CALLS = {
    *("size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_same_size", "is_pinned", "is_shared"),
    *("is_inference", "storage_offset", "data_ptr", "has_names", "__len__", "result_type", "can_cast"),
}
LIKE_CALLS = {
    *(f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
    *(f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "tensor", "empty_strided")),
}
"""Functions that make a tensor of the size, type or device of their first operand, and use none of its values."""
AS_CALLS = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Functions that take no values from their second operand."""
ASKED = ASKED_ATTRIBUTES | ASKED_CALLS | LIKE_CALLS
"""Attributes and methods of a weight that do not use its values."""
_OPERATORS = {"@", "@="}
_KNOWN: dict[type[nn.Module], bool] = {}
_METHODS: dict[type, tuple[str, ...]] = {}


def may_multiply(cls: type[nn.Module]) -> bool:
    """Return whether the forward of a class names a product of matrices anywhere.

    Example:
        >>> may_multiply(nn.Sequential), may_multiply(nn.Linear)
        (False, True)
    """
    if cls not in _KNOWN:
        _KNOWN[cls] = _search(cls, list(_functions_of(cls, "forward")))
    return _KNOWN[cls]


def multiplying_methods(cls: type) -> tuple[str, ...]:
    """Return the public methods of a class, besides its forward, whose own code names a product of matrices.

    A method that only calls other public ones is left out, and so is what torch's own classes have. Private methods
    and those of `super()` count as code of the method that calls them. A method that sets an attribute is left out,
    since a graph would not set it.

    Example:
        >>> class Model(nn.Module):
        ...     def encode(self, x):
        ...         return x @ self.proj
        ...     def both(self, x):
        ...         return self.encode(x), self.encode(-x)
        >>> multiplying_methods(Model)
        ('encode',)
    """
    if cls in _METHODS:
        return _METHODS[cls]
    found: dict[str, bool] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            plain = callable(value) and not isinstance(value, type) and not name.startswith("_") and name != "forward"
            if name not in found and plain:
                functions = _with_private(cls, name, value)
                found[name] = not any(map(_sets_attribute, functions)) and _search(object, functions)
    _METHODS[cls] = tuple(name for name, multiplies in found.items() if multiplies)
    return _METHODS[cls]


def _with_private(cls: type, name: str, value: Any) -> list[FunctionType]:
    """Return the functions of a method of a class, and of the private methods and those of `super()` that it names."""
    found = list(_own_function(value))
    for function in found:  # grows on the way
        for code in _codes(function.__code__):
            named = {n for n in code.co_names if n.startswith("_") and not n.endswith("__")}
            for other in sorted(named | ({name} if "__class__" in code.co_freevars else set())):
                inner = (f for f in _functions_of(cls, other) if not str(f.__module__).startswith("torch."))
                found += [f for f in inner if f not in found]
    return found


@cache
def function_may_multiply(function: FunctionType) -> bool:
    """Return whether a function names a product of matrices anywhere."""
    return _search(object, [function])


def holds_product(module: nn.Module) -> bool:
    """Return whether an attribute of a module is a function that may multiply, as after `self.function = F.linear`."""
    for value in vars(module).values():
        value = value.func if isinstance(value, partial) else value
        if isinstance(value, (FunctionType, BuiltinFunctionType)) and value.__name__ in PRODUCT_NAMES:
            return True
        if any(function_may_multiply(function) for function in _own_function(value)):
            return True
    return False


def read_weights(module: nn.Module) -> set[str]:
    """Return the names of the matrices that a module's forward reads, except those of layers that it calls.

    The code of the module is read, not run.

    Example:
        >>> class Raw(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.other(x @ self.fc.weight)
        >>> read_weights(Raw())
        {'fc.weight'}
    """
    read, called = set[str](), set[str]()
    functions = [*_functions_of(type(module), "forward"), *inner_functions(vars(module).get("forward"))]
    for code in _reachable(type(module), functions):
        for chain in _chains(code):
            value: Any = module
            for depth, name in enumerate(chain, 1):
                value = getattr(value, name, None)
                if isinstance(value, nn.Parameter) and value.dim() > 1 and not ASKED & {*chain[depth:]}:
                    read.add(".".join(chain[:depth]))
                if not isinstance(value, nn.Module):
                    break
                if depth == len(chain):
                    called.add(".".join(chain))
    return {name for name in read if name.rpartition(".")[0] not in called}


def _chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Yield the chains of attributes that are read from `self`: `("fc", "weight")` for `self.fc.weight`."""
    chain: list[str] | None = None
    itself = code.co_varnames[:1] if "self" not in code.co_freevars else ("self",)  # a function inside a method
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain is not None:
            chain.append(str(step.argval))
            continue
        if chain:
            yield tuple(chain)
        loaded = (
            step.argval[-1:] if isinstance(step.argval, tuple) else (step.argval,)
        )  # two at once since Python 3.13
        own = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded == itself
        chain = [] if own else None


def _search(cls: type, waiting: list[FunctionType]) -> bool:
    return any(PRODUCT_NAMES & {*code.co_names} or _has_operator(code) for code in _reachable(cls, waiting))


def _reachable(cls: type, waiting: list[FunctionType]) -> Iterator[CodeType]:
    """Yield the code of functions and of those that they name."""
    seen: set[CodeType] = set()
    while waiting:
        function = waiting.pop()
        for code in _codes(function.__code__):
            if code in seen:
                continue
            seen.add(code)
            yield code
            for name in code.co_names:
                waiting.extend(_functions_of(cls, name))
                waiting.extend(_own_function(function.__globals__.get(name)))


def _functions_of(cls: type, name: str) -> Iterator[FunctionType]:
    """Yield the methods of a name in a class and its bases, without `nn.Module`, whose own methods compute nothing."""
    for base in cls.__mro__:
        if base is not nn.Module and name in vars(base):
            yield from inner_functions(vars(base)[name])


def inner_functions(value: Any, depth: int = 8) -> Iterator[FunctionType]:
    """Yield a function and, if it is decorated, bound or partial, the functions that it calls in the end.

    A decorator keeps the function that it wraps in `__wrapped__` or in a closure.
    """
    while not isinstance(value, FunctionType):
        inner = (getattr(value, key, None) for key in ("fget", "__func__", "func", "__wrapped__"))
        value = next((f for f in inner if callable(f) and f is not value), None)
        if value is None:
            return
    yield value
    for cell in (value.__closure__ or ()) if depth else ():
        try:
            held = cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue
        if isinstance(held, (FunctionType, MethodType, partial)):
            yield from inner_functions(held, depth - 1)


def _own_function(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, (FunctionType, MethodType, _lru_cache_wrapper)):
        for function in inner_functions(value):
            if not str(function.__module__).startswith("torch."):
                yield function


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _sets_attribute(function: FunctionType) -> bool:
    return any(i.opname == "STORE_ATTR" for code in _codes(function.__code__) for i in dis.get_instructions(code))


def _has_operator(code: CodeType) -> bool:
    return any(i.opname.startswith("BINARY_") and i.argrepr in _OPERATORS for i in dis.get_instructions(code))
