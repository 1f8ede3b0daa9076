"""The whole weight quantizer as one operator forward and one backward: `torch.ops.daqconvert.quantize_weight`.

    v       = (W - mean) / std                         where normalized, else W; `weight_moments` has both
    q       = clip(round((v - lower) / scale), 0, n)   midrise, scale = (upper - lower) / n; operand 2q - n, code q
    q       = clip(round(v / scale), -m, m)            integer, scale = upper / m;         operand q, code q + m
    q       = clip(round(v / scale), -m - 1, m)        twos,    scale = upper / m;         operand q, code q + m + 1

For its backward the operator saves the weight and a few numbers per channel. A weight that is not normalized has
`lower = -upper`. If the codes are known already, the forward only expands them to the operand; the backward is the
same. float32 on the CPU runs in the compiled kernels if there are any, everything else in the plain operations of
`functional.grid`.

A weight is seen as `(A, B, C, D)`, in this order in memory; its channel is `a * C + c` (`kernels/quantizer.cpp`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from daqconvert.functional import grid as plain
from daqconvert.functional.codes import View, WeightCodes, expand_weight
from daqconvert.functional.dasr import refuse, through_rounding, wide
from daqconvert.functional.grid import TINY, Rounding
from daqconvert.functional.native import (
    address,
    in_memory_order,
    kernels,
    only_values,
    register,
    row_major,
    slope_numbers,
    view_argument,
)


@dataclass(frozen=True)
class WeightGrid:
    """How a weight is quantized.

    Attributes:
        lower: Lower bound of a normalized weight, `(A * C,)` or scalar; else None, which stands for `-upper`.
        upper: Upper bound, of the same shape.
        mean: Mean of a normalized weight, without gradient; else None.
        std: Standard deviation of a normalized weight, without gradient; else None.
        view: The weight as `(A, B, C, D)`.
        bits: 1 to 8 on the midrise grid, 2 to 8 on the others.
        grid: `"midrise"`, `"integer"` or `"twos"`.
        rounding: Gradient of the rounding.
    """

    lower: Tensor | None
    upper: Tensor
    mean: Tensor | None
    std: Tensor | None
    view: View
    bits: int
    grid: str
    rounding: Rounding

    @property
    def top(self) -> int:
        """The largest operand."""
        return plain.levels(self.bits, self.grid)

    @property
    def unitless(self) -> bool:
        """Whether operands count in parts of full range, and `output_scale` carries the units."""
        return self.mean is not None


class QuantizedWeight(NamedTuple):
    """How a weight is quantized, and the result: the integer-valued operand, without gradient, and its codes."""

    grid: WeightGrid
    operand: Tensor
    codes: WeightCodes


def quantize_weight(weight: Tensor, grid: WeightGrid, known: Tensor | None = None) -> tuple[Tensor, WeightCodes]:
    """Return operand and codes of a weight of any floating dtype; gradients reach the weight and its bounds.

    `known` are the codes of exactly this weight and these bounds, if they were computed before.

    Raises:
        DaqError: On a second derivative.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 1-3 and 6-11.

    Example:
        >>> weight, upper = torch.tensor([[-0.7, 0.1, 0.69]], requires_grad=True), torch.tensor([0.7])
        >>> grid = WeightGrid(None, upper, None, None, (1, 1, 1, 3), 4, "integer", Rounding("ste"))
        >>> operand, codes = quantize_weight(weight, grid)
        >>> operand.tolist(), codes.codes.tolist()
        ([[-7.0, 1.0, 7.0]], [[0, 8, 14]])
    """
    g = grid
    operand, codes = torch.ops.daqconvert.quantize_weight.default(
        weight, g.lower, g.upper, g.mean, g.std, known, g.view, g.bits, g.grid, *g.rounding.numbers
    )
    return operand, WeightCodes(codes if known is None else known, g.bits, g.grid)


def forward(weight: Tensor, grid: WeightGrid, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what the operator returns, without gradient: the operand, and the codes, empty where they are known."""
    if known is not None:  # an operator must not return its own input
        codes = WeightCodes(known, grid.bits, grid.grid)
        return expand_weight(codes, (1, 1, 1, known.numel()), None, weight.dtype), known.new_empty(0)
    library = kernels(weight, grid.lower, grid.upper, grid.mean, grid.std)
    if library is None:
        operand = plain.quantize_weight(*_spread(weight, grid), grid.bits, grid.grid).reshape(weight.shape)
        return operand.to(weight.dtype), plain.weight_codes(operand, grid.bits, grid.grid)
    rows = row_major(weight, grid.view)
    operand, found = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.uint8)
    _quantize(library, rows, operand, found, grid)
    if rows is weight:
        return operand, found
    return torch.empty_like(weight).copy_(operand), torch.empty_like(weight, dtype=torch.uint8).copy_(found)


