"""The plain mathematics of the uniform quantizer: values in, integer-valued operands out.

Convention, for `b` bits, `n = 2**b - 1` and `m = 2**(b - 1) - 1`:

    inputs            operand q - zero_point = clip(round(x / scale), -zero_point, n - zero_point)
    midrise weights   q = clip(round((v - lower) / scale), 0, n), scale = (upper - lower) / n; operand 2q - n
    integer weights   operand clip(round(v / scale), -m, m), scale = upper / m
    twos weights      operand clip(round(v / scale), -m - 1, m), scale = upper / m: all levels of two's complement

Operands are integers held in floating point: sums of their products are exact in float32 below 2**24, whatever the
layout or the order. Scales are applied after the sum. Codes are what is stored: `q` for inputs and midrise weights,
the operand minus the lowest operand for the others; uint8, `0 .. n`.

Each formula is written once, here. A caller that needs a gradient passes a `Rounding`; one that needs values alone (a
frozen layer, a fused operator without kernels, an exporter) passes None. The formulas are plain operations of torch,
which run on every device and which a compiler can fuse. Arithmetic is float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daqconvert.functional.dasr import KINDS, clip_round, dsq_coefficients, slope_coefficients, wide

TINY = 1e-12  # smallest width of a range in real units: keeps scale finite for all-zero tensors and dead bounds


@dataclass(frozen=True)
class Rounding:
    """Which gradient the rounding has.

    Attributes:
        kind: One of `functional.dasr.KINDS`.
        c: First constant of `functional.dasr.through_rounding`.
        a: Second constant; for EWGS it is `delta`, from which `c = delta / n` follows: its gradient reads `c` alone.
    """

    kind: str = "daq"
    c: float = 1.0
    a: float = 1.0

    @staticmethod
    def make(kind: str, gamma: float, sigma: float, unit: bool) -> Rounding:
        """Return the rounding with temperature `gamma` and kernel width `sigma`; `unit` scales its mean slope to 1."""
        return Rounding(kind, *slope_coefficients(gamma, sigma, unit))

    @staticmethod
    def ewgs(delta: float, intervals: int) -> Rounding:
        """Return the rounding of EWGS with the factor `delta`, on a grid of `intervals` intervals.

        Example:
            >>> Rounding.ewgs(0.75, 15).over(3).c
            0.25
        """
        return Rounding("ewgs", delta / intervals, delta)

    @staticmethod
    def dsq(alpha: float) -> Rounding:
        """Return the rounding of DSQ; `alpha`, in (0, 1), says how far soft levels are from hard ones."""
        return Rounding("dsq", *dsq_coefficients(alpha))

    @staticmethod
    def of(index: int, c: float, a: float) -> Rounding:
        """Return the rounding that has these `numbers`."""
        return Rounding(KINDS[index], c, a)

    def over(self, intervals: int) -> Rounding:
        """Return the same rounding on a grid of another number of intervals."""
        return replace(self, c=self.a / intervals) if self.kind == "ewgs" else self

    @property
    def numbers(self) -> tuple[int, float, float]:
        """The rounding as the operators take it: index of its kind, `c` and `a`."""
        return KINDS.index(self.kind), self.c, self.a


def quantize_input(
    v: Tensor, scale: Tensor, zero_point: Tensor, bits: int, rounding: Rounding | None = None
) -> Tensor:
    """Return the operand `clip(round(v / scale), -zero_point, n - zero_point)` of an input, in the dtype of `v`.

    It is rounded before the zero point is added, as in ONNX, and exact zeros stay exact zeros. `scale` and
    `zero_point` are scalars, the latter integer-valued and of a floating dtype.
    """
    low, high = -zero_point, (2**bits - 1) - zero_point
    # in the authors' recorded layer an input of exactly 0 gets no gradient, so the ends of the clip pass none
    return _clip_round(wide(v) / scale, low, high, rounding, ends=False).to(v.dtype)


def input_scale(lower: Tensor, upper: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Return `scale = (upper - lower) / n` with `lower <= 0 <= upper` enforced, a scalar, float32 at least.

    The bounds are `()` or `(1,)`. Of an unsigned input `lower` is not read, and its gradient is exactly 0.
    """
    high, low = wide(upper).reshape(()), wide(lower).reshape(())
    # NOTE: not clamp, whose gradient at 0 itself is 0 in some versions: a bound that starts at 0 would never move
    # NOTE: an unsigned input's 0 is computed from `lower`, whose gradient is then 0; without one DDP would wait for it
    width = torch.where(high < 0.0, 0.0, high) - (torch.where(low > 0.0, 0.0, low) if signed else low * 0.0)
    return width.clamp(min=TINY) / float(2**bits - 1)


