"""A whole quantized layer as one step forward and one backward: both quantizers, products, scale and bias.

    y = products(operand_x, operand_w) * S + bias,    S = |output_scale| * weight step * input step

It keeps `x` and the weight, which a float layer keeps too, and the codes of both operands, a byte each; not the
operands, not the sums. Gradients are written where those that they come from were. What it computes is what
`quantize_input`, `quantize_weight` and `scaled_products` compute one after the other.

The scale of a layer's sums, `S = |output_scale| * weight step * input step`, and its gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional import input_operator, weight_operator
from daqconvert.functional.codes import View, WeightCodes
from daqconvert.functional.grid import Rounding
from daqconvert.functional.native import address, kernels
from daqconvert.functional.product_operator import differentiable, product_gradients, rescale_, split_gradient
from daqconvert.functional.products import KnownProducts


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
        operand, codes, step, zero_point = input_operator.forward(
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
        w_gradients = weight_operator.backward(
            grad_w, weight, w_lower, w_upper, mean, std, of_weight.view, of_weight.bits, of_weight.grid,
            *of_weight.rounding.numbers, in_place=True,
        )  # fmt: skip
        parts = scale_parts(w_upper, step, of_input.bits, of_weight)
        grad_scale, grad_step = add_scale_gradients(grad_total, output_scale, *parts, w_gradients[2])
    to_weight, to_w_lower, to_w_upper = w_gradients or (None, None, None)
    to_w_lower = None if w_lower is None else to_w_lower
    if grad_x is None:
        return None, to_weight, grad_bias, grad_scale, None, None, to_w_lower, to_w_upper
    to_x, to_lower, to_upper = input_operator.backward(
        grad_x, None if of_weight.unitless else grad_step, x, in_lower, in_upper, step, zero_point, of_input.bits,
        *of_input.rounding.numbers, in_place=True,
    )  # fmt: skip
    return to_x, to_weight, grad_bias, grad_scale, to_lower, to_upper, to_w_lower, to_w_upper


def combine_scale(
    output_scale: Tensor, upper: Tensor | None, top: int, step: Tensor | None, weight_step: float, input_step: float
) -> Tensor:
    """Return `S`, in the shape of `output_scale`.

    Args:
        output_scale: `()` or `(C_out,)`.
        upper: Bound of the weight, whose step is `max(upper, 0) / top`; None where it is `weight_step`.
        top: Largest operand of the weight.
        step: Step of the input; None where it is `input_step`.
        weight_step: Of a weight without units.
        input_step: Of an input without units.

    Example:
        >>> combine_scale(torch.tensor([-2.0]), torch.tensor([7.0]), 7, torch.tensor(0.5), 0.0, 0.0).tolist()
        [1.0]
    """
    library = kernels(output_scale, upper, step)
    if library is None:
        of_weight = weight_step if upper is None else upper.clamp(min=0.0) / top
        return output_scale.abs() * of_weight * (input_step if step is None else step)
    total = torch.empty_like(output_scale)
    library.daq_combine_scale(
        output_scale.data_ptr(), address(upper), address(step), total.data_ptr(), total.numel(), top, weight_step,
        input_step,
    )  # fmt: skip
    return total


def add_scale_gradients(
    grad: Tensor, output_scale: Tensor, upper: Tensor | None, top: int, step: Tensor | None, weight_step: float,
    input_step: float, grad_upper: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients to `output_scale` and to `step`; that to `upper` is added to `grad_upper`.

    Args:
        grad: Of `S`.
        output_scale: As it went in, like the others.
        upper: Bound, or None.
        top: Largest operand of the weight.
        step: Of the input, or None.
        weight_step: Of a weight without units.
        input_step: Of an input without units.
        grad_upper: Changed in place where `upper` is given.
    """
    library = kernels(grad, output_scale, upper, step, grad_upper)
    if library is None:
        of_input = input_step if step is None else step
        of_weight = weight_step if upper is None else upper.clamp(min=0.0) / top
        size = grad * output_scale.abs()
        if upper is not None:
            grad_upper += torch.where(upper > 0, size * of_input / top, 0.0)
        return grad * of_weight * of_input * output_scale.sign(), (size * of_weight).sum()
    of_scale, of_step = torch.empty_like(output_scale), torch.empty((), dtype=grad.dtype)
    library.daq_combine_scale_backward(
        grad.data_ptr(), output_scale.data_ptr(), address(upper), address(step), of_scale.data_ptr(),
        grad_upper.data_ptr(), of_step.data_ptr(), grad.numel(), top, weight_step, input_step,
    )  # fmt: skip
    return of_scale, of_step
