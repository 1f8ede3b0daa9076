"""The whole weight quantizer as one operator forward and one backward: `torch.ops.daqconvert.quantize_weight`.

    v       = (W - mean) / std                         where normalized, else W; both taken by torch before
    q       = clip(round((v - lower) / scale), 0, n)   midrise, scale = (upper - lower) / n; operand 2q - n, code q
    q       = clip(round(v / scale), -m, m)            integer, scale = upper / m;           operand q,      code q + m
    q       = clip(round(v / scale), -m - 1, m)        twos, likewise;                      operand q, code q + m + 1

It saves the weight alone for its backward, and the few numbers per channel. A weight that is not normalized has
`lower = -upper`. From codes that are known already it only expands the operand; the backward is the same.

A weight is seen as `(A, B, C, D)`, in this order in memory, its channel is `a * C + c` (`kernels/quantizer.cpp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from daqconvert.functional.codes import WeightCodes, expand_weight
from daqconvert.functional.dasr import round_half_even, through_rounding
from daqconvert.functional.grid import TINY, Rounding, coding, levels, weight_codes
from daqconvert.functional.native import address, in_memory_order, kernels, refuse, register, row_major, view_argument
from daqconvert.functional.slopes import slope_numbers


def quantize_weight(
    weight: Tensor, lower: Tensor | None, upper: Tensor, mean: Tensor | None, std: Tensor | None,
    view: tuple[int, int, int, int], bits: int, grid: str, rounding: Rounding, known: Tensor | None = None,
) -> tuple[Tensor, WeightCodes]:  # fmt: skip
    """Return operand and codes of a weight; gradients reach `weight`, `lower` and `upper`.

    Args:
        weight: Any floating dtype; arithmetic in float32 at least.
        lower: `(A * C,)` or scalar; None, as mean and std, where the weight is not normalized.
        upper: Likewise.
        mean: Likewise, without gradient.
        std: Likewise, without gradient.
        view: `(A, B, C, D)`.
        bits: 1 to 8 (2 to 8 but for midrise).
        grid: `"midrise"`, `"integer"` or `"twos"`.
        rounding: Gradient of the rounding.
        known: Codes of just this weight and these bounds, where they are known.

    Raises:
        DaqError: On a second derivative.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 1-3 and 6-11.

    Example:
        >>> weight = torch.tensor([[-0.7, 0.1, 0.69]], requires_grad=True)
        >>> operand, codes = quantize_weight(
        ...     weight, None, torch.tensor([0.7]), None, None, (1, 1, 1, 3), 4, "integer", Rounding("ste"))
        >>> operand.tolist(), codes.codes.tolist()
        ([[-7.0, 1.0, 7.0]], [[0, 8, 14]])
    """
    operand, codes = torch.ops.daqconvert.quantize_weight.default(
        weight, lower, upper, mean, std, known, view, bits, grid, *rounding.numbers
    )
    return operand, WeightCodes(codes if known is None else known, *coding(bits, grid))


def forward(
    weight: Tensor, lower: Tensor | None, upper: Tensor, mean: Tensor | None, std: Tensor | None,
    known: Tensor | None, view: Sequence[int], bits: int, grid: str, kind: int, c: float, a: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what the operator returns, without gradient; arguments as in `quantize_weight`."""
    if known is not None:  # an operator must not return its own input
        coded = WeightCodes(known, *coding(bits, grid))
        return expand_weight(coded, (1, 1, 1, known.numel()), None, weight.dtype), known.new_empty(0)
    library = kernels(weight, lower, upper, mean, std)
    if library is None:
        midrise, (low, top) = grid == "midrise", _ends(bits, grid)
        q = round_half_even(torch.clamp(_levels(weight, lower, upper, mean, std, view, top, midrise)[0], low, top))
        operand = (2.0 * q - top if midrise else q).reshape(weight.shape)
        return operand.to(weight.dtype), weight_codes(operand, bits, grid)
    rows = row_major(weight, view)
    operand, found = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.uint8)
    library.daq_quantize_weight(
        rows.data_ptr(), operand.data_ptr(), found.data_ptr(), view_argument(tuple(view)), address(lower),
        upper.data_ptr(), address(mean), address(std), *_ends(bits, grid), grid == "midrise", torch.get_num_threads(),
    )  # fmt: skip
    if rows is weight:
        return operand, found
    return torch.empty_like(weight).copy_(operand), torch.empty_like(weight, dtype=torch.uint8).copy_(found)


