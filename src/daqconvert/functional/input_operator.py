"""The whole input quantizer as one operator forward and one backward: `torch.ops.daqconvert.quantize_input`.

    scale      = (upper - lower) / n                                   lower <= 0 <= upper enforced
    zero_point = clip(round(-lower / scale), 0, n)
    operand    = clip(round(x / scale), -zero_point, n - zero_point)
    codes      = operand + zero_point                                  uint8: what a convolution keeps

It saves `x` alone for its backward. float32 on the CPU runs in the compiled kernels where there are such, everything
else in plain torch; both give the same codes, as does `functional.grid.quantize_input`, which `torch.compile` sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional.dasr import round_half_even, through_rounding
from daqconvert.functional.grid import TINY, Rounding, input_scale, input_zero_point
from daqconvert.functional.native import address, dense, in_memory_order, kernels, refuse, register
from daqconvert.functional.slopes import slope_numbers


def quantize_input(
    x: Tensor, lower: Tensor, upper: Tensor, bits: int, rounding: Rounding, codes: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return operand, codes, scale and zero point of an input; gradients reach `x`, `lower` and `upper`.

    Args:
        x: Any shape, any floating dtype; arithmetic in float32 at least.
        lower: Scalar; taken as 0 where positive.
        upper: Scalar; taken as 0 where negative.
        bits: 1 to 8.
        rounding: Gradient of the rounding.
        codes: Whether to compute the codes; empty otherwise.

    Returns:
        Operand (shape and dtype of `x`), codes (uint8), scale and zero point (scalars, float32 at least).

    Raises:
        DaqError: On a second derivative.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 1 and 6-11.

    Example:
        >>> x, zero, one = torch.tensor([0.1, 0.4, 2.0], requires_grad=True), torch.tensor(0.0), torch.tensor(1.0)
        >>> operand, codes, scale, _ = quantize_input(x, zero, one, 2, Rounding("ste"), codes=True)
        >>> operand.tolist(), codes.tolist()
        ([0.0, 1.0, 3.0], [0, 1, 3])
        >>> (operand * scale).sum().backward(); x.grad.tolist()
        [1.0, 1.0, 0.0]
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.daqconvert.quantize_input.default(
        x, lower, upper, bits, *rounding.numbers, codes
    )
    return found


def forward(
    x: Tensor, lower: Tensor, upper: Tensor, bits: int, kind: int, c: float, a: float, codes: bool,
    into: Callable[[Tensor], Tensor] = torch.empty_like,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what the operator returns, without gradient; arguments as in `quantize_input`.

    Args:
        x: Input.
        lower: Bound.
        upper: Bound.
        bits: 1 to 8.
        kind: Of no matter here, like the next two.
        c: Of the rounding.
        a: Likewise.
        codes: Whether to compute the codes.
        into: Gives the compiled kernels a tensor of the shape and strides of one for the operand.
    """
    top, library = 2**bits - 1, kernels(x, lower, upper)
    scale, zero_point = parameters(lower, upper, bits)
    if library is None:
        wide = x if x.dtype == torch.float64 else x.float()
        operand = round_half_even(torch.clamp(wide / scale, -zero_point, top - zero_point))
        stored = (operand + zero_point).to(torch.uint8) if codes else x.new_empty(0, dtype=torch.uint8)
        return operand.to(x.dtype), stored, scale, zero_point
    x = dense(x)
    operand = into(x)
    stored = torch.empty_like(x, dtype=torch.uint8) if codes else x.new_empty(0, dtype=torch.uint8)
    library.daq_quantize_input(
        x.data_ptr(), operand.data_ptr(), stored.data_ptr() if codes else None, x.numel(), scale.data_ptr(),
        zero_point.data_ptr(), top, torch.get_num_threads(),
    )  # fmt: skip
    return operand, stored, scale, zero_point


