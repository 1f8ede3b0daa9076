"""The whole input quantizer as one operator forward and one backward: `torch.ops.daqconvert.quantize_input`.

    scale      = (upper - lower) / n                                   lower <= 0 <= upper enforced
    zero_point = clip(round(-lower / scale), 0, n)
    operand    = clip(round(x / scale), -zero_point, n - zero_point)
    codes      = operand + zero_point                                  uint8: what a convolution keeps

For its backward the operator saves `x` and a few scalars. float32 on the CPU runs in the compiled kernels if there are
any, everything else in the plain operations of `functional.grid`, with the same codes. `input_operand` is the form for
a frozen layer: no gradient, no codes, nothing kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional import grid as plain
from daqconvert.functional.dasr import refuse, through_rounding, wide
from daqconvert.functional.grid import TINY, Rounding
from daqconvert.functional.native import (
    address,
    dense,
    in_memory_order,
    kernels,
    only_values,
    register,
    slope_numbers,
)


@dataclass(frozen=True)
class InputGrid:
    """How an input is quantized.

    Attributes:
        lower: Bound, `()` or `(1,)`, taken as 0 where positive.
        upper: Bound of the same shape, taken as 0 where negative.
        bits: 1 to 8.
        rounding: Gradient of the rounding.
        signed: Whether `lower` is read. If not, it stands for 0, and its gradient is exactly 0.
    """

    lower: Tensor
    upper: Tensor
    bits: int
    rounding: Rounding
    signed: bool = True


def quantize_input(x: Tensor, grid: InputGrid, codes: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return operand, codes, scale and zero point of an input; gradients reach `x` and both bounds.

    The operand has the shape and dtype of `x`, any floating one; the codes are uint8, empty unless `codes` asks for
    them; scale and zero point are scalars, float32 at least.

    Raises:
        DaqError: On a second derivative.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 1 and 6-11.

    Example:
        >>> x = torch.tensor([0.1, 0.4, 2.0], requires_grad=True)
        >>> grid = InputGrid(torch.tensor(0.0), torch.tensor(1.0), 2, Rounding("ste"))
        >>> operand, codes, scale, _ = quantize_input(x, grid, codes=True)
        >>> operand.tolist(), codes.tolist()
        ([0.0, 1.0, 3.0], [0, 1, 3])
        >>> (operand * scale).sum().backward(); x.grad.tolist()
        [1.0, 1.0, 0.0]
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.daqconvert.quantize_input.default(
        x, grid.lower, grid.upper, grid.bits, grid.signed, *grid.rounding.numbers, codes
    )
    return found


def forward(
    x: Tensor, lower: Tensor, upper: Tensor, bits: int, signed: bool, codes: bool,
    into: Callable[[Tensor], Tensor] = torch.empty_like,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what the operator returns, without gradient.

    `into(x)` returns a tensor of the shape and strides of `x`, into which the compiled kernels write the operand.
    """
    library = kernels(x, lower, upper)
    scale, zero_point = parameters(lower, upper, bits, signed)
    if library is None:
        operand = plain.quantize_input(x, scale, zero_point, bits)
        stored = (operand + zero_point).to(torch.uint8) if codes else x.new_empty(0, dtype=torch.uint8)
        return operand, stored, scale, zero_point
    x = dense(x)
    operand = into(x)
    stored = torch.empty_like(x, dtype=torch.uint8) if codes else x.new_empty(0, dtype=torch.uint8)
    library.daq_quantize_input(
        x.data_ptr(), operand.data_ptr(), stored.data_ptr() if codes else None, x.numel(), scale.data_ptr(),
        zero_point.data_ptr(), 2**bits - 1, torch.get_num_threads(),
    )  # fmt: skip
    return operand, stored, scale, zero_point


