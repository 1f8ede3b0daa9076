"""A quantized layer as a compiler should see it: a forward in plain operations to fuse, a backward of one operator.

Left to itself a compiler keeps the operand beside the input, sums the gradient of each bound in a pass of its own,
computes the slope again in each, and a scalar's whole formula again for every vector of elements it is used with. So
the few numbers of a layer come from one operator, which is called once, and the backward is that of
`functional.layer`, on the input and the weight alone. Values are the same, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional import input_operator, weight_operator
from daqconvert.functional.codes import View, WeightCodes
from daqconvert.functional.dasr import KINDS, round_half_even
from daqconvert.functional.grid import Rounding, coding, levels
from daqconvert.functional.layer_operator import (
    InputGrid,
    WeightConstants,
    combine_scale,
    layer_gradients,
    scale_parts,
)
from daqconvert.functional.native import in_memory_order, refuse, register
from daqconvert.functional.products import ConvolutionProducts, KnownProducts, LinearProducts


def compiled_layer(
    operation: KnownProducts, x: Tensor, weight: Tensor, bias: Tensor | None, output_scale: Tensor,
    lower: Tensor, upper: Tensor, w_lower: Tensor | None, w_upper: Tensor, mean: Tensor | None, std: Tensor | None,
    view: View, bits: int, w_bits: int, grid: str, kinds: tuple[str, str], slope: Tensor, w_slope: Tensor,
) -> Tensor:  # fmt: skip
    """Return what `functional.layer.quantized_layer` does, under `torch.compile`.

    Args:
        operation: The bare products.
        x: Input, float32.
        weight: Weight, float32.
        bias: `(C_out,)` or None.
        output_scale: `()` or `(C_out,)`.
        lower: Bound of the input.
        upper: Likewise.
        w_lower: Bound of a normalized weight, else None.
        w_upper: Bound of the weight.
        mean: Of a normalized weight, else None.
        std: Likewise.
        view: The weight as `(A, B, C, D)`.
        bits: Of the input.
        w_bits: Of the weight.
        grid: Of the weight.
        kinds: Of the roundings of input and weight.
        slope: `(2,)` on the CPU, `c` and `a` of the input's: tensors, so that they may change from step to step.
        w_slope: Likewise of the weight's.
    """
    constants = list(view), bits, w_bits, grid, KINDS.index(kinds[0]), KINDS.index(kinds[1])
    out: Tensor = _CompiledLayer.apply(
        x, weight, bias, output_scale, lower, upper, w_lower, w_upper, mean, std, slope, w_slope, encode(operation),
        constants,
    )  # fmt: skip
    return out


class _CompiledLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_scale: Tensor, lower: Tensor, upper: Tensor,
        w_lower: Tensor | None, w_upper: Tensor, mean: Tensor | None, std: Tensor | None, slope: Tensor,
        w_slope: Tensor, geometry: list[int], constants: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        tensors = weight, output_scale, lower, upper, w_lower, w_upper, mean, std
        operand_w, total, step, zero_point = torch.ops.daqconvert.layer_forward.default(*tensors, *constants[:4])
        top = 2 ** constants[1] - 1
        operand = round_half_even(torch.clamp(x / step, -zero_point, top - zero_point))
        operation = decode(geometry)
        y: Tensor = operation(operand, operand_w)
        trailing = (1,) * operation.output_dims
        y = y * (total.reshape(-1, *trailing) if total.dim() else total)
        if bias is not None:
            y = y + bias.reshape(-1, *trailing)
        ctx.save_for_backward(x, *tensors, slope, w_slope)
        ctx.geometry, ctx.constants, ctx.biased = geometry, constants, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.daqconvert.layer_backward.default(
            grad, *ctx.saved_tensors, ctx.geometry, ctx.biased, ctx.needs_input_grad[0], *ctx.constants
        )
        x, weight, bias, scale, lower, upper, w_lower, w_upper = found
        normalized = ctx.saved_tensors[5] is not None
        bias, w_lower = bias if ctx.biased else None, w_lower if normalized else None
        return x, weight, bias, scale, lower, upper, w_lower, w_upper, None, None, None, None, None, None


def encode(operation: KnownProducts) -> list[int]:
    """Return known products as integers, as an operator takes them.

    Example:
        >>> encode(LinearProducts()), decode(encode(ConvolutionProducts((2,), (1,), (1,), 3))).groups
        ([], 3)
    """
    if isinstance(operation, LinearProducts):
        return []
    o = operation
    output_padding = o.output_padding or (0,) * len(o.stride)
    return [o.groups, int(o.transposed), *o.stride, *o.padding, *o.dilation, *output_padding]


def decode(geometry: Sequence[int]) -> KnownProducts:
    """Undo `encode`."""
    if not geometry:
        return LinearProducts()
    dims = (len(geometry) - 2) // 4
    parts = [tuple(geometry[2 + i * dims : 2 + (i + 1) * dims]) for i in range(4)]
    return ConvolutionProducts(parts[0], parts[1], parts[2], geometry[0], bool(geometry[1]), parts[3])


def _constants(
    view: Sequence[int], w_bits: int, grid: str, kind: int, c: float, a: float, unitless: bool
) -> WeightConstants:
    top, rounding = levels(w_bits, grid), Rounding(KINDS[kind], c, a)
    return WeightConstants((view[0], view[1], view[2], view[3]), w_bits, grid, top, rounding, unitless)


def _forward(
    weight: Tensor, output_scale: Tensor, lower: Tensor, upper: Tensor, w_lower: Tensor | None, w_upper: Tensor,
    mean: Tensor | None, std: Tensor | None, view: list[int], bits: int, w_bits: int, grid: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_weight = _constants(view, w_bits, grid, *_ANY, mean is not None)
    operand, _ = weight_operator.forward(weight, w_lower, w_upper, mean, std, None, view, w_bits, grid, *_ANY)
    step, zero_point = input_operator.parameters(lower, upper, bits)
    return operand, combine_scale(output_scale, *scale_parts(w_upper, step, bits, of_weight)), step, zero_point


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, output_scale: Tensor, lower: Tensor, upper: Tensor,
    w_lower: Tensor | None, w_upper: Tensor, mean: Tensor | None, std: Tensor | None, slope: Tensor,
    w_slope: Tensor, geometry: list[int], biased: bool, to_input: bool, view: list[int], bits: int, w_bits: int,
    grid: str, kind: int, w_kind: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    (c, a), (w_c, w_a) = slope.tolist(), w_slope.tolist()
    of_weight = _constants(view, w_bits, grid, w_kind, w_c, w_a, mean is not None)
    _, codes = weight_operator.forward(weight, w_lower, w_upper, mean, std, None, view, w_bits, grid, w_kind, w_c, w_a)
    operand, _, step, zero_point = input_operator.forward(x, lower, upper, bits, kind, c, a, False, scratch_like)
    total = combine_scale(output_scale, *scale_parts(w_upper, step, bits, of_weight))
    coded = WeightCodes(codes, *coding(w_bits, grid))
    known = decode(geometry), InputGrid(lower, upper, bits, Rounding(KINDS[kind], c, a)), coded, of_weight
    needs = (to_input, True, biased, True, True, True, w_lower is not None, True)
    found = layer_gradients(
        known, needs, grad, x, weight, output_scale, lower, upper, w_lower, w_upper, operand, step, None, zero_point,
        total, mean, std,
    )  # fmt: skip
    likes = x, weight, w_upper, output_scale, lower, upper, w_upper, w_upper
    made = [like.new_zeros(()) if f is None else f for f, like in zip(found, likes, strict=True)]
    return in_memory_order(made[0], x) if to_input else made[0], in_memory_order(made[1], weight), *made[2:]


_ANY = 0, 0.0, 0.0  # a rounding where only values are asked for, no gradients

_scratch = threading.local()


def scratch_like(x: Tensor) -> Tensor:
    """Return a tensor of the shape and strides of `x` in memory that each thread keeps, valid until the next call.

    The operand lives as long as one operator. Given back each time, its pages would be mapped again each time: a
    tenth of the step's time for the largest layers.
    """
    before: Tensor | None = getattr(_scratch, "memory", None)
    if before is None or before.numel() < x.numel():
        before = _scratch.memory = torch.empty(x.numel(), dtype=torch.float32)
    return before.as_strided(x.shape, x.stride())


def _fake_forward(
    weight: Tensor, output_scale: Tensor, lower: Tensor, upper: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(output_scale), torch.empty_like(upper), torch.empty_like(upper)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, output_scale: Tensor, lower: Tensor, upper: Tensor, w_lower: Any,
    w_upper: Tensor, mean: Any, std: Any, slope: Any, w_slope: Any, geometry: list[int], biased: bool, to_input: bool,
    *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    channels = grad.shape[grad.dim() - 1 - decode(geometry).output_dims]
    bias = grad.new_empty((channels,) if biased else ())
    of_lower = torch.empty_like(w_upper) if w_lower is not None else grad.new_empty(())
    of_x = torch.empty_like(x) if to_input else grad.new_empty(())
    rest = (torch.empty_like(t) for t in (output_scale, lower, upper))
    return of_x, torch.empty_like(weight), bias, *rest, of_lower, torch.empty_like(w_upper)


_WEIGHT = "Tensor lower, Tensor upper, Tensor? w_lower, Tensor w_upper, Tensor? mean, Tensor? std"
_GRIDS = "int[] view, int bits, int w_bits, str grid"
register(
    f"layer_forward(Tensor weight, Tensor output_scale, {_WEIGHT}, {_GRIDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward, _fake_forward, refuse,
)  # fmt: skip
register(
    f"layer_backward(Tensor grad, Tensor x, Tensor weight, Tensor output_scale, {_WEIGHT}, Tensor slope,"
    f" Tensor w_slope, int[] geometry, bool biased, bool to_input, {_GRIDS}, int kind, int w_kind)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _fake_backward, refuse,
)  # fmt: skip
