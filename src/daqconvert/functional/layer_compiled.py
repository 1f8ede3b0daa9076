"""A quantized layer under `torch.compile`: a forward in plain operations that fuse, a backward that is one operator.

A compiler that is left to itself keeps the operand beside the input, sums the gradient of each bound in a separate
pass, computes the slope again in each pass, and computes a scalar's formula again for every vector of elements. So the
few scalars of a layer come from one operator, which is called once, and the backward is that of
`functional.layer_operator`, from the input and the weight alone. Values are the same, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional import input_operator, weight_operator
from daqconvert.functional.codes import View, WeightCodes
from daqconvert.functional.dasr import KINDS, refuse
from daqconvert.functional.grid import Rounding, quantize_input
from daqconvert.functional.input_operator import InputGrid
from daqconvert.functional.layer_operator import LayerState, layer_gradients, layer_sum_scale
from daqconvert.functional.native import in_memory_order, register
from daqconvert.functional.products import ConvolutionProducts, KnownProducts, LinearProducts, rescale
from daqconvert.functional.weight_operator import WeightGrid


def compiled_layer(
    operation: KnownProducts, x: Tensor, weight: Tensor, bias: Tensor | None, output_scale: Tensor,
    of_input: InputGrid, of_weight: WeightGrid, slopes: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """Return the output of `functional.layer_operator.quantized_layer` for float32, under `torch.compile`.

    `slopes` are `c` and `a` of the roundings of input and weight, each as a tensor `(2,)` on the CPU, so that they may
    change from step to step without compiling anew; only the kind is read from the grids' own roundings.
    """
    i, w = of_input, of_weight
    kinds = KINDS.index(i.rounding.kind), KINDS.index(w.rounding.kind)
    constants = list(w.view), i.bits, i.signed, w.bits, w.grid, *kinds
    out: Tensor = _CompiledLayer.apply(
        x, weight, bias, output_scale, i.lower, i.upper, w.lower, w.upper, w.mean, w.std, *slopes, encode(operation),
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
        operand_w, sum_scale, scale, zero_point = torch.ops.daqconvert.layer_forward.default(*tensors, *constants[:5])
        operation = decode(geometry)
        sums = operation(quantize_input(x, scale, zero_point, constants[1]), operand_w)
        y = rescale(sums, sum_scale, bias, operation.output_dims)
        ctx.save_for_backward(x, *tensors, slope, w_slope)
        ctx.geometry, ctx.constants, ctx.biased = geometry, constants, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.daqconvert.layer_backward.default(
            grad, *ctx.saved_tensors, ctx.geometry, ctx.biased, ctx.needs_input_grad[0], *ctx.constants
        )
        x, weight, bias, output_scale, lower, upper, w_lower, w_upper = found
        normalized = ctx.saved_tensors[5] is not None
        bias, w_lower = bias if ctx.biased else None, w_lower if normalized else None
        return x, weight, bias, output_scale, lower, upper, w_lower, w_upper, None, None, None, None, None, None


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
    stride, padding, dilation, output_padding = (tuple(geometry[2 + i * dims :][:dims]) for i in range(4))
    return ConvolutionProducts(stride, padding, dilation, geometry[0], bool(geometry[1]), output_padding)


# The two operators, as torch.library wants them: flat arguments in the order of the schema. The forward computes
# values alone, so the rounding of its grid is never read.


def _forward(
    weight: Tensor, output_scale: Tensor, lower: Tensor, upper: Tensor, w_lower: Tensor | None, w_upper: Tensor,
    mean: Tensor | None, std: Tensor | None, view: View, bits: int, signed: bool, w_bits: int, grid: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_weight = WeightGrid(w_lower, w_upper, mean, std, view, w_bits, grid, Rounding())
    operand_w, _ = weight_operator.forward(weight, of_weight)
    scale, zero_point = input_operator.parameters(lower, upper, bits, signed)
    return operand_w, layer_sum_scale(output_scale, scale, bits, of_weight), scale, zero_point


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, output_scale: Tensor, lower: Tensor, upper: Tensor,
    w_lower: Tensor | None, w_upper: Tensor, mean: Tensor | None, std: Tensor | None, slope: Tensor,
    w_slope: Tensor, geometry: list[int], biased: bool, to_input: bool, view: View, bits: int, signed: bool,
    w_bits: int, grid: str, kind: int, w_kind: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_input = InputGrid(lower, upper, bits, Rounding.of(kind, *slope.tolist()), signed)
    of_weight = WeightGrid(w_lower, w_upper, mean, std, view, w_bits, grid, Rounding.of(w_kind, *w_slope.tolist()))
    codes = WeightCodes(weight_operator.forward(weight, of_weight)[1], w_bits, grid)
    operand, _, scale, zero_point = input_operator.forward(x, lower, upper, bits, signed, False, scratch_like)
    sum_scale = layer_sum_scale(output_scale, scale, bits, of_weight)
    needs = to_input, True, biased, True, True, True, w_lower is not None, True
    state = LayerState(x, weight, output_scale, operand, scale, zero_point, sum_scale)
    found = layer_gradients(decode(geometry), of_input, of_weight, codes, needs, grad, state)
    likes = x, weight, w_upper, output_scale, lower, upper, w_upper, w_upper
    made = [like.new_zeros(()) if f is None else f for f, like in zip(found, likes, strict=True)]
    return in_memory_order(made[0], x) if to_input else made[0], in_memory_order(made[1], weight), *made[2:]


_scratch = threading.local()


def scratch_like(x: Tensor) -> Tensor:
    """Return a tensor of the shape and strides of `x` in memory that each thread keeps, valid until the next call.

    The operand is needed during one operator only. If its memory were freed each time, its pages would have to be
    mapped again each time: a tenth of the step's time for the largest layers.
    """
    before: Tensor | None = getattr(_scratch, "memory", None)
    if before is None or before.numel() < x.numel():
        before = _scratch.memory = torch.empty(x.numel(), dtype=torch.float32)
    return before.as_strided(x.shape, x.stride())


def _fake_forward(
    weight: Tensor, output_scale: Tensor, lower: Tensor, upper: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(output_scale), upper.new_empty(()), upper.new_empty(())


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
_GRIDS = "int[] view, int bits, bool signed, int w_bits, str grid"
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
