"""How many of the multiply-accumulates of a network have both operands from a quantizer; the same for every tool.

A `TorchDispatchMode` sees every `aten` operation. Counted are convolutions, and matrix products with an operand that
does not depend on the network's input (a weight); products of two activations (attention products) and fused recurrent
kernels are not counted. An operand counts as quantized if a quantizer of the tool returned it, also after operations
that only move values or keep them on their grid: views, permutations, slices, copies, concatenation of quantized
parts, zero padding, maximum pooling, ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOVES = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze",
    "squeeze",
    "clone", "contiguous", "_to_copy", "detach", "alias", "as_strided", "constant_pad_nd", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "split", "split_with_sizes", "unbind", "index_select", "index", "roll", "flip", "relu",
    "relu_", "cat", "stack", "lift_fresh", "unfold", "repeat", "pixel_unshuffle", "upsample_nearest2d",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts multiply-accumulates while it is active.

    Attributes:
        total: Those of convolutions and of products with a weight.
        both: Those of them whose two operands are quantized.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.both = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, count it, and mark its output where it depends on data or is still quantized."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        data = any(is_data(t) for t in tensors)
        operands, macs = product(name, args, out)
        if operands is not None and (name == "convolution" or not all(is_data(t) for t in operands)):
            self.total += macs
            self.both += macs * all(is_quantized(t) for t in operands)
        moved = name in MOVES and bool(tensors) and all(is_quantized(t) for t in _moved(name, tensors))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                leaf._zoo_data, leaf._zoo_quantized = data or is_data(leaf), moved  # type: ignore[attr-defined]
        return out


def _moved(name: str, tensors: list[Tensor]) -> list[Tensor]:
    return tensors[:1] if name in ("index", "index_select") else tensors


def is_data(tensor: Tensor) -> bool:
    """Whether a tensor depends on the network's input."""
    return getattr(tensor, "_zoo_data", False)


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is what a quantizer returned."""
    return getattr(tensor, "_zoo_quantized", False)


def product(name: str, args: Any, out: Any) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """Return the operands and the multiply-accumulates of an operation; None where it is no product."""
    if name == "convolution":
        x, w, transposed = args[0], args[1], args[6]
        return (x, w), (x if transposed else out).numel() * math.prod(w.shape[1:])
    if name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv"):
        a, b = args[1:3] if name in ("addmm", "baddbmm", "addmv") else args[:2]
        return (a, b), out.numel() * a.shape[-1]
    if name == "linear":
        return (args[0], args[1]), out.numel() * args[0].shape[-1]
    return None, 0


@torch.no_grad()
def count(model: nn.Module, run: Callable[[], Any], inputs: Any, quantizers: list[nn.Module]) -> Counter:
    """Run a network and count its multiply-accumulates.

    Args:
        model: The network.
        run: Function that calls the network on the inputs.
        inputs: Inputs; they are marked as data.
        quantizers: Modules whose output is quantized.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            leaf._zoo_data = True  # type: ignore[attr-defined]
    with marking(quantizers), unfused(), Counter() as counter:
        run()
    return counter


@contextmanager
def marking(quantizers: list[nn.Module]) -> Iterator[None]:
    """Mark what these modules return as quantized while the context lasts."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(getattr(output, "value", output)):
            if isinstance(leaf, Tensor):
                leaf._zoo_quantized = True  # type: ignore[attr-defined]

    handles = [module.register_forward_hook(hook) for module in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unfused() -> Iterator[None]:
    """Switch torch's fused encoder kernel off while the context lasts, because it hides the products in it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
