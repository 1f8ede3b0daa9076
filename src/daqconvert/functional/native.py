"""When the compiled kernels may compute, and how tensors reach them: dense float32 on the CPU, in memory order."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import Parameter

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
