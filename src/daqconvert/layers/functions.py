"""Functions that multiply, by name, and which of their arguments is the input, the weight and the bias.

linear, conv1d .. conv3d, conv_transpose1d .. conv_transpose3d     (input, weight, bias, geometry ...)
matmul, mm, bmm                                                    either operand may be the weight
addmm, baddbmm                                                     the first argument is the bias
einsum                                                             equation, two operands
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from daqconvert.functional.products import ConvolutionProducts, LinearProducts
from daqconvert.layers.site import Operation
from daqconvert.quantizers import ChannelLayout

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

NAMES: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    **{f"conv{d}d": _CONV for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _TRANSPOSED for d in (1, 2, 3)},
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
}
LAYER_FUNCTIONS = frozenset(name for name, arguments in NAMES.items() if arguments[1] == "weight")
"""Functions whose second argument is called `weight`."""
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(F, name) for name in NAMES if hasattr(F, name)},
    **{name: getattr(torch, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")},
}
ALIASES: dict[Any, str] = {function: name for name, function in FUNCTIONS.items()}
ALIASES |= {getattr(torch, name): name for name in NAMES if name.startswith("conv")}
ALIASES |= {operator.matmul: "matmul", torch.functional.einsum: "einsum"}
METHODS = {
    "matmul": "matmul",
    "mm": "mm",
    "bmm": "bmm",
    "addmm": "addmm",
    "baddbmm": "baddbmm",
    "__matmul__": "matmul",
}


@dataclass(frozen=True)
class Operands:
    """The operands of one call.

    Attributes:
        x: Input.
        weight: Weight, or the second activation of a product of two.
        bias: What the call adds to the products; None if it adds nothing.
        operation: Bare products of `x` and `weight`.
    """

    x: Any
    weight: Any
    bias: Any
    operation: Operation


def split_call(function: str, weight_at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands:
    """Take the call `FUNCTIONS[function](*args, **kwargs)` apart; operand `weight_at` (0 or 1) is the weight.

    Example:
        >>> parts = split_call("linear", 1, (torch.ones(1, 2), torch.ones(3, 2)), {"bias": None})
        >>> parts.operation(parts.x, parts.weight).tolist()
        [[2.0, 2.0, 2.0]]
    """
    call = FUNCTIONS[function]
    if function == "einsum":
        equation, *operands = args
        operands = list(operands[0]) if isinstance(operands[0], (list, tuple)) else operands
        return _pair(operands, weight_at, None, lambda a, b: call(equation, a, b))
    names = NAMES[function]
    values = dict(zip(names, args, strict=False)) | {_renamed(function, key): value for key, value in kwargs.items()}
    if function in ("addmm", "baddbmm"):
        product = torch.mm if function == "addmm" else torch.bmm
        return _pair([values[n] for n in names[1:]], weight_at, values["input"], product)
    if names[1] != "weight":
        return _pair([values[n] for n in names], weight_at, None, call)
    x, weight, bias = values.pop("input"), values.pop("weight"), values.pop("bias", None)
    known = _known(function, values)
    return Operands(x, weight, bias, known or (lambda a, b: call(a, b, None, **values)))


def _known(function: str, values: dict[str, Any]) -> Operation | None:
    """Return products with known gradients for one of `LAYER_FUNCTIONS`; None if the padding is a string."""
    if function == "linear":
        return LinearProducts()
    dims, defaults = output_dims(function), {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    if isinstance(values.get("padding"), str):
        return None
    sizes = {}
    for key, default in defaults.items():
        value = values.get(key, default)
        sizes[key] = (
            tuple(value) * (dims if len(value) == 1 else 1) if isinstance(value, (tuple, list)) else (value,) * dims
        )
    transposed = function.startswith("conv_transpose")
    return ConvolutionProducts(groups=values.get("groups", 1), transposed=transposed, **sizes)


def _renamed(function: str, key: str) -> str:
    return "input" if key == "self" or (key == "tensor1" and function == "matmul") else key


def _pair(operands: list[Any], weight_at: int, bias: Any, product: Callable[[Any, Any], Tensor]) -> Operands:
    """Return the operands of a product of two matrices, whichever of them is the weight."""
    x, weight = operands[1 - weight_at], operands[weight_at]
    return Operands(x, weight, bias, product if weight_at == 1 else lambda a, b: product(b, a))


def output_dims(function: str) -> int:
    """Return the number of dimensions after the channel in a function's output."""
    return int(function[-2]) if function.startswith("conv") else 0


def channel_layout(function: str, weight_at: int, shape: tuple[int, ...], groups: int = 1) -> ChannelLayout | None:
    """Return which dimension of a call's weight holds the output channels, or None if that is not known.

    `shape` is that of the weight, operand `weight_at` of the call; `groups` matters for transposed convolutions only.
    """
    if function.startswith("conv_transpose"):
        return ChannelLayout.transposed(shape, groups)
    if function.startswith(("conv", "linear")):
        return ChannelLayout.forward(shape)
    if function in ("matmul", "mm", "addmm") and weight_at == 1 and len(shape) == 2:
        return ChannelLayout.columns(shape)
    return None
