"""A whole quantized layer as one autograd function: both quantizers, products, scale and bias.

    y = products(operand_x, operand_w) * sum_scale + bias,    sum_scale = |output_scale| * weight scale * input scale

For its backward it keeps `x` and the weight, which a float layer keeps too, and the codes of both operands, one byte
per element; it keeps neither the operands nor the sums. In the backward, a gradient is written into the memory of the
gradient that it is computed from. The values are those of `quantize_input`, `quantize_weight` and `scaled_products`,
one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from daqconvert.functional import grid as plain
from daqconvert.functional import input_operator, weight_operator
from daqconvert.functional.codes import WeightCodes
from daqconvert.functional.input_operator import InputGrid
from daqconvert.functional.native import address, kernels
from daqconvert.functional.product_operator import differentiable, product_gradients, split_gradient
from daqconvert.functional.products import KnownProducts, rescale_
from daqconvert.functional.weight_operator import QuantizedWeight, WeightGrid


def quantized_layer(
    operation: KnownProducts, x: Tensor, weight: Tensor, bias: Tensor | None, output_scale: Tensor,
    of_input: InputGrid, of_weight: QuantizedWeight,
) -> Tensor:  # fmt: skip
    """Return a quantized layer's output; gradients reach input, weight, bias, output scale and all bounds.

    `x` is float32 or float64; the output scale is `()`, `(1,)` or `(C_out,)`, the bias `(C_out,)` or None.

    Raises:
        DaqError: On a second derivative.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 3.
    """
    grid = of_weight.grid
    out: Tensor = _QuantizedLayer.apply(
        x, weight, bias, output_scale, of_input.lower, of_input.upper, grid.lower, grid.upper, operation, of_input,
        of_weight,
    )  # fmt: skip
    return out


class LayerState(NamedTuple):
    """What a layer's backward reads besides the two grids and the weight's codes.

    Attributes:
        x: Input.
        weight: Weight.
        output_scale: `()`, `(1,)` or `(C_out,)`.
        operand: Operand of the input, or its codes (uint8).
        scale: Scale of the input.
        zero_point: Zero point of the input.
        sum_scale: Sum scale, in the shape of `output_scale`.
    """

    x: Tensor
    weight: Tensor
    output_scale: Tensor
    operand: Tensor
    scale: Tensor
    zero_point: Tensor
    sum_scale: Tensor


class _QuantizedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_scale: Tensor, lower: Tensor, upper: Tensor,
        w_lower: Tensor | None, w_upper: Tensor, operation: KnownProducts, of_input: InputGrid,
        of_weight: QuantizedWeight,
    ) -> Tensor:  # fmt: skip
        training = any(ctx.needs_input_grad)
        grid, operand_w, codes_w = of_weight
        operand, codes, scale, zero_point = input_operator.forward(
            x, lower, upper, of_input.bits, of_input.signed, training
        )
        sum_scale = layer_sum_scale(output_scale, scale, of_input.bits, grid)
        y = rescale_(operation(operand, operand_w), sum_scale, bias, operation.output_dims)
        if training:
            ctx.save_for_backward(
                lower, upper, w_lower, w_upper, grid.mean, grid.std, codes_w.codes,
                *LayerState(x, weight, output_scale, codes, scale, zero_point, sum_scale),
            )  # fmt: skip
            constants = grid.view, grid.bits, grid.grid, grid.rounding
            ctx.known = operation, (of_input.bits, of_input.rounding, of_input.signed), constants
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        arguments = ctx.known, ctx.needs_input_grad, grad, *ctx.saved_tensors
        return (*differentiable(_saved_gradients, arguments), None, None, None)


def _saved_gradients(
    known: tuple[Any, ...], needs: tuple[bool, ...], grad: Tensor, lower: Tensor, upper: Tensor,
    w_lower: Tensor | None, w_upper: Tensor, mean: Tensor | None, std: Tensor | None, w_codes: Tensor, *state: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return `layer_gradients` from what the forward saved."""
    operation, own, constants = known
    of_input, of_weight = InputGrid(lower, upper, *own), WeightGrid(w_lower, w_upper, mean, std, *constants)
    codes = WeightCodes(w_codes, of_weight.bits, of_weight.grid)
    return layer_gradients(operation, of_input, of_weight, codes, needs, grad, LayerState(*state))