def codes_alone(
    weight: Tensor, lower: Tensor | None, upper: Tensor, mean: Tensor | None, std: Tensor | None,
    view: tuple[int, int, int, int], bits: int, grid: str,
) -> Tensor:  # fmt: skip
    """Return the codes of a weight, with the strides of `empty_like(weight)`; the kernels make no operand for it.

    Args:
        weight: As in `quantize_weight`, like the others.
        lower: Bound.
        upper: Bound.
        mean: Or None.
        std: Or None.
        view: `(A, B, C, D)`.
        bits: 1 to 8.
        grid: `"midrise"`, `"integer"` or `"twos"`.

    Example:
        >>> weight, upper = torch.tensor([[-0.7, 0.1, 0.69]]), torch.tensor([0.7])
        >>> codes_alone(weight, None, upper, None, None, (1, 1, 1, 3), 4, "integer").tolist()
        [[0, 8, 14]]
    """
    library = kernels(weight, lower, upper, mean, std)
    if library is None:
        return forward(weight, lower, upper, mean, std, None, view, bits, grid, 0, 0.0, 0.0)[1]
    rows = row_major(weight, view)
    found = torch.empty_like(rows, dtype=torch.uint8)
    library.daq_quantize_weight(
        rows.data_ptr(), None, found.data_ptr(), view_argument(view), address(lower), upper.data_ptr(), address(mean),
        address(std), *_ends(bits, grid), grid == "midrise", torch.get_num_threads(),
    )  # fmt: skip
    return found if rows is weight else torch.empty_like(weight, dtype=torch.uint8).copy_(found)


def _ends(bits: int, grid: str) -> tuple[float, float]:
    """Lowest and highest rounded level unit: 0 and `n` on the midrise grid, the operands themselves elsewhere."""
    return (0.0 if grid == "midrise" else coding(bits, grid)[1]), float(levels(bits, grid))


