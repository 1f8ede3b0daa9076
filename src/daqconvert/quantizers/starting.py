"""The bound of a weight with the least squared error, per row, without data.

What quantizers of both kinds derive from a width: the gradient of their rounding, and where bounds lie by width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from daqconvert.errors import PolicyError
from daqconvert.functional.grid import Rounding, levels
from daqconvert.spec import Settings

SEARCH_STEPS = 10  # candidates of the coarse pass of the minimum-error search; the finer one tries 8 more
SEARCH_FLOOR = {2: 0.06, 3: 0.1, 4: 0.2, 5: 0.3, 6: 0.4, 7: 0.5, 8: 0.6}  # smallest part of max|W|: tails are heavy
SHORT_ROW = 128  # the error of a row this short (a depthwise kernel) jumps, and costs next to nothing to compute ...
SHORT_FACTOR = 16  # ... so it gets this many times the candidates
SEARCH_PIECE = 1 << 18  # elements handled at once


def minimum_error_bound(rows: Tensor, bits: int, grid: str) -> Tensor:
    """Return, per row, the `upper` with the least squared error among parts of `max|row|`.

    A coarse pass over `SEARCH_STEPS` parts in geometric steps, then a finer one around the best.

    Args:
        rows: `(R, K)`, float32 or float64.
        bits: 1 to 8.
        grid: `"midrise"` or `"integer"`.

    Returns:
        `(R,)`, non-negative; 0 for an all-zero row.

    Example:
        >>> minimum_error_bound(torch.tensor([[1.0, -1.0, 1.0]]), 1, "midrise").tolist()
        [1.0]
    """
    if bits == 1:
        return rows.abs().mean(dim=1)  # the exact optimum of sign(W) * upper
    # NOTE: in pieces that stay in the cache; ten times faster than whole tensors on large layers
    pieces = rows.split(max(1, SEARCH_PIECE // max(1, rows.shape[1])))
    return torch.cat([_search(piece, bits, grid) for piece in pieces])


def _search(rows: Tensor, bits: int, grid: str) -> Tensor:
    """`minimum_error_bound` for a few rows."""
    top = rows.abs().amax(dim=1)
    short = rows.shape[1] <= SHORT_ROW
    steps = SEARCH_STEPS * (SHORT_FACTOR if short else 1)
    ratio = math.pow(SEARCH_FLOOR[bits], 1.0 / (steps - 1))
    scratch = torch.empty_like(rows)  # one for all candidates: a new one for each would scatter the heap
    best, error = top.clone(), torch.full_like(top, float("inf"))
    for step in range(
        -steps // 5 if short else 0, steps
    ):  # a grid wider than the weights may fit a few of them better
        best, error = _better(rows, top * math.pow(ratio, step), best, error, bits, grid, scratch)
    center = best.clone()
    for part in (-0.7, -0.45, -0.25, -0.1, 0.1, 0.25, 0.45, 0.7):
        best, error = _better(rows, center * math.pow(ratio, part), best, error, bits, grid, scratch)
    return best


def _better(
    rows: Tensor, upper: Tensor, best: Tensor, error: Tensor, bits: int, grid: str, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the bound with the smaller squared error of `upper` and `best`, per row, and that error."""
    top = levels(bits, grid)
    step = upper.clamp(min=1e-12)[:, None] / top
    if grid == "midrise":
        step = step * 2.0  # of the codes: half the operand, exactly, and two passes fewer
        operand = torch.div(rows, step, out=scratch).add_(top / 2).round_().clamp_(0, top).sub_(top / 2)
    else:
        operand = torch.div(rows, step, out=scratch).round_().clamp_(-top, top)
    found = operand.mul_(step).sub_(rows).square_().sum(dim=1)
    less = found < error
    return torch.where(less, upper, best), torch.where(less, found, error)


STD_CLIP = 3.0 * math.sqrt(0.5 - 0.5 / math.pi)
"""3 standard deviations of a rectified normal variable: where `calibrate` starts the bound of a 1-bit input."""

POINTS = 1 << 14  # of the distribution, at equal shares of its positive half
CANDIDATES = tuple(k / 100 for k in range(30, 500))


def make_rounding(settings: Settings, gamma: float, sigma: float, intervals: int) -> Rounding:
    """Return the gradient of the rounding that settings ask for.

    Args:
        settings: Of a site.
        gamma: Temperature of this operand's soft rounding.
        sigma: Its kernel width.
        intervals: Between the lowest and the highest level.

    Example:
        >>> make_rounding(Settings(rounding="ewgs", delta=0.75), 2.0, 1.0, 3).numbers[1]
        0.25
    """
    if settings.rounding == "ewgs":
        return Rounding.ewgs(settings.delta, intervals)
    if settings.rounding == "dsq":
        return Rounding.dsq(settings.alpha)
    kind = "ste" if settings.rounding == "lsq" else settings.rounding  # LSQ differs in its step, not in the slope
    return Rounding.make(kind, gamma, sigma, settings.slope == "unit")


@lru_cache(maxsize=64)
def normal_clip(top: int, midrise: bool) -> float:
    """Return the bound of least squared error of a standard normal variable, of which only the size matters.

    The error is summed over `POINTS` quantiles of its positive half, for every bound of `CANDIDATES`.

    Args:
        top: Number of levels above zero; on the midrise grid, levels are the odd multiples of `bound / top` up to it.
        midrise: Which grid.

    Example:
        >>> [round(normal_clip(2**bits - 1, True), 1) for bits in (1, 2, 4)]
        [0.8, 1.5, 2.5]
    """
    shares = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / (2 * POINTS) + 0.5
    values = torch.special.ndtri(shares)

    def error(bound: float) -> float:
        step = bound / top
        if midrise:
            found = ((values / (2.0 * step)).floor().clamp(0.0, (top - 1) / 2) * 2.0 + 1.0) * step
        else:
            found = (values / step).round().clamp(0.0, float(top)) * step
        return float((found - values).square().sum())

    return min(CANDIDATES, key=error)


def check_width(name: str, setting: str, bits: int, least: int) -> None:
    """Refuse a width that a quantizer cannot take.

    Args:
        name: Of the layer.
        setting: `"w_bits"` or `"a_bits"`.
        bits: The width.
        least: The smallest that it can take.

    Raises:
        PolicyError: If it is not an integer from `least` to 8.
    """
    if type(bits) is not int or not least <= bits <= 8:
        raise PolicyError(
            f"{name or '(root)'}: {setting}: expected an integer from {least} to 8, found {bits!r}. "
            f"Give the layer {setting} = {max(least, 2)} or more."
        )