def layer_gradients(
    operation: KnownProducts, of_input: InputGrid, of_weight: WeightGrid, codes: WeightCodes,
    needs: tuple[bool, ...], grad: Tensor, state: LayerState,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients to input, weight, bias, output scale, and lower and upper bound of input and weight.

    `needs` says which of the eight are asked for, `grad` is that to the output, `codes` are those of the weight.
    """
    x, weight, output_scale, operand, scale, zero_point, sum_scale = state
    to_bounds = needs[4] or needs[5]
    # the input's scale is part of the sum scale, whose gradient comes with that of the weight
    wanted = needs[0] or to_bounds, needs[1] or needs[3] or needs[6] or needs[7] or to_bounds, needs[2]
    offset = zero_point if operand.dtype == torch.uint8 else None
    grad_x, grad_w, grad_bias = product_gradients(operation, grad, operand, offset, codes, sum_scale, x.shape, wanted)
    to_output_scale = grad_scale = to_weight = to_w_lower = to_w_upper = None
    if grad_w is not None:
        grad_w, grad_sum_scale = split_gradient(grad_w, codes, operation, sum_scale)
        to_weight, to_w_lower, to_w_upper = weight_operator.backward(grad_w, weight, of_weight, in_place=True)
        to_output_scale, grad_scale = add_scale_gradients(
            grad_sum_scale, output_scale, scale, of_input.bits, of_weight, to_w_upper
        )
    to_w_lower = None if of_weight.lower is None else to_w_lower
    if grad_x is None:
        return None, to_weight, grad_bias, to_output_scale, None, None, to_w_lower, to_w_upper
    grad_scale = None if of_weight.unitless else grad_scale
    to_x, to_lower, to_upper = input_operator.backward(
        grad_x, grad_scale, x, of_input, scale, zero_point, in_place=True
    )
    return to_x, to_weight, grad_bias, to_output_scale, to_lower, to_upper, to_w_lower, to_w_upper


def layer_sum_scale(output_scale: Tensor, scale: Tensor, bits: int, of_weight: WeightGrid) -> Tensor:
    """Return the sum scale, in the shape of `output_scale`, for an input of this scale and width.

    Example:
        >>> grid = WeightGrid(None, torch.tensor([7.0]), None, None, (1, 1, 1, 1), 4, "integer", plain.Rounding())
        >>> layer_sum_scale(torch.tensor([-2.0]), torch.tensor(0.5), 8, grid).tolist()
        [1.0]
    """
    upper, in_scale, top, n = _scale_parts(scale, bits, of_weight)
    library = kernels(output_scale, upper, in_scale)
    if library is None:
        input_scale = 1.0 / n if in_scale is None else in_scale
        return plain.sum_scale(output_scale, plain.weight_scale(upper, top), input_scale)
    sum_scale = torch.empty_like(output_scale)
    library.daq_combine_scale(
        output_scale.data_ptr(), address(upper), address(in_scale), sum_scale.data_ptr(), sum_scale.numel(), top,
        1.0 / top, 1.0 / n,
    )  # fmt: skip
    return sum_scale


def add_scale_gradients(
    grad: Tensor, output_scale: Tensor, scale: Tensor, bits: int, of_weight: WeightGrid, grad_upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients to `output_scale` and to the input's `scale` from that to the sum scale.

    The gradient to the weight's upper bound is added to `grad_upper`, in place, unless the weight is unitless.
    """
    upper, in_scale, top, n = _scale_parts(scale, bits, of_weight)
    library = kernels(grad, output_scale, upper, in_scale, grad_upper)
    if library is None:
        input_scale, weight_scale = 1.0 / n if in_scale is None else in_scale, plain.weight_scale(upper, top)
        size = grad * output_scale.abs()
        if upper is not None:
            grad_upper += torch.where(upper > 0, size * input_scale / top, 0.0)
        return grad * weight_scale * input_scale * output_scale.sign(), (size * weight_scale).sum()
    to_output_scale, to_scale = torch.empty_like(output_scale), torch.empty((), dtype=grad.dtype)
    library.daq_combine_scale_backward(
        grad.data_ptr(), output_scale.data_ptr(), address(upper), address(in_scale), to_output_scale.data_ptr(),
        grad_upper.data_ptr(), to_scale.data_ptr(), grad.numel(), top, 1.0 / top, 1.0 / n,
    )  # fmt: skip
    return to_output_scale, to_scale


def _scale_parts(scale: Tensor, bits: int, of_weight: WeightGrid) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Return the weight's upper bound and the input's scale, None where unitless, and both operands' full range."""
    n = 2**bits - 1
    return (None, None, of_weight.top, n) if of_weight.unitless else (of_weight.upper, scale, of_weight.top, n)
