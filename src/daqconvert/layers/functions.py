"""Functions that multiply, by name, and which of their arguments is the input, the weight and the bias.

linear, conv1d .. conv3d, conv_transpose1d .. conv_transpose3d     (input, weight, bias, geometry ...)
matmul, mm, bmm, mv, inner, tensordot                              either operand may be the weight
rmatmul (`weight.__rmatmul__(input)`)                              the same, the second operand on the left
addmm, baddbmm, addbmm, addmv                                      the first argument is the bias; `beta` and `alpha`
addmm_, baddbmm_, addbmm_, addmv_                                  the same, and the result is written into the bias
einsum                                                             equation, two operands

Other functions that multiply (`MULTIPLYING`) have no quantized form; the plan lists them with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    "rmatmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "mv": ("input", "vec"),
    "inner": ("input", "other"),
    "tensordot": ("a", "b"),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addbmm": ("input", "batch1", "batch2"),
    "addmv": ("input", "mat", "vec"),
}
ADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "addmm": torch.mm,
    "baddbmm": torch.bmm,
    "addbmm": lambda a, b: torch.bmm(a, b).sum(0),
    "addmv": torch.mv,
}
"""Functions that add products to their first argument -> the products alone."""
NAMES |= {f"{name}_": NAMES[name] for name in ADDED}
LAYER_FUNCTIONS = frozenset(name for name, arguments in NAMES.items() if arguments[1] == "weight")
"""Functions whose second argument is called `weight`."""
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(F, name) for name in NAMES if hasattr(F, name)},
    **{name: getattr(torch, name) for name in (*NAMES, "einsum") if hasattr(torch, name) and not hasattr(F, name)},
    **{f"{name}_": getattr(Tensor, f"{name}_") for name in ADDED},
    "rmatmul": Tensor.__rmatmul__,
}
METHODS = {name: name for name in ("matmul", "mm", "bmm", "mv", "inner", *ADDED, *(f"{name}_" for name in ADDED))}
METHODS |= {"__matmul__": "matmul", "__imatmul__": "matmul", "__rmatmul__": "rmatmul"}
ALIASES: dict[Any, str] = {function: name for name, function in FUNCTIONS.items()}
ALIASES |= {getattr(torch, name): name for name in NAMES if name.startswith("conv")}
ALIASES |= {operator.matmul: "matmul", operator.imatmul: "matmul", torch.linalg.matmul: "matmul"}
ALIASES |= {torch.functional.einsum: "einsum", torch.functional.tensordot: "tensordot"}
ALIASES |= {getattr(Tensor, method): name for method, name in METHODS.items() if hasattr(Tensor, method)}
for _name in (*NAMES, "einsum"):  # torch.ops.aten.mm, torch.ops.aten.mm.default
    _packet = getattr(torch.ops.aten, _name, None)
    if _packet is not None and _name != "tensordot":  # aten's takes other arguments
        ALIASES |= {_packet: _name} | {getattr(_packet, key): _name for key in _packet.overloads() if key == "default"}

MULTIPLYING = {*NAMES, *METHODS, "einsum", "bilinear", "deform_conv2d", "multi_head_attention_forward", "conv_tbc"}
MULTIPLYING |= {"convolution", "_convolution", "dot", "vdot", "vecdot", "chain_matmul", "multi_dot", "_trilinear"}
MULTIPLYING |= {
    "smm",
    "hspmm",
    "sspaddmm",
    "_sparse_mm",
    "_sparse_addmm",
    "_addmm_activation",
    "_grouped_mm",
    "_int_mm",
}
MULTIPLYING |= {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
"""Names of all functions and methods of torch that sum products, with a quantized form or without."""


@dataclass(frozen=True)
class Operands:
    """The operands of one call.

    Attributes:
        x: Input.
        weight: Weight, or the second activation of a product of two.
        bias: What the call adds to the products; None if it adds nothing.
        operation: Bare products of `x` and `weight`.
        target: The tensor that the call writes its result into; None for a new one.
    """

    x: Any
    weight: Any
    bias: Any
    operation: Operation
    target: Any = None

    def written(self, y: Tensor) -> Tensor:
        """Return the call's result, written into `target` if there is one."""
        if self.target is None or self.target is y:
            return y
        written: Tensor = self.target.copy_(y)
        return written


