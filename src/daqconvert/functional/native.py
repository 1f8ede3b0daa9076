"""When the compiled kernels may compute, and how tensors reach them: dense float32 on the CPU, in memory order.

What the fused operators share: their library of operators, and the refusal of a second derivative.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from daqconvert.errors import DaqError
from daqconvert.kernels import library


def kernels(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """Return the compiled kernels if they can take these tensors, else None: plain torch computes then.

    Args:
        tensors: Float32 or uint8 ones on the CPU will do; None is no tensor. Not a subclass, which may have no memory,
            and not while a mode watches every operator, which would not see what the kernels do.
    """
    if torch._C._len_torch_dispatch_stack():
        return None
    for t in tensors:
        if t is None:
            continue
        if type(t) not in (Tensor, Parameter) or t.dtype not in (torch.float32, torch.uint8) or t.device.type != "cpu":
            return None
    return library()


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
    """Return `x` with the strides of `like`, copied where they differ: then element `i` of both is the same one."""
    if x.stride() == like.stride() and is_dense(x):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def row_major(weight: Tensor, view: Sequence[int]) -> Tensor:
    """Return a weight whose elements lie in memory in the order of its view `(A, B, C, D)`, copied where they do not.

    Rows of one channel may lie in any order inside themselves, as those of a `channels_last` convolution do.
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


# torch.library gives its own methods no types
_LIBRARY: Any = torch.library.Library("daqconvert", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    schema: str, forward: Callable[..., Any], fake: Callable[..., Any], backward: Callable[..., Any],
    remember: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Register an operator of this project with the dispatcher, for every device.

    Args:
        schema: As torch writes it, without the namespace.
        forward: Computes it, without gradient.
        fake: Returns empty tensors of the right shapes: what FakeTensor and the compiler see.
        backward: Its gradients, from the context and those of its outputs.
        remember: Saves what `backward` needs.
    """
    name = f"daqconvert::{schema.partition('(')[0]}"
    # a compiler may keep its tensors in the layout that its convolutions like: without the tag it would transpose them
    _LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=remember, lib=_LIBRARY)


def refuse(ctx: Any, *grads: Any) -> Any:
    """Refuse a second derivative: the backward of a backward.

    Args:
        ctx: Of the backward.
        grads: What arrived at it.

    Raises:
        DaqError: Always.
    """
    raise DaqError(
        "dasr has no second derivative: its slope holds the temperature controller constant. "
        "Drop create_graph=True, or compute the penalty under `with daqconvert.disabled(model):`."
    )
