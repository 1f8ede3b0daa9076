"""The few numbers that a layer's elementwise arithmetic is written in, as one operator: not for a compiler to inline.

    step       = (upper - lower) / n                          of the input, lower <= 0 <= upper enforced
    zero_point = clip(round(-lower / step), 0, n)
    total      = |output_scale| * max(w_upper, 0) / top * step, or |output_scale| / (top * n) where nothing has units

A compiler that fuses elementwise operations computes a scalar's whole formula again for every vector of elements that
it is used with. An operator of its own it cannot look into: it is called once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daqconvert.functional.combined import add_scale_gradients, combine_scale
from daqconvert.functional.grid import TINY, input_scale, input_zero_point
from daqconvert.functional.native import address, kernels
from daqconvert.functional.registration import refuse, register

Parameters = tuple[Tensor, Tensor, Tensor]


def layer_parameters(
    output_scale: Tensor, w_upper: Tensor | None, lower: Tensor, upper: Tensor, bits: int, top: int
) -> Parameters:
    """Return the total scale, and step and zero point of the input; the total alone has gradients.

    Args:
        output_scale: `()` or `(C_out,)`.
        w_upper: Bound of the weight, in its shape; None where weight and input have no units.
        lower: Bound of the input, scalar.
        upper: Bound of the input, scalar.
        bits: Of the input.
        top: Largest operand of the weight.

    Example:
        >>> one = torch.tensor(1.0)
        >>> [t.item() for t in layer_parameters(one, one * 7, one * 0, one * 3, 2, 7)]
        [1.0, 1.0, 0.0]
    """
    found: Parameters = torch.ops.daqconvert.layer_parameters.default(output_scale, w_upper, lower, upper, bits, top)
    return found


def _forward(
    output_scale: Tensor, w_upper: Tensor | None, lower: Tensor, upper: Tensor, bits: int, top: int
) -> Parameters:
    library = kernels(lower, upper)
    if library is None:
        step = input_scale(lower, upper, bits)
        zero_point = input_zero_point(lower, step, bits)
    else:
        step, zero_point = torch.empty_like(upper), torch.empty_like(upper)
        library.daq_input_parameters(*map(address, (lower, upper)), 2**bits - 1, *map(address, (step, zero_point)))
    of_input = step if w_upper is not None else None
    total = combine_scale(output_scale, w_upper, top, of_input, 1.0 / top, 1.0 / (2**bits - 1))
    return total, step, zero_point


def _backward(
    grad: Tensor, output_scale: Tensor, w_upper: Tensor | None, lower: Tensor, upper: Tensor, step: Tensor, bits: int,
    top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, to_w_upper = 2**bits - 1, torch.zeros_like(output_scale)
    of_input = step if w_upper is not None else None
    to_scale, to_step = add_scale_gradients(
        grad.contiguous(), output_scale, w_upper, top, of_input, 1.0 / top, 1.0 / n, to_w_upper
    )
    if w_upper is None:
        return to_scale, to_w_upper, torch.zeros_like(lower), torch.zeros_like(upper)
    library = kernels(to_step, lower, upper, step)
    if library is not None:
        to_lower, to_upper = torch.empty_like(lower), torch.empty_like(upper)
        library.daq_input_parameters_backward(
            *map(address, (to_step, lower, upper, step)), n, *map(address, (to_lower, to_upper))
        )
        return to_scale, to_w_upper, to_lower, to_upper
    share = torch.where(step * n > TINY, to_step / n, 0.0)
    return to_scale, to_w_upper, torch.where(lower > 0, 0.0, -share), torch.where(upper < 0, 0.0, share)


def _fake(output_scale: Tensor, w_upper: Any, lower: Tensor, upper: Tensor, *_: Any) -> Parameters:
    return torch.empty_like(output_scale), torch.empty_like(upper), torch.empty_like(upper)


def _fake_backward(grad: Tensor, output_scale: Tensor, w_upper: Any, lower: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (output_scale, output_scale, lower, lower))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Parameters) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.constants = inputs[4:]
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx: Any, grad: Tensor, _step: Any, _zero_point: Any) -> tuple[Any, ...]:
    found = torch.ops.daqconvert.layer_parameters_backward.default(grad, *ctx.saved_tensors, *ctx.constants)
    return (found[0], None if ctx.saved_tensors[1] is None else found[1], *found[2:], None, None)


register(
    "layer_parameters(Tensor output_scale, Tensor? w_upper, Tensor lower, Tensor upper, int bits, int top)"
    " -> (Tensor, Tensor, Tensor)",
    _forward, _fake, _gradients, _remember,
)  # fmt: skip
register(
    "layer_parameters_backward(Tensor grad, Tensor output_scale, Tensor? w_upper, Tensor lower, Tensor upper,"
    " Tensor step, int bits, int top) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _fake_backward, refuse,
)  # fmt: skip
