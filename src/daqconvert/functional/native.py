"""When the compiled kernels may compute, how tensors and roundings reach them, and how an operator is registered.

The kernels (`daqconvert.kernels`) take dense float32 on the CPU, in memory order, by address. They compute the slope
of the DASR rounding, `c * coth((u + a) / 2)` with `u = |1 - 2t|` in [0, 1], from a few numbers that `slope_numbers`
chooses: the coefficients of a polynomial that is exact to float32 or, where no short polynomial is, the constants of
`c * (1 + 2 / (exp(a) expm1(u) + expm1(a)))`. A polynomial needs no division. The farther away the pole at `u = -a`
is, the lower its degree may be: 5 for the default, whose `a` is 4.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from daqconvert.functional.dasr import DSQ, EWGS, STE
from daqconvert.kernels import library

SLOPE_ONE, RATIONAL, SCALED, SECH = 0, -1, -2, -3  # as in kernels/quantizer.cpp
DEGREES = (3, 5, 8)  # those that the kernels are compiled for
ERROR = 1e-7  # largest relative error of a polynomial, against the float32 rounding of 6e-8


def kernels(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """Return the compiled kernels if they can take these tensors, else None: plain torch computes then.

    They take float32 and uint8 on the CPU; None stands for an argument that is not given. They do not take a subclass
    of a tensor, which may have no memory. While a torch dispatch mode is active they take nothing, because the mode
    has to see every operation and would not see theirs.
    """
    if torch._C._len_torch_dispatch_stack():
        return None
    for t in tensors:
        if t is None:
            continue
        if type(t) not in (Tensor, Parameter) or t.dtype not in (torch.float32, torch.uint8) or t.device.type != "cpu":
            return None
    return library()


def only_values(*tensors: Tensor | None) -> bool:
    """Whether only the values of what is computed from these tensors are needed.

    That means: no gradient, no tracing or compiling (which have to see plain operations), no transform of
    `torch.func`.

    Example:
        >>> only_values(torch.ones(1)), only_values(torch.ones(1, requires_grad=True))
        (True, False)
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)


def dense(x: Tensor) -> Tensor:
    """Return `x`, or a copy with the strides of `empty_like(x)` where its elements do not fill one piece of memory.

    Example:
        >>> dense(torch.ones(2, 3)[:, ::2]).stride()
        (2, 1)
    """
    return x if x.is_contiguous() or is_dense(x) else torch.empty_like(x).copy_(x)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one piece of memory, each once, in any order of the dimensions."""
    expected = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 0:
            return True
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def in_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """Return `x` with the strides of `like`, copied where they differ, so that elements correspond in memory."""
    if x.stride() == like.stride() and is_dense(x):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def row_major(weight: Tensor, view: Sequence[int]) -> Tensor:
    """Return a weight whose elements lie in memory in the order of its view `(A, B, C, D)`, copied where they do not.

    The elements of one channel may lie in any order among themselves, as in a `channels_last` convolution.
    """
    if weight.is_contiguous():
        return weight
    rows = view[0] == view[1] == 1 and is_dense(weight)
    outermost = view[2] == 1 or (weight.shape[0] == view[2] and weight.stride(0) * view[2] == weight.numel())
    return weight if rows and outermost else weight.contiguous()


@lru_cache(maxsize=4096)
def view_argument(view: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """Return a view `(A, B, C, D)` of a weight as the kernels take it."""
    return (ctypes.c_int64 * 4)(*view)


def address(x: Tensor | None) -> int | None:
    """Return where a tensor's elements start; None is a null pointer."""
    return None if x is None else x.data_ptr()


@lru_cache(maxsize=256)
def slope_numbers(kind: int, c: float, a: float) -> tuple[ctypes.Array[ctypes.c_float], int]:
    """Return a rounding as the kernels take it: numbers, and how to use them.

    How is a polynomial's degree, `SLOPE_ONE`, `RATIONAL`, `SCALED` or `SECH`. The arguments are the `numbers` of a
    `Rounding`.

    Example:
        >>> [slope_numbers(1, 1.0, a)[1] for a in (16.0, 4.0, 2.0, 0.0625)]
        [3, 5, 8, -1]
    """
    if kind == STE:
        return (ctypes.c_float * 1)(), SLOPE_ONE
    if kind == EWGS:
        return (ctypes.c_float * 1)(c), SCALED
    if kind == DSQ:
        return (ctypes.c_float * 2)(4.0 * c, a), SECH
    for degree in DEGREES:
        found = _polynomial(c, a, degree)
        if found is not None:
            return (ctypes.c_float * len(found))(*found), degree
    far = min(a, 80.0)  # exp(80) fits into float32; beyond, the slope is c everywhere
    return (ctypes.c_float * 3)(c, math.exp(far), math.expm1(far)), RATIONAL


def _polynomial(c: float, a: float, degree: int) -> list[float] | None:
    """Return coefficients, highest power first, from Chebyshev nodes; None if their error is larger than `ERROR`."""
    nodes = 0.5 + 0.5 * torch.cos(math.pi * (torch.arange(degree + 1, dtype=torch.float64) + 0.5) / (degree + 1))
    powers = torch.arange(degree, -1, -1, dtype=torch.float64)
    coefficients = torch.linalg.solve(nodes[:, None] ** powers, c / torch.tanh((nodes + a) / 2))
    u = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    exact = c / torch.tanh((u + a) / 2)
    missed = ((u[:, None] ** powers @ coefficients) / exact - 1.0).abs().max()
    return coefficients.tolist() if float(missed) <= ERROR else None


# torch.library gives its own methods no types
_LIBRARY: Any = torch.library.Library("daqconvert", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    schema: str, forward: Callable[..., Any], fake: Callable[..., Any], backward: Callable[..., Any],
    remember: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Register an operator of this project with the dispatcher, for every device.

    `schema` is as torch writes it, without the namespace. `forward` computes the values; `fake` makes empty tensors of
    the right shapes, for FakeTensor and compilers. `backward` gets the context and the gradients of the outputs;
    `remember` saves in the context what `backward` needs.
    """
    name = f"daqconvert::{schema.partition('(')[0]}"
    # the tag lets a compiler pass tensors in the layout that its convolutions prefer, instead of transposing them
    _LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=remember, lib=_LIBRARY)