def codes_alone(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Return the codes of a weight, with the strides of `empty_like(weight)`; the kernels do not make the operand.

    Example:
        >>> weight, upper = torch.tensor([[-0.7, 0.1, 0.69]]), torch.tensor([0.7])
        >>> codes_alone(weight, WeightGrid(None, upper, None, None, (1, 1, 1, 3), 4, "integer", Rounding())).tolist()
        [[0, 8, 14]]
    """
    library = kernels(weight, grid.lower, grid.upper, grid.mean, grid.std)
    if library is None:
        return forward(weight, grid)[1]
    rows = row_major(weight, grid.view)
    found = torch.empty_like(rows, dtype=torch.uint8)
    _quantize(library, rows, None, found, grid)
    return found if rows is weight else torch.empty_like(weight, dtype=torch.uint8).copy_(found)


def _quantize(library: Any, rows: Tensor, operand: Tensor | None, codes: Tensor, grid: WeightGrid) -> None:
    """Let the kernels write the codes of a weight, and its operand where there is a tensor for it."""
    library.daq_quantize_weight(
        rows.data_ptr(), address(operand), codes.data_ptr(), view_argument(tuple(grid.view)), address(grid.lower),
        grid.upper.data_ptr(), address(grid.mean), address(grid.std), *plain.ends(grid.bits, grid.grid),
        grid.grid == "midrise", torch.get_num_threads(),
    )  # fmt: skip


def _spread(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight, normalized if it has moments, and its bounds, all so that they broadcast over its view."""
    view = grid.view

    def spread(t: Tensor) -> Tensor:
        return wide(t).reshape(view[0], 1, view[2], 1)

    v, upper = wide(weight).reshape(view), spread(grid.upper)
    if grid.mean is not None and grid.std is not None:
        v = (v - spread(grid.mean)) / spread(grid.std)
    return v, -upper if grid.lower is None else spread(grid.lower), upper


def backward(grad: Tensor, weight: Tensor, grid: WeightGrid, in_place: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to the weight, `lower` and `upper`; where `lower` is None its gradient has no meaning.

    `grad` is the gradient to the operand. With `in_place` nobody else may hold it: where the kernels run, they write
    the gradient to the weight into its memory.
    """
    lower, upper = grid.lower, grid.upper
    library = kernels(weight, lower, upper, grid.mean, grid.std, grad)
    if library is None:
        return _plain_backward(grad, weight, grid)
    rows = row_major(weight, grid.view)
    grad = in_memory_order(grad, rows)
    grad_weight = grad if in_place else torch.empty_like(rows)
    grad_lower, grad_upper = torch.zeros_like(upper), torch.empty_like(upper)
    library.daq_quantize_weight_backward(
        grad.data_ptr(), rows.data_ptr(), grad_weight.data_ptr(), view_argument(tuple(grid.view)), address(lower),
        upper.data_ptr(), address(grid.mean), address(grid.std), grad_lower.data_ptr(), grad_upper.data_ptr(),
        *plain.ends(grid.bits, grid.grid), grid.grid == "midrise", *slope_numbers(*grid.rounding.numbers),
        torch.get_num_threads(),
    )  # fmt: skip
    if rows is not weight:
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    return grad_weight, grad_lower, grad_upper


def _plain_backward(grad: Tensor, weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor, Tensor]:
    midrise, (low, top) = grid.grid == "midrise", plain.ends(grid.bits, grid.grid)
    v, lower, upper = _spread(weight, grid)
    x, scale = plain.weight_levels(v, lower, upper, grid.bits, grid.grid)
    inside = (x >= low) & (x <= top)
    arrived = grad.reshape(grid.view).to(x.dtype) * (2.0 if midrise else 1.0)
    passed = torch.where(inside, through_rounding(arrived, x, *grid.rounding.numbers), 0.0)

    def sums(t: Tensor) -> Tensor:
        return t.sum(dim=(1, 3), keepdim=True)

    wide_enough = plain.weight_width(lower, upper, grid.grid) >= TINY
    of_upper = torch.where(wide_enough, -sums(torch.where(inside, passed * x, 0.0)) / scale / top, 0.0)
    of_lower = -sums(passed) / scale - of_upper if midrise else torch.zeros_like(of_upper)
    if grid.lower is None and midrise:  # lower is -upper
        of_upper, of_lower = of_upper - of_lower, torch.zeros_like(of_lower)
    of_weight = passed / scale
    if grid.std is not None:
        of_weight = of_weight / grid.std.to(x.dtype).reshape(grid.view[0], 1, grid.view[2], 1)
    bounds = (t.reshape(grid.upper.shape).to(grid.upper.dtype) for t in (of_lower, of_upper))
    return (of_weight.reshape(weight.shape).to(weight.dtype), *bounds)  # type: ignore[return-value]


def weight_operand(codes: Tensor, bits: int, grid: str, dtype: torch.dtype) -> Tensor:
    """Return the operand of stored codes: `functional.grid.weight_operand`, in one pass where only values are asked.

    Example:
        >>> weight_operand(torch.tensor([0, 3], dtype=torch.uint8), 2, "midrise", torch.float32).tolist()
        [-3.0, 3.0]
    """
    if dtype != torch.float32 or not only_values(codes) or kernels(codes) is None:
        return plain.weight_operand(codes, bits, grid, dtype)
    return expand_weight(WeightCodes(codes, bits, grid), (1, 1, 1, codes.numel()), None, dtype)


def weight_moments(weight: Tensor, view: Sequence[int], bound_view: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased std of a weight's channels, without gradient, float32 at least.

    `bound_view` is the shape in which a bound broadcasts against `view`; dimensions where it is not 1 make up the
    channels. The result is `(channels,)`; without a `bound_view` it is `(1,)`, mean and std of all elements. A
    constant channel has mean 0, and its absolute value as std.

    Under `torch.compile` this is an operator that computes what eager PyTorch computes, with sums in the order of the
    indices, whatever the weight's layout in memory. A compiler would sum in an order of its own, and the last bit of a
    moment matters: training leaves many weights right between two levels, and one code that differed in a layer of
    36,864 weights gave 49 of 5,000 images another class (ResNet-20, W2A2).

    Example:
        >>> mean, std = weight_moments(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), (2, 2), (2, 1))
        >>> mean.tolist(), std.tolist()
        ([2.0, 0.0], [1.4142135381698608, 5.0])
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        found: tuple[Tensor, Tensor] = torch.ops.daqconvert.weight_moments.default(
            weight.detach(), list(view), None if bound_view is None else list(bound_view)
        )
        return found
    return _moments(weight.detach(), view, bound_view)


def _moments(weight: Tensor, view: Sequence[int], bound_view: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    v = wide(weight).contiguous().reshape(view)
    if bound_view is None:
        return v.mean().reshape(1), v.std().reshape(1)
    dims = [d for d, size in enumerate(bound_view) if size == 1] or [v.dim() - 1]
    mean = v.mean(dims, keepdim=True)
    single = v.numel() == math.prod(bound_view)  # the unbiased std of one element is 0 / 0
    std = torch.zeros_like(mean) if single else v.std(dims, keepdim=True)
    constant = std <= mean.abs() * 1e-7
    own = torch.where(mean == 0, 1.0, mean.abs())
    return torch.where(constant, 0.0, mean).reshape(-1), torch.where(constant, own, std).reshape(-1)


# The operators, as torch.library wants them: flat arguments in the order of the schema.


def _operator_forward(
    weight: Tensor, lower: Tensor | None, upper: Tensor, mean: Tensor | None, std: Tensor | None,
    known: Tensor | None, view: View, bits: int, grid: str, kind: int, c: float, a: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(weight, WeightGrid(lower, upper, mean, std, view, bits, grid, Rounding.of(kind, c, a)), known)


def _operator_backward(
    grad: Tensor, weight: Tensor, lower: Tensor | None, upper: Tensor, mean: Tensor | None, std: Tensor | None,
    view: View, bits: int, grid: str, kind: int, c: float, a: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, weight, WeightGrid(lower, upper, mean, std, view, bits, grid, Rounding.of(kind, c, a)))


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


def _fake_moments(weight: Tensor, view: Sequence[int], bound_view: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    count = math.prod(bound_view or ())
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty((count,), dtype=dtype), weight.new_empty((count,), dtype=dtype)


_PARAMETERS = "Tensor? lower, Tensor upper, Tensor? mean, Tensor? std"
_CONSTANTS = "int[] view, int bits, str grid, int kind, float c, float a"
register(
    f"quantize_weight(Tensor weight, {_PARAMETERS}, Tensor? known, {_CONSTANTS}) -> (Tensor, Tensor)",
    _operator_forward, _fake, _gradients, _remember,
)  # fmt: skip
register(
    f"quantize_weight_backward(Tensor grad, Tensor weight, {_PARAMETERS}, {_CONSTANTS}) -> (Tensor, Tensor, Tensor)",
    _operator_backward, _fake_backward, refuse,
)  # fmt: skip
register(
    "weight_moments(Tensor weight, int[] view, int[]? bound_view) -> (Tensor, Tensor)", _moments, _fake_moments, refuse
)
