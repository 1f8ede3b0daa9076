"""A whole quantized layer as one step that keeps bytes for its backward: input quantizer, products, scale, bias.

    y = products(operand_x, operand_w) * S + bias,    operand_x = clip(round(x / s) ...)   and   S = scale * s

Kept are `x`, the codes of both operands, and `S`: not the operands, and not the sums. With
`G = products_backward(grad, operand_x)` the gradients are

    to S, per channel    sum(G * operand_w)      for the sums are linear in the weight, channel by channel
    to operand_w         S * G
    to operand_x         products_backward(grad, S * operand_w)

so that nothing of the output's size is scaled, and the gradient to `x` takes the memory of that to its operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional import fused_input
from daqconvert.functional.coded import (
    InputCodes,
    View,
    WeightCodes,
    channel_sums,
    codes_of,
    expand_input,
    expand_weight,
    scale_channels,
)
from daqconvert.functional.grid import Rounding
from daqconvert.functional.native import address, in_memory_order, kernels, row_major, view_argument
from daqconvert.functional.products import ConvolutionProducts, KnownProducts, LinearProducts
from daqconvert.functional.registration import refuse
from daqconvert.functional.rescale import rescale_


@dataclass(frozen=True)
class InputGrid:
    """How an input is still to be quantized.

    Attributes:
        lower: Scalar bound.
        upper: Scalar bound.
        bits: 1 to 8.
        rounding: Gradient of the rounding.
        unitless: The operand counts in parts of its full range: `1 / n` belongs to the scale, not the step.
    """

    lower: Tensor
    upper: Tensor
    bits: int
    rounding: Rounding
    unitless: bool


def can_fuse(operation: Any, x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether `scaled_products` takes this: known products of float32 (or float64) operands, outside of a compiler."""
    if torch.compiler.is_compiling() or not isinstance(operation, (LinearProducts, ConvolutionProducts)):
        return False
    same = x.dtype == w.dtype == scale.dtype and (bias is None or bias.dtype == x.dtype)
    wide = x.dtype in (torch.float32, torch.float64) and (bias is None or bias.dim() == 1)
    return same and wide and operation.accepts(x, w) and not torch.is_autocast_enabled(x.device.type)


def scaled_products(
    operation: KnownProducts, x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, grid: InputGrid | None = None
) -> Tensor:
    """Return `operation(x, w) * scale + bias`; gradients reach all four, and the bounds of the input.

    Args:
        operation: The bare products.
        x: Operand of the input; the input itself where its grid is given.
        w: Operand of the weight.
        scale: `()` or `(C_out,)`; without the input's where its grid is given.
        bias: `(C_out,)` or None.
        grid: How the input is quantized.

    Raises:
        DaqError: On a second derivative.

    Example:
        >>> from daqconvert.functional.products import LinearProducts
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
        >>> scaled_products(LinearProducts(), x, w, torch.tensor(0.5), torch.tensor([1.0])).tolist()
        [[1.5]]
    """
    lower, upper = (None, None) if grid is None else (grid.lower, grid.upper)
    out: Tensor = _ScaledProducts.apply(x, w, scale, bias, lower, upper, operation, grid)
    return out


@dataclass(frozen=True)
class _Known:
    """What a backward needs beside tensors."""

    operation: KnownProducts
    shape: torch.Size
    weight: tuple[float, float] | None
    grid: InputGrid | None
    needs: tuple[bool, ...]


