"""A whole quantized layer as one step forward and one backward: both quantizers, products, scale and bias.

    y = products(operand_x, operand_w) * S + bias,    S = |output_scale| * weight step * input step

It keeps `x` and the weight, which a float layer keeps too, and the codes of both operands, a byte each; not the
operands, not the sums. Gradients are written where those that they come from were. What it computes is what
`quantize_input`, `quantize_weight` and `scaled_products` compute one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional import fused_input, fused_weight
from daqconvert.functional.coded import View, WeightCodes
from daqconvert.functional.combined import add_scale_gradients, combine_scale
from daqconvert.functional.grid import Rounding
from daqconvert.functional.products import KnownProducts
from daqconvert.functional.rescale import rescale_
from daqconvert.functional.scaled import differentiable, product_gradients, split_gradient


@dataclass(frozen=True)
class InputGrid:
    """How an input is quantized.

    Attributes:
        lower: Scalar bound.
        upper: Scalar bound.
        bits: 1 to 8.
        rounding: Gradient of the rounding.
    """

    lower: Tensor
    upper: Tensor
    bits: int
    rounding: Rounding


@dataclass(frozen=True)
class WeightGrid:
    """How a weight is quantized, and what that gave.

    Attributes:
        lower: Bound of a normalized weight, else None.
        upper: Bound.
        mean: Of a normalized weight, else None.
        std: Likewise.
        view: The weight as `(A, B, C, D)`.
        bits: 1 to 8.
        grid: `"midrise"`, `"integer"` or `"twos"`.
        top: Largest operand.
        rounding: Gradient of the rounding.
        operand: Integer-valued, without gradient.
        coded: Its codes.
    """

    lower: Tensor | None
    upper: Tensor
    mean: Tensor | None
    std: Tensor | None
    view: View
    bits: int
    grid: str
    top: int
    rounding: Rounding
    operand: Tensor
    coded: WeightCodes

    @property
    def unitless(self) -> bool:
        """Whether operands count in parts of full range, and `output_scale` carries the units."""
        return self.mean is not None


def quantized_layer(
    operation: KnownProducts, x: Tensor, weight: Tensor, bias: Tensor | None, output_scale: Tensor,
    of_input: InputGrid, of_weight: WeightGrid,
) -> Tensor:  # fmt: skip
    """Return a quantized layer's output; gradients reach input, weight, bias, output scale and all bounds.

    Args:
        operation: The bare products.
        x: Input, float32 or float64.
        weight: Weight.
        bias: `(C_out,)` or None.
        output_scale: `()` or `(C_out,)`.
        of_input: How the input is quantized.
        of_weight: How the weight is quantized, and what that gave.

    Raises:
        DaqError: On a second derivative.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 3.
    """
    out: Tensor = _QuantizedLayer.apply(
        x, weight, bias, output_scale, of_input.lower, of_input.upper, of_weight.lower, of_weight.upper,
        operation, of_input, of_weight,
    )  # fmt: skip
    return out


class _QuantizedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_scale: Tensor, in_lower: Tensor,
        in_upper: Tensor, w_lower: Tensor | None, w_upper: Tensor, operation: KnownProducts, of_input: InputGrid,
        of_weight: WeightGrid,
    ) -> Tensor:  # fmt: skip
        training = any(ctx.needs_input_grad)
        operand, codes, step, zero_point = fused_input.forward(
            x, in_lower, in_upper, of_input.bits, 0, 0.0, 0.0, training
        )
        total = combine_scale(output_scale, *scale_parts(w_upper, step, of_input.bits, of_weight))
        y = rescale_(operation(operand, of_weight.operand), total, bias, operation.output_dims)
        if training:
            ctx.save_for_backward(
                x, weight, output_scale, in_lower, in_upper, w_lower, w_upper, codes, step, zero_point, total,
                of_weight.coded.codes, of_weight.mean, of_weight.std,
            )  # fmt: skip
            ctx.known = operation, of_input, of_weight.coded.step, of_weight.coded.offset, _without_values(of_weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        operation, of_input, code_step, code_offset, of_weight = ctx.known
        x, weight, scale, lower, upper, w_lower, w_upper, codes, step, zero_point, total, w_codes, *rest = (
            ctx.saved_tensors
        )
        known = operation, of_input, WeightCodes(w_codes, code_step, code_offset), of_weight
        arguments = (
            known, ctx.needs_input_grad, grad, x, weight, scale, lower, upper, w_lower, w_upper, codes, step,
            zero_point, zero_point, total, *rest,
        )  # fmt: skip
        return (*differentiable(layer_gradients, arguments), None, None, None)


@dataclass(frozen=True)
class WeightConstants:
    """Of a `WeightGrid`, what is no tensor."""

    view: View
    bits: int
    grid: str
    top: int
    rounding: Rounding
    unitless: bool


def _without_values(grid: WeightGrid) -> WeightConstants:
    return WeightConstants(grid.view, grid.bits, grid.grid, grid.top, grid.rounding, grid.unitless)


def scale_parts(
    upper: Tensor, step: Tensor, bits: int, of_weight: WeightGrid | WeightConstants
) -> tuple[Tensor | None, int, Tensor | None, float, float]:
    """Return what `combine_scale` takes beside the output scale.

    Args:
        upper: Bound of the weight.
        step: Of the input.
        bits: Of the input.
        of_weight: Grid of the weight.
    """
    unitless, top = of_weight.unitless, of_weight.top
    parts = (None, None) if unitless else (upper, step)
    return parts[0], top, parts[1], 1.0 / top, 1.0 / (2**bits - 1)


def layer_gradients(
    known: tuple[KnownProducts, InputGrid, WeightCodes, WeightConstants], needs: tuple[bool, ...], grad: Tensor,
    x: Tensor, weight: Tensor, output_scale: Tensor, in_lower: Tensor, in_upper: Tensor, w_lower: Tensor | None,
    w_upper: Tensor, operand: Tensor, step: Tensor, offset: Tensor | None, zero_point: Tensor, total: Tensor,
    mean: Tensor | None, std: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients to input, weight, bias, output scale, and lower and upper of input and weight.

    Args:
        known: Products, grid of the input, codes of the weight, grid of the weight.
        needs: Which of the eight.
        grad: Of the output.
        x: As it went in, like the others.
        weight: Weight.
        output_scale: `()` or `(C_out,)`.
        in_lower: Bound of the input.
        in_upper: Likewise.
        w_lower: Bound of a normalized weight, else None.
        w_upper: Bound of the weight.
        operand: Of the input, or its codes.
        step: Of the input.
        offset: The zero point, where codes are given; None for an operand.
        zero_point: Of the input.
        total: Scale of the sums.
        mean: Of a normalized weight, else None.
        std: Likewise.
    """
    operation, of_input, coded, of_weight = known
    to_bounds = needs[4] or needs[5]
    # the steps are part of the scale, whose gradient comes with that of the weight
    wanted = needs[0] or to_bounds, needs[1] or needs[3] or needs[6] or needs[7] or to_bounds, needs[2]
    grad_x, grad_w, grad_bias = product_gradients(operation, grad, operand, offset, coded, total, x.shape, wanted)
    grad_scale = grad_step = w_gradients = None
    if grad_w is not None:
        grad_w, grad_total = split_gradient(grad_w, coded, operation, total)
        w_gradients = fused_weight.backward(
            grad_w, weight, w_lower, w_upper, mean, std, of_weight.view, of_weight.bits, of_weight.grid,
            *of_weight.rounding.numbers, in_place=True,
        )  # fmt: skip
        parts = scale_parts(w_upper, step, of_input.bits, of_weight)
        grad_scale, grad_step = add_scale_gradients(grad_total, output_scale, *parts, w_gradients[2])
    to_weight, to_w_lower, to_w_upper = w_gradients or (None, None, None)
    to_w_lower = None if w_lower is None else to_w_lower
    if grad_x is None:
        return None, to_weight, grad_bias, grad_scale, None, None, to_w_lower, to_w_upper
    to_x, to_lower, to_upper = fused_input.backward(
        grad_x, None if of_weight.unitless else grad_step, x, in_lower, in_upper, step, zero_point, of_input.bits,
        *of_input.rounding.numbers, in_place=True,
    )  # fmt: skip
    return to_x, to_weight, grad_bias, grad_scale, to_lower, to_upper, to_w_lower, to_w_upper
