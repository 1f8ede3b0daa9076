"""What a quantizer starts with, without looking at data: the bounds of a weight, and the gradient of its rounding.

A weight's bound is searched per row for the least squared error. When the bits of a quantizer change, its bounds are
multiplied by the ratio of the best bounds for a normal distribution at the two numbers of bits.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from daqconvert.errors import PolicyError
from daqconvert.functional.grid import TINY, Rounding, levels
from daqconvert.spec import Settings

CANDIDATES = 10  # bounds that the coarse pass of the minimum-error search tries; the finer one tries 8 more
SEARCH_FLOOR = {2: 0.06, 3: 0.1, 4: 0.2, 5: 0.3, 6: 0.4, 7: 0.5, 8: 0.6}  # by bits: part of max|W|
SHORT_ROW = 128  # the error of a row this short (a depthwise kernel) jumps, and costs next to nothing to compute ...
SHORT_FACTOR = 16  # ... so it gets this many times the candidates
SEARCH_PIECE = 1 << 18  # elements handled at once


def minimum_error_bound(rows: Tensor, bits: int, grid: str) -> Tensor:
    """Return, per row, the `upper` with the least squared error among parts of `max|row|`.

    A coarse pass tries `CANDIDATES` parts at equal ratios, then a finer one tries parts around the best. `rows` are
    `(R, K)`, float32 or float64; the result is `(R,)`, non-negative, 0 for an all-zero row.

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
    """Return `minimum_error_bound` for a few rows."""
    largest = rows.abs().amax(dim=1)
    short = rows.shape[1] <= SHORT_ROW
    count = CANDIDATES * (SHORT_FACTOR if short else 1)
    ratio = math.pow(SEARCH_FLOOR[bits], 1.0 / (count - 1))
    scratch = torch.empty_like(rows)  # one for all candidates: one for each would fragment the heap
    best, error = largest.clone(), torch.full_like(largest, float("inf"))
    for k in range(-count // 5 if short else 0, count):  # a grid wider than a short row may fit it better
        best, error = _better(rows, largest * math.pow(ratio, k), best, error, bits, grid, scratch)
    center = best.clone()
    for part in (-0.7, -0.45, -0.25, -0.1, 0.1, 0.25, 0.45, 0.7):
        best, error = _better(rows, center * math.pow(ratio, part), best, error, bits, grid, scratch)
    return best


def _better(
    rows: Tensor, upper: Tensor, best: Tensor, error: Tensor, bits: int, grid: str, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the bound with the smaller squared error of `upper` and `best`, per row, and that error.

    The formula of the weight grid is repeated here, in place, for speed: no tensor is made per candidate.
    """
    top = levels(bits, grid)
    scale = upper.clamp(min=TINY)[:, None] / top
    if grid == "midrise":
        scale = scale * 2.0  # real units per code: half the operand is exact, and saves two passes
        operand = torch.div(rows, scale, out=scratch).add_(top / 2).round_().clamp_(0, top).sub_(top / 2)
    else:
        operand = torch.div(rows, scale, out=scratch).round_().clamp_(-top, top)
    found = operand.mul_(scale).sub_(rows).square_().sum(dim=1)
    less = found < error
    return torch.where(less, upper, best), torch.where(less, found, error)


STD_CLIP = 3.0 * math.sqrt(0.5 - 0.5 / math.pi)
"""3 standard deviations of a rectified normal variable: where `calibrate` starts the bound of a 1-bit input."""

POINTS = 1 << 14  # quantiles of the distribution, at equal shares of its positive half
CLIPS = tuple(k / 100 for k in range(30, 500))  # bounds that `normal_clip` tries, in standard deviations


def make_rounding(settings: Settings, gamma: float, sigma: float, intervals: int) -> Rounding:
    """Return the gradient of the rounding that a site's settings ask for.

    `gamma` and `sigma` are temperature and kernel width of this operand's soft rounding; `intervals` is the number of
    intervals between its lowest and its highest level.

    Example:
        >>> make_rounding(Settings(rounding="ewgs", delta=0.75), 2.0, 1.0, 3).numbers[1]
        0.25
    """
    if settings.rounding == "ewgs":
        return Rounding.ewgs(settings.delta, intervals)
    if settings.rounding == "dsq":
        return Rounding.dsq(settings.alpha)
    kind = "ste" if settings.rounding == "lsq" else settings.rounding  # LSQ learns its step size, its slope is STE's
    return Rounding.make(kind, gamma, sigma, settings.slope == "unit")


@lru_cache(maxsize=64)
def normal_clip(top: int, midrise: bool) -> float:
    """Return the bound of least squared error for a standard normal variable, on a grid that is symmetric about zero.

    There are `top` levels above zero; on the midrise grid, levels are the odd multiples of `bound / top`. The error is
    summed over `POINTS` quantiles of the positive half, for every bound of `CLIPS`.

    Example:
        >>> [round(normal_clip(2**bits - 1, True), 1) for bits in (1, 2, 4)]
        [0.8, 1.5, 2.5]
    """
    shares = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / (2 * POINTS) + 0.5
    values = torch.special.ndtri(shares)

    def error(bound: float) -> float:
        scale = bound / top
        if midrise:
            found = ((values / (2.0 * scale)).floor().clamp(0.0, (top - 1) / 2) * 2.0 + 1.0) * scale
        else:
            found = (values / scale).round().clamp(0.0, float(top)) * scale
        return float((found - values).square().sum())

    return min(CLIPS, key=error)


def check_width(name: str, setting: str, bits: int, least: int) -> None:
    """Refuse a number of bits that a layer's quantizer cannot have.

    `name` is the layer's, `setting` is the one to change, and `least` is the smallest number allowed.

    Raises:
        PolicyError: If it is not an integer from `least` to 8.
    """
    if type(bits) is not int or not least <= bits <= 8:
        raise PolicyError(
            f"{name or '(root)'}: {setting}: expected an integer from {least} to 8, found {bits!r}. "
            f"Give the layer {setting} = {max(least, 2)} or more."
        )
