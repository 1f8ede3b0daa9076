"""The uniform quantizer's arithmetic on tensors: integer-valued operands out, float32 inside.

Convention, for `b` bits, `n = 2**b - 1` and `m = 2**(b - 1) - 1`:

    midrise weights   q = clip(round((v - lower) / scale), 0, n), scale = (upper - lower) / n; operand 2q - n
    integer weights   operand clip(round(v / scale), -m, m), scale = upper / m
    twos weights      operand clip(round(v / scale), -m - 1, m), scale = upper / m: all levels of two's complement
    inputs            operand q - zero_point = clip(round(v / scale), -zero_point, n - zero_point)

Operands are integers held in floating point: sums of their products are exact in float32 below 2**24, whatever the
layout or the order. Scales are applied after the sum. Codes are what is stored: `q` for inputs and midrise weights,
the operand less the lowest one for the others; uint8, `0 .. n`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from daqconvert.functional.dasr import KINDS, clip_round, dsq_coefficients, slope_coefficients

TINY = 1e-12  # smallest width of a range in real units: keeps scale finite for all-zero tensors and dead bounds


@dataclass(frozen=True)
class Rounding:
    """Which gradient the rounding has.

    Attributes:
        kind: One of `functional.dasr.KINDS`.
        c: As `functional.dasr.through_rounding` takes it.
        a: Likewise; `delta` of EWGS, which reads `c = delta / n` alone.
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
        """Return that of EWGS on a grid of so many intervals.

        Example:
            >>> Rounding.ewgs(0.75, 15).over(3).c
            0.25
        """
        return Rounding("ewgs", delta / intervals, delta)

    @staticmethod
    def dsq(alpha: float) -> Rounding:
        """Return that of DSQ."""
        return Rounding("dsq", *dsq_coefficients(alpha))

    def over(self, intervals: int) -> Rounding:
        """Return the same rounding on a grid of another number of intervals."""
        return replace(self, c=self.a / intervals) if self.kind == "ewgs" else self

    @property
    def numbers(self) -> tuple[int, float, float]:
        """The rounding as the operators take it: index of its kind, `c` and `a`."""
        return KINDS.index(self.kind), self.c, self.a


def levels(bits: int, grid: str) -> int:
    """Return the largest operand of a weight grid: `n` for midrise, `m` for integer and twos.

    Example:
        >>> levels(4, "midrise"), levels(4, "integer")
        (15, 7)
    """
    return int(2**bits if grid == "midrise" else 2 ** (bits - 1)) - 1


def coding(bits: int, grid: str) -> tuple[float, float]:
    """Return `(step, lowest)` of a weight grid: `operand = code * step + lowest`.

    Example:
        >>> coding(4, "midrise"), coding(4, "integer"), coding(4, "twos")
        ((2.0, -15.0), (1.0, -7.0), (1.0, -8.0))
    """
    top = levels(bits, grid)
    return (2.0 if grid == "midrise" else 1.0), -float(top + 1 if grid == "twos" else top)


def intervals(bits: int, grid: str) -> int:
    """Return the number of intervals between the lowest and the highest level of a weight grid.

    Example:
        >>> intervals(4, "midrise"), intervals(4, "integer")
        (15, 14)
    """
    step, lowest = coding(bits, grid)
    return int((levels(bits, grid) - lowest) / step)


def quantize_weight(v: Tensor, lower: Tensor, upper: Tensor, bits: int, grid: str, rounding: Rounding) -> Tensor:
    """Return the weight's integer-valued operand: `2q - n` (midrise) or the rounded weight itself.

    Args:
        v: Weight, normalized or not, float32 or float64.
        lower: Lower bound, broadcastable to `v`; read on the midrise grid alone.
        upper: Upper bound, broadcastable to `v`.
        bits: 1 to 8 (2 to 8 but for midrise).
        grid: `"midrise"`, `"integer"` or `"twos"`.
        rounding: Gradient of the rounding.
    """
    top = levels(bits, grid)
    if grid == "midrise":
        x = (v - lower) / ((upper - lower).clamp(min=TINY) / top)
        return 2.0 * clip_round(x, 0.0, float(top), rounding.kind, rounding.c, rounding.a) - top
    x = v / (upper.clamp(min=TINY) / top)
    return clip_round(x, coding(bits, grid)[1], float(top), rounding.kind, rounding.c, rounding.a)


def weight_codes(operand: Tensor, bits: int, grid: str) -> Tensor:
    """Return stored codes `0 .. n` of a weight operand, uint8."""
    step, lowest = coding(bits, grid)
    return ((operand - lowest) / step).to(torch.uint8)


def weight_operand(codes: Tensor, bits: int, grid: str, dtype: torch.dtype) -> Tensor:
    """Undo `weight_codes`: the integer-valued operand in `dtype`.

    Example:
        >>> weight_operand(torch.tensor([0, 3], dtype=torch.uint8), 2, "midrise", torch.float32).tolist()
        [-3.0, 3.0]
    """
    step, lowest = coding(bits, grid)
    values = codes.to(dtype)
    return (values if step == 1.0 else values * step) + lowest


def input_scale(lower: Tensor, upper: Tensor, bits: int) -> Tensor:
    """Return `scale = (upper - lower) / n` with `lower <= 0 <= upper` enforced, float32 at least."""
    high, low = _real(upper), _real(lower)
    # NOTE: not clamp, whose gradient at 0 itself is 0 in some versions: a bound that starts there would stay for good
    width = torch.where(high < 0.0, 0.0, high) - torch.where(low > 0.0, 0.0, low)
    return width.clamp(min=TINY) / float(2**bits - 1)


def input_zero_point(lower: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the zero point `clip(round(-lower / scale), 0, n)`, integer-valued, constant for the gradient."""
    return torch.round(-_real(lower).clamp(max=0.0).detach() / scale.detach()).clamp(0.0, float(2**bits - 1))


def quantize_input(v: Tensor, scale: Tensor, zero_point: Tensor, bits: int, rounding: Rounding) -> Tensor:
    """Return the input's integer-valued operand `q - zero_point`; rounded before the zero point is added, as in ONNX.

    Args:
        v: Input, any shape, any floating dtype; arithmetic in float32 at least.
        scale: Scalar.
        zero_point: Scalar, integer-valued.
        bits: 1 to 8.
        rounding: Gradient of the rounding.

    Returns:
        Operand of the shape and dtype of `v`; exact zeros stay exact zeros.
    """
    x = _real(v) / scale
    # in the authors' recorded layer an input of exactly 0 gets no gradient, so the ends of the clip pass none
    out = clip_round(x, -zero_point, (2**bits - 1) - zero_point, rounding.kind, rounding.c, rounding.a, ends=False)
    return out.to(v.dtype)


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