def input_zero_point(lower: Tensor, scale: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Return the zero point `clip(round(-lower / scale), 0, n)`, integer-valued, constant for the gradient.

    It is a scalar, and 0 if the input is unsigned.
    """
    if not signed:
        return torch.zeros_like(scale.detach())
    return clip_round(-wide(lower).clamp(max=0.0).reshape(()).detach() / scale.detach(), 0.0, float(2**bits - 1))


def quantize_weight(
    v: Tensor, lower: Tensor, upper: Tensor, bits: int, grid: str, rounding: Rounding | None = None
) -> Tensor:
    """Return the operand of a weight: `2q - n` on the midrise grid, elsewhere the rounded weight itself.

    `v` is float32 or float64, normalized or not; the bounds broadcast to it, and only the midrise grid reads `lower`.
    """
    x, _ = weight_levels(v, lower, upper, bits, grid)
    q = _clip_round(x, *ends(bits, grid), rounding)
    return 2.0 * q - levels(bits, grid) if grid == "midrise" else q


def weight_levels(v: Tensor, lower: Tensor, upper: Tensor, bits: int, grid: str) -> tuple[Tensor, Tensor]:
    """Return a weight in level units, in which levels are integers, and `scale`, the distance of two levels."""
    scale = weight_width(lower, upper, grid).clamp(min=TINY) / levels(bits, grid)
    return (v - lower if grid == "midrise" else v) / scale, scale


def weight_width(lower: Tensor, upper: Tensor, grid: str) -> Tensor:
    """Return the width that is divided into levels: all of the range on the midrise grid, its upper half elsewhere."""
    return upper - lower if grid == "midrise" else upper


def _clip_round(
    x: Tensor, low: Tensor | float, high: Tensor | float, rounding: Rounding | None, ends: bool = True
) -> Tensor:
    if rounding is None:
        return clip_round(x, low, high)
    return clip_round(x, low, high, rounding.kind, rounding.c, rounding.a, ends)


def weight_scale(upper: Tensor | None, top: int) -> Tensor | float:
    """Return the real units per operand unit of a weight, `max(upper, 0) / top`; midrise levels are two units apart.

    `upper` is None for a unitless weight, whose operands count in parts of full range: `1 / top`.
    """
    return 1.0 / top if upper is None else wide(upper).clamp(min=0.0) / top


def sum_scale(output_scale: Tensor, weight: Tensor | float | None, input: Tensor | float | None) -> Tensor:
    """Return the sum scale of a site, `|output_scale| * weight scale * input scale`, float32 at least.

    It is the real units per integer sum. The scale of an operand that is not quantized is None.
    """
    found = wide(output_scale.abs())
    for scale in (weight, input):
        found = found if scale is None else found * scale
    return found


def weight_codes(operand: Tensor, bits: int, grid: str) -> Tensor:
    """Return stored codes `0 .. n` of a weight operand, uint8."""
    spacing, lowest = coding(bits, grid)
    return ((operand - lowest) / spacing).to(torch.uint8)


def weight_operand(codes: Tensor, bits: int, grid: str, dtype: torch.dtype) -> Tensor:
    """Undo `weight_codes`: the integer-valued operand in `dtype`.

    Example:
        >>> weight_operand(torch.tensor([0, 3], dtype=torch.uint8), 2, "midrise", torch.float32).tolist()
        [-3.0, 3.0]
    """
    spacing, lowest = coding(bits, grid)
    stored = codes.to(dtype)
    return (stored if spacing == 1.0 else stored * spacing) + lowest


def levels(bits: int, grid: str) -> int:
    """Return the largest operand of a weight grid: `n` for midrise, `m` for integer and twos.

    Example:
        >>> levels(4, "midrise"), levels(4, "integer")
        (15, 7)
    """
    return int(2**bits if grid == "midrise" else 2 ** (bits - 1)) - 1


def coding(bits: int, grid: str) -> tuple[float, float]:
    """Return `(spacing, lowest)` of a weight grid: `operand = code * spacing + lowest`.

    Example:
        >>> coding(4, "midrise"), coding(4, "integer"), coding(4, "twos")
        ((2.0, -15.0), (1.0, -7.0), (1.0, -8.0))
    """
    top = levels(bits, grid)
    return (2.0 if grid == "midrise" else 1.0), -float(top + 1 if grid == "twos" else top)


def ends(bits: int, grid: str) -> tuple[float, float]:
    """Return the lowest and the highest rounded level unit: `0, n` on the midrise grid, elsewhere operands.

    Example:
        >>> ends(4, "midrise"), ends(4, "integer"), ends(4, "twos")
        ((0.0, 15.0), (-7.0, 7.0), (-8.0, 7.0))
    """
    return (0.0 if grid == "midrise" else coding(bits, grid)[1]), float(levels(bits, grid))


def intervals(bits: int, grid: str) -> int:
    """Return the number of intervals between the lowest and the highest level of a weight grid.

    Example:
        >>> intervals(4, "midrise"), intervals(4, "integer")
        (15, 14)
    """
    low, high = ends(bits, grid)
    return int(high - low)