def parameters(lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of an input, without gradient.

    Args:
        lower: Scalar bound.
        upper: Scalar bound.
        bits: 1 to 8.
    """
    library = kernels(lower, upper)
    if library is None:
        scale = input_scale(lower, upper, bits)
        return scale, input_zero_point(lower, scale, bits)
    scale, zero_point = torch.empty_like(lower), torch.empty_like(lower)
    library.daq_input_parameters(
        lower.data_ptr(), upper.data_ptr(), 2**bits - 1, scale.data_ptr(), zero_point.data_ptr()
    )
    return scale, zero_point


def backward(
    grad: Tensor | None, grad_scale: Tensor | None, x: Tensor, lower: Tensor, upper: Tensor, scale: Tensor,
    zero_point: Tensor, bits: int, kind: int, c: float, a: float, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients to `x`, `lower` and `upper`.

    Args:
        grad: Of the operand.
        grad_scale: Of the scale.
        x: As it went in, like the others.
        lower: Bound.
        upper: Bound.
        scale: As it came out.
        zero_point: Likewise.
        bits: 1 to 8.
        kind: Of the rounding.
        c: Likewise.
        a: Likewise.
        in_place: Nobody else holds `grad`: its memory may take the gradient to `x`.
    """
    top = 2**bits - 1
    if grad is None:
        grad = torch.zeros_like(x)  # the operand was not used, its scale was
    library = kernels(x, lower, upper, grad)
    if library is None:
        return _plain_backward(grad, grad_scale, x, lower, upper, scale, zero_point, top, kind, c, a)
    x = dense(x)
    grad = in_memory_order(grad, x)
    grad_x = grad if in_place else torch.empty_like(x)
    grad_lower, grad_upper = torch.empty_like(lower), torch.empty_like(upper)
    library.daq_quantize_input_backward(
        grad.data_ptr(), address(grad_scale), x.data_ptr(), grad_x.data_ptr(), x.numel(), lower.data_ptr(),
        upper.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), grad_lower.data_ptr(), grad_upper.data_ptr(),
        top, *slope_numbers(kind, c, a), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_lower, grad_upper


def _operator_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(*args)


def _operator_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward(*args)


def _plain_backward(
    grad: Tensor, grad_scale: Tensor | None, x: Tensor, lower: Tensor, upper: Tensor, scale: Tensor,
    zero_point: Tensor, top: int, kind: int, c: float, a: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    levels = (x if x.dtype == torch.float64 else x.float()) / scale
    inside = (levels > -zero_point) & (levels < top - zero_point)
    passed = torch.where(inside, through_rounding(grad.to(levels.dtype), levels, kind, c, a), 0.0)
    of_scale = -torch.where(inside, passed * levels, 0.0).sum() / scale
    of_scale = of_scale if grad_scale is None else of_scale + grad_scale
    share = torch.where(scale * top > TINY, of_scale / top, 0.0)  # a range of no width has no gradient
    of_lower, of_upper = torch.where(lower > 0, 0.0, -share), torch.where(upper < 0, 0.0, share)
    return (passed / scale).to(x.dtype), of_lower.to(lower.dtype), of_upper.to(upper.dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, lower, upper, *constants, _ = inputs
    ctx.save_for_backward(x, lower, upper, output[2], output[3])
    ctx.constants = constants
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[3])


def _gradients(ctx: Any, grad: Tensor | None, _codes: Any, grad_scale: Tensor | None, _zero: Any) -> tuple[Any, ...]:
    found = torch.ops.daqconvert.quantize_input_backward.default(grad, grad_scale, *ctx.saved_tensors, *ctx.constants)
    return (*found, None, None, None, None, None)


def _fake(
    x: Tensor, lower: Tensor, upper: Tensor, bits: int, kind: int, c: float, a: float, codes: bool
) -> tuple[Tensor, ...]:
    wide = torch.float64 if upper.dtype == torch.float64 else torch.float32
    stored = torch.empty_like(x, dtype=torch.uint8) if codes else x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(x), stored, upper.new_empty((), dtype=wide), upper.new_empty((), dtype=wide)


def _fake_backward(
    grad: Any, grad_scale: Any, x: Tensor, lower: Tensor, upper: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(lower), torch.empty_like(upper)


register(
    "quantize_input(Tensor x, Tensor lower, Tensor upper, int bits, int kind, float c, float a, bool codes)"
    " -> (Tensor operand, Tensor codes, Tensor scale, Tensor zero_point)",
    _operator_forward, _fake, _gradients, _remember,
)  # fmt: skip
register(
    "quantize_input_backward(Tensor? grad, Tensor? grad_scale, Tensor x, Tensor lower, Tensor upper, Tensor scale,"
    " Tensor zero_point, int bits, int kind, float c, float a) -> (Tensor, Tensor, Tensor)",
    _operator_backward, _fake_backward, refuse,
)  # fmt: skip