def split_call(function: str, weight_at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands:
    """Take the call `FUNCTIONS[function](*args, **kwargs)` apart; operand `weight_at` (0 or 1) is the weight.

    Example:
        >>> parts = split_call("linear", 1, (torch.ones(1, 2), torch.ones(3, 2)), {"bias": None})
        >>> parts.operation(parts.x, parts.weight).tolist()
        [[2.0, 2.0, 2.0]]
    """
    call = FUNCTIONS[function]
    if function == "einsum":
        operands, product = split_einsum(args)
        return _pair(operands, weight_at, None, product)
    names = NAMES[function]
    values = dict(zip(names, args, strict=False)) | {_renamed(function, key): value for key, value in kwargs.items()}
    if function.rstrip("_") in ADDED:
        return _added(function, weight_at, values)
    if function == "tensordot":
        dims = values.get("dims", args[2] if len(args) > 2 else 2)
        return _pair([values[n] for n in names], weight_at, None, lambda a, b: torch.tensordot(a, b, dims))
    if names[1] != "weight":
        return _pair([values[n] for n in names], weight_at, None, call)
    x, weight, bias = values.pop("input"), values.pop("weight"), values.pop("bias", None)
    known = _known(function, values)
    return Operands(x, weight, bias, known or (lambda a, b: call(a, b, None, **values)))


def split_einsum(args: tuple[Any, ...]) -> tuple[list[Any], Callable[..., Tensor]]:
    """Return the operands of `torch.einsum(*args)`, in any of its forms, and the function that multiplies them.

    Example:
        >>> operands, product = split_einsum((torch.ones(2, 3), [0, 1], torch.ones(3), [1], [0]))
        >>> product(*operands).tolist()
        [3.0, 3.0]
    """
    if not isinstance(args[0], str):  # operand, axes, operand, axes, ..., and the axes of the result if they are given
        operands, axes = list(args[: len(args) // 2 * 2 : 2]), args[1::2]
        result = args[-1:] if len(args) % 2 else ()
        return operands, lambda *ts: torch.einsum(
            *(part for pair in zip(ts, axes, strict=True) for part in pair), *result
        )
    equation, *operands = args
    operands = list(operands[0]) if operands and isinstance(operands[0], (list, tuple)) else operands
    return operands, lambda *ts: torch.einsum(equation, *ts)


def _added(function: str, weight_at: int, values: dict[str, Any]) -> Operands:
    """Return the operands of `beta * input + alpha * a @ b`; an `input` times 0 is left out, as torch does."""
    plain, alpha, beta = function.rstrip("_"), values.get("alpha", 1), values.get("beta", 1)
    bare, added = ADDED[plain], values["input"]
    bias = None if isinstance(beta, (int, float)) and beta == 0 else added if beta == 1 else added * beta
    scaled = bare if isinstance(alpha, (int, float)) and alpha == 1 else lambda a, b: bare(a, b) * alpha
    parts = _pair([values[name] for name in NAMES[plain][1:]], weight_at, bias, scaled)
    return replace(parts, target=added) if function.endswith("_") else parts


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
    return NAMES[function][0] if key == "self" or (key == "tensor1" and function == "matmul") else key


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
    if function == "inner" and weight_at == 1 and len(shape) == 2:
        return ChannelLayout.forward(shape)
    if len(shape) == 2 and has_columns(function, weight_at) and function in COLUMNS:
        return ChannelLayout.columns(shape)
    return None


COLUMNS = {"matmul", "rmatmul", "mm", "addmm", "addmm_"}
"""Functions whose output has the columns of a weight on the right in its last dimension."""


def has_columns(function: str, weight_at: int) -> bool:
    """Return whether the last dimension of a call's weight, operand `weight_at`, is not the one that is summed."""
    return function != "inner" and (weight_at == 0) == (function == "rmatmul")