def _levels(
    weight: Tensor, lower: Tensor | None, upper: Tensor, mean: Tensor | None, std: Tensor | None, view: Sequence[int],
    top: float, midrise: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return level units and scale, both in the shape of `view`, and the width whose gradient ends at `TINY`."""

    def spread(t: Tensor) -> Tensor:
        return (t if t.dtype == torch.float64 else t.float()).reshape(view[0], 1, view[2], 1)

    v = (weight if weight.dtype == torch.float64 else weight.float()).reshape(view)
    if mean is not None and std is not None:
        v = (v - spread(mean)) / spread(std)
    high = spread(upper)
    low = -high if lower is None else spread(lower)
    width = high - low if midrise else high
    scale = width.clamp(min=TINY) / top
    return ((v - low) / scale if midrise else v / scale), scale, width


def backward(
    grad: Tensor, weight: Tensor, lower: Tensor | None, upper: Tensor, mean: Tensor | None, std: Tensor | None,
    view: Sequence[int], bits: int, grid: str, kind: int, c: float, a: float, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients to the weight and to its bounds, that to `lower` without meaning where it is None.

    Args:
        grad: Of the operand.
        weight: As it went in, like the others.
        lower: Bound.
        upper: Bound.
        mean: Or None.
        std: Or None.
        view: `(A, B, C, D)`.
        bits: 1 to 8.
        grid: `"midrise"`, `"integer"` or `"twos"`.
        kind: Of the rounding.
        c: Likewise.
        a: Likewise.
        in_place: Nobody else holds `grad`: its memory may take the gradient to the weight.
    """
    library = kernels(weight, lower, upper, mean, std, grad)
    if library is None:
        return _plain_backward(grad, weight, lower, upper, mean, std, view, bits, grid, kind, c, a)
    rows = row_major(weight, view)
    grad = in_memory_order(grad, rows)
    grad_weight = grad if in_place else torch.empty_like(rows)
    grad_lower, grad_upper = torch.zeros_like(upper), torch.empty_like(upper)
    library.daq_quantize_weight_backward(
        grad.data_ptr(), rows.data_ptr(), grad_weight.data_ptr(), view_argument(tuple(view)), address(lower),
        upper.data_ptr(), address(mean), address(std), grad_lower.data_ptr(), grad_upper.data_ptr(),
        *_ends(bits, grid), grid == "midrise", *slope_numbers(kind, c, a), torch.get_num_threads(),
    )  # fmt: skip
    if rows is not weight:
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    return grad_weight, grad_lower, grad_upper


def _operator_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward(*args)


def _plain_backward(
    grad: Tensor, weight: Tensor, lower: Tensor | None, upper: Tensor, mean: Tensor | None, std: Tensor | None,
    view: Sequence[int], bits: int, grid: str, kind: int, c: float, a: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    midrise, (low, top) = grid == "midrise", _ends(bits, grid)
    x, scale, width = _levels(weight, lower, upper, mean, std, view, top, midrise)
    inside = (x >= low) & (x <= top)
    arrived = grad.reshape(view).to(x.dtype) * (2.0 if midrise else 1.0)
    passed = torch.where(inside, through_rounding(arrived, x, kind, c, a), 0.0)

    def total(t: Tensor) -> Tensor:
        return t.sum(dim=(1, 3), keepdim=True)

    of_upper = torch.where(width >= TINY, -total(torch.where(inside, passed * x, 0.0)) / scale / top, 0.0)
    of_lower = -total(passed) / scale - of_upper if midrise else torch.zeros_like(of_upper)
    if lower is None and midrise:  # lower is -upper
        of_upper, of_lower = of_upper - of_lower, torch.zeros_like(of_lower)
    of_weight = passed / scale if std is None else passed / scale / std.to(x.dtype).reshape(view[0], 1, view[2], 1)
    bounds = (t.reshape(upper.shape).to(upper.dtype) for t in (of_lower, of_upper))
    return (of_weight.reshape(weight.shape).to(weight.dtype), *bounds)  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, lower, upper, mean, std, _known, *constants = inputs
    ctx.save_for_backward(weight, lower, upper, mean, std)
    ctx.constants = constants
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor | None, _codes: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    weight, lower, upper, mean, std = ctx.saved_tensors
    found = torch.ops.daqconvert.quantize_weight_backward.default(
        grad, weight, lower, upper, mean, std, *ctx.constants
    )
    return (found[0], None if lower is None else found[1], found[2], *(None,) * 9)


def _fake(weight: Tensor, lower: Any, upper: Any, mean: Any, std: Any, known: Any, *_: Any) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(weight, dtype=torch.uint8) if known is None else known.new_empty(0)
    return torch.empty_like(weight), codes


def _fake_backward(grad: Tensor, weight: Tensor, lower: Any, upper: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(upper), torch.empty_like(upper)


_PARAMETERS = "Tensor? lower, Tensor upper, Tensor? mean, Tensor? std"
_CONSTANTS = "int[] view, int bits, str grid, int kind, float c, float a"
register(
    f"quantize_weight(Tensor weight, {_PARAMETERS}, Tensor? known, {_CONSTANTS}) -> (Tensor, Tensor)",
    forward, _fake, _gradients, _remember,
)  # fmt: skip
register(
    f"quantize_weight_backward(Tensor grad, Tensor weight, {_PARAMETERS}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor)",
    _operator_backward, _fake_backward, refuse,
)  # fmt: skip
