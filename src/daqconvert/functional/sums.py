"""Sums of two values on grids, rounded to a third: which scales every runtime agrees on.

The frozen model computes `round((a * sa + b * sb) / sy)` in float32, operation by operation. ONNX Runtime's integer
kernel for sums multiplies by `sa / sy` and `sb / sy` instead, with or without fused multiply-adds, whichever the
processor has. For most scales all three give equal codes for all 65,536 pairs of codes; where they do not, a scale
next to the one asked for is found for which they do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TRIES, STEP = 200, 2.0**-21
"""Scales that are tried, and their relative distance: 1e-4 in all, a fortieth of a code at 8 bits."""


class Codes(NamedTuple):
    """A grid of codes `0 .. 255`: float32 scale and integer zero point."""

    scale: float
    zero_point: int


def sums_agree(a: Codes, b: Codes, y: Codes) -> bool:
    """Return whether every way to compute `a + b` on the grid `y` gives the same codes, for all pairs of codes.

    Args:
        a: Grid of the first value.
        b: Grid of the second.
        y: Grid of the sum.

    Example:
        >>> sums_agree(Codes(0.5, 0), Codes(0.25, 128), Codes(0.5, 0))
        True
    """
    codes = torch.arange(256, dtype=torch.float32)
    x, z = codes[:, None], codes[None, :]
    sa, sb, sy = (torch.tensor(grid.scale, dtype=torch.float32) for grid in (a, b, y))
    za, zb, zy = (torch.tensor(float(grid.zero_point)) for grid in (a, b, y))
    wanted = torch.round(((x - za) * sa + (z - zb) * sb) / sy).clamp(-zy, 255 - zy)
    ra, rb = sa / sy, sb / sy
    fixed = zy - _fma(ra, za, rb * zb)
    fused = torch.round(_fma(x, ra, _fma(z, rb, fixed)))
    plain = torch.round(x * ra + (z * rb + (zy - (ra * za + rb * zb))))
    return all(torch.equal(found.clamp(0, 255) - zy, wanted) for found in (fused, plain))


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """`x * y + z`, rounded once: the product of two float32 is exact in float64."""
    return (x.double() * y.double() + z.double()).float()


def agreeing_scale(a: Codes, b: Codes, y: Codes) -> float:
    """Return the scale of `y`, or one next to it for which `sums_agree`; the scale itself where none is found.

    Args:
        a: Grid of the first value.
        b: Grid of the second.
        y: Grid of the sum.
    """
    for k in range(TRIES):
        scale = float(torch.tensor(y.scale * (1.0 + k * STEP), dtype=torch.float32))
        if sums_agree(a, b, Codes(scale, y.zero_point)):
            return scale
    return y.scale
