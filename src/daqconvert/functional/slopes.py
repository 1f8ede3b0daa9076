"""How the compiled kernels compute the slope of the rounding, `c * coth((u + a) / 2)` with `u = |1 - 2t|` in [0, 1].

The farther the pole at `u = -a` the sooner a polynomial is exact to float32, and it divides nothing: degree 5 for the
default, whose `a` is 4. Nearer to the pole the kernels use `c * (1 + 2 / (exp(a) expm1(u) + expm1(a)))`.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch

from daqconvert.functional.dasr import DSQ, EWGS, STE

SLOPE_ONE, RATIONAL, SCALED, SECH = 0, -1, -2, -3  # as in kernels/quantizer.cpp
DEGREES = (3, 5, 8)  # those that the kernels are compiled for
ERROR = 1e-7  # largest relative error of a polynomial, against the float32 rounding of 6e-8


@lru_cache(maxsize=256)
def slope_numbers(kind: int, c: float, a: float) -> tuple[ctypes.Array[ctypes.c_float], int]:
    """Return what the kernels take: numbers, and how to use them: a degree, or one of the constants.

    Args:
        kind: Of the rounding, an index into `KINDS`.
        c: As `functional.dasr.through_rounding` takes it.
        a: Likewise.

    Example:
        >>> [slope_numbers(1, 1.0, a)[1] for a in (16.0, 4.0, 2.0, 0.0625)]
        [3, 5, 8, -1]
    """
    if kind == STE:
        return (ctypes.c_float * 1)(), SLOPE_ONE
    if kind == EWGS:
        return (ctypes.c_float * 1)(c), SCALED
    if kind == DSQ:
        return (ctypes.c_float * 2)(4.0 * c, a), SECH
    for degree in DEGREES:
        found = _polynomial(c, a, degree)
        if found is not None:
            return (ctypes.c_float * len(found))(*found), degree
    far = min(a, 80.0)  # no larger than float32 holds: beyond, the slope is c everywhere
    return (ctypes.c_float * 3)(c, math.exp(far), math.expm1(far)), RATIONAL


def _polynomial(c: float, a: float, degree: int) -> list[float] | None:
    """Coefficients, highest power first, from Chebyshev's nodes; None where they miss by more than `ERROR`."""
    nodes = 0.5 + 0.5 * torch.cos(math.pi * (torch.arange(degree + 1, dtype=torch.float64) + 0.5) / (degree + 1))
    powers = torch.arange(degree, -1, -1, dtype=torch.float64)
    coefficients = torch.linalg.solve(nodes[:, None] ** powers, c / torch.tanh((nodes + a) / 2))
    u = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    exact = c / torch.tanh((u + a) / 2)
    missed = ((u[:, None] ** powers @ coefficients) / exact - 1.0).abs().max()
    return coefficients.tolist() if float(missed) <= ERROR else None