class _ScaledProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None, lower: Any, upper: Any,
        operation: KnownProducts, grid: InputGrid | None,
    ) -> Tensor:  # fmt: skip
        training = any(ctx.needs_input_grad)
        input, step, zero_point, codes, total = None, None, None, None, scale
        if grid is not None:
            r = grid.rounding
            input = x
            x, codes, step, zero_point = fused_input.forward(
                x, lower, upper, grid.bits, r.kind == "ste", r.c, r.a, training
            )
            total = scale * (1.0 / (2**grid.bits - 1) if grid.unitless else step)
        y = rescale_(operation(x, w), total, bias, operation.output_dims)
        if training:
            coded = codes_of(x) if grid is None else None
            if isinstance(coded, InputCodes) and coded.codes.numel() == x.numel():
                codes, zero_point = coded.codes, coded.zero_point
            coded_w = codes_of(w)
            known_w = coded_w if isinstance(coded_w, WeightCodes) else None
            kept = x if codes is None else codes, w if known_w is None else known_w.codes
            ctx.save_for_backward(*kept, total, zero_point, input, lower, upper, step, scale)
            on_weight = None if known_w is None else (known_w.step, known_w.offset)
            ctx.known = _Known(operation, x.shape, on_weight, grid, ctx.needs_input_grad[:6])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            return (*_ScaledProductsBackward.apply(ctx.known, grad, *ctx.saved_tensors), None, None)
        return (*_gradients(ctx.known, grad, *ctx.saved_tensors), None, None)


class _ScaledProductsBackward(torch.autograd.Function):
    """The first derivative as a function of its own, so that the second can be refused with a clear error."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return _gradients(*args)

    backward = staticmethod(refuse)


def _gradients(
    known: _Known, grad: Tensor, x: Tensor, w: Tensor, total: Tensor, zero_point: Tensor | None, input: Tensor | None,
    lower: Tensor | None, upper: Tensor | None, step: Tensor | None, scale: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients to input, weight operand, scale, bias, lower and upper."""
    operation, needs, grid = known.operation, known.needs, known.grid
    view = operation.view(w.shape)
    coded = None if known.weight is None else WeightCodes(w, *known.weight)
    bounds = needs[4] or needs[5]
    of_input, of_weight = needs[0] or bounds, needs[1] or needs[2] or bounds
    operand = None
    if of_weight:
        operand = x if zero_point is None else expand_input(x, zero_point)
    scaled = scale_channels(w, view, total) if coded is None else expand_weight(coded, view, total, total.dtype)
    grad_x, grad_w, grad_bias = operation.gradients(
        grad, operand, scaled, known.shape, (of_input, of_weight, needs[3])
    )
    del operand, scaled
    grad_total = None
    if grad_w is not None:
        grad_w, grad_total = _split(grad_w, coded, w, view, total)
    if grid is None or step is None:
        return grad_x, grad_w, grad_total, grad_bias, None, None
    grad_scale, grad_step = grad_total, None
    if grad_total is not None:
        grad_scale = grad_total * (1.0 / (2**grid.bits - 1) if grid.unitless else step)
        grad_step = None if grid.unitless else (grad_total * scale).sum()
    if grad_x is None:
        return None, grad_w, grad_scale, grad_bias, None, None
    assert input is not None and lower is not None and upper is not None and zero_point is not None
    r = grid.rounding
    to_input = fused_input.backward(
        grad_x, grad_step, input, lower, upper, step, zero_point, grid.bits, r.kind == "ste", r.c, r.a, in_place=True
    )
    return to_input[0], grad_w, grad_scale, grad_bias, to_input[1], to_input[2]


def _split(grad: Tensor, coded: WeightCodes | None, w: Tensor, view: View, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients to the operand of the weight and to the scale, from that to `scale * operand`."""
    library = None if coded is None else kernels(grad, scale, coded.codes)
    if coded is None or library is None:
        operand = w if coded is None else expand_weight(coded, view, None, scale.dtype)
        return scale_channels(grad, view, scale), channel_sums(grad * operand, view, scale)
    codes = row_major(coded.codes, view)
    grad, of_scale = in_memory_order(grad, codes), torch.empty_like(scale)
    library.daq_scale_weight_gradient(
        grad.data_ptr(), codes.data_ptr(), view_argument(view), coded.step, coded.offset, address(scale),
        of_scale.data_ptr(), scale.dim() > 0, torch.get_num_threads(),
    )  # fmt: skip
    return grad, of_scale