def parameters(lower: Tensor, upper: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, both scalars, of an input with these bounds, without gradient."""
    library = kernels(lower, upper)
    if library is None:
        scale = plain.input_scale(lower, upper, bits, signed)
        return scale, plain.input_zero_point(lower, scale, bits, signed)
    scale, zero_point = upper.new_empty(()), upper.new_empty(())
    library.daq_input_parameters(
        address(lower if signed else None), upper.data_ptr(), 2**bits - 1, scale.data_ptr(), zero_point.data_ptr()
    )
    return scale, zero_point


def backward(
    grad: Tensor | None, grad_scale: Tensor | None, x: Tensor, grid: InputGrid, scale: Tensor, zero_point: Tensor,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients to `x`, `lower` and `upper` from those to operand and scale.

    The other arguments are those of the forward. With `in_place` nobody else may hold `grad`: where the kernels run,
    they write the gradient to `x` into its memory.
    """
    if grad is None:
        grad = torch.zeros_like(x)  # the operand was not used, its scale was
    lower, upper = grid.lower, grid.upper
    library = kernels(x, lower, upper, grad)
    if library is None:
        return _plain_backward(grad, grad_scale, x, grid, scale, zero_point)
    x = dense(x)
    grad = in_memory_order(grad, x)
    grad_x = grad if in_place else torch.empty_like(x)
    grad_lower, grad_upper = torch.empty_like(lower), torch.empty_like(upper)
    library.daq_quantize_input_backward(
        grad.data_ptr(), address(grad_scale), x.data_ptr(), grad_x.data_ptr(), x.numel(),
        address(lower if grid.signed else None), upper.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
        grad_lower.data_ptr(), grad_upper.data_ptr(), 2**grid.bits - 1,
        *slope_numbers(*grid.rounding.numbers), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_lower, grad_upper


def _plain_backward(
    grad: Tensor, grad_scale: Tensor | None, x: Tensor, grid: InputGrid, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    lower, upper, top = grid.lower, grid.upper, 2**grid.bits - 1
    levels = wide(x) / scale
    inside = (levels > -zero_point) & (levels < top - zero_point)
    passed = torch.where(inside, through_rounding(grad.to(levels.dtype), levels, *grid.rounding.numbers), 0.0)
    of_scale = -torch.where(inside, passed * levels, 0.0).sum() / scale
    of_scale = of_scale if grad_scale is None else of_scale + grad_scale
    share = torch.where(scale * top > TINY, of_scale / top, 0.0)  # a range of no width has no gradient
    of_lower = torch.where(lower > 0, 0.0, -share) if grid.signed else torch.zeros_like(lower)
    of_upper = torch.where(upper < 0, 0.0, share)
    return (passed / scale).to(x.dtype), of_lower.to(lower.dtype), of_upper.to(upper.dtype)


def input_operand(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return `clip(round(x / scale), -zero_point, n - zero_point)` in the dtype of `x`, with a uint8 zero point.

    The kernels compute it in one pass where nothing but values is asked for.

    Example:
        >>> zero = torch.tensor(0, dtype=torch.uint8)
        >>> input_operand(torch.tensor([0.1, 0.9, 9.0]), torch.tensor(0.5), zero, 2).tolist()
        [0.0, 2.0, 3.0]
    """
    library = kernels(x, scale, zero_point) if only_values(x, scale) else None
    if library is None:
        # NOTE: operation by operation as in training: where a size of 1 leaves the layout open, the strides decide
        # which kernel the convolution and what follows it take, and two kernels may differ in the last bit
        return plain.quantize_input(x, scale, wide(zero_point), bits)
    x, zero = dense(x), zero_point.float()
    out = torch.empty_like(x)
    library.daq_quantize_input(
        x.data_ptr(), out.data_ptr(), None, x.numel(), scale.data_ptr(), zero.data_ptr(), 2**bits - 1,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


# The operator, as torch.library wants it: flat arguments in the order of the schema.


def _operator_forward(
    x: Tensor, lower: Tensor, upper: Tensor, bits: int, signed: bool, kind: int, c: float, a: float, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(x, lower, upper, bits, signed, codes)


def _operator_backward(
    grad: Tensor | None, grad_scale: Tensor | None, x: Tensor, lower: Tensor, upper: Tensor, scale: Tensor,
    zero_point: Tensor, bits: int, signed: bool, kind: int, c: float, a: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grid = InputGrid(lower, upper, bits, Rounding.of(kind, c, a), signed)
    return backward(grad, grad_scale, x, grid, scale, zero_point)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, lower, upper, *constants, _ = inputs
    ctx.save_for_backward(x, lower, upper, output[2], output[3])
    ctx.constants = constants
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[3])


def _gradients(ctx: Any, grad: Tensor | None, _codes: Any, grad_scale: Tensor | None, _zero: Any) -> tuple[Any, ...]:
    found = torch.ops.daqconvert.quantize_input_backward.default(grad, grad_scale, *ctx.saved_tensors, *ctx.constants)
    return (*found, None, None, None, None, None, None)


def _fake(
    x: Tensor, lower: Tensor, upper: Tensor, bits: int, signed: bool, kind: int, c: float, a: float, codes: bool
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if upper.dtype == torch.float64 else torch.float32
    stored = torch.empty_like(x, dtype=torch.uint8) if codes else x.new_empty(0, dtype=torch.uint8)
    return torch.empty_like(x), stored, upper.new_empty((), dtype=dtype), upper.new_empty((), dtype=dtype)


def _fake_backward(
    grad: Any, grad_scale: Any, x: Tensor, lower: Tensor, upper: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(lower), torch.empty_like(upper)


register(
    "quantize_input(Tensor x, Tensor lower, Tensor upper, int bits, bool signed, int kind, float c, float a,"
    " bool codes) -> (Tensor operand, Tensor codes, Tensor scale, Tensor zero_point)",
    _operator_forward, _fake, _gradients, _remember,
)  # fmt: skip
register(
    "quantize_input_backward(Tensor? grad, Tensor? grad_scale, Tensor x, Tensor lower, Tensor upper, Tensor scale,"
    " Tensor zero_point, int bits, bool signed, int kind, float c, float a) -> (Tensor, Tensor, Tensor)",
    _operator_backward, _fake_backward, refuse,
)  # fmt: skip
