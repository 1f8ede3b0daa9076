"""What quantizers of both kinds derive from a width: the gradient of their rounding, and where bounds lie by width."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from daqconvert.errors import PolicyError
from daqconvert.functional.grid import Rounding
from daqconvert.spec import Settings

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
