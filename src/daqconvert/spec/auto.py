"""The meaning of `"auto"`: only this file derives a weight's grid, normalization and granularity from its bits.

The constants below were chosen by measurements.
"""

from __future__ import annotations

from daqconvert.errors import PolicyError
from daqconvert.spec.settings import Settings

NORMALIZE_UP_TO_BITS = 2
"""Weights of at most this many bits are normalized by `normalize="auto"`, as the paper does."""

MIDRISE_UP_TO_BITS = 1
"""Weights of at most this many bits get the mid-rise grid from `grid="auto"` even if they are not normalized."""


def resolve_auto(settings: Settings, where: str = "settings") -> Settings:
    """Return the settings with nothing left on `"auto"`; raise for combinations that no quantizer can do.

    * `normalize`: True if the weight has at most `NORMALIZE_UP_TO_BITS` bits and the grid is not set to `"integer"`,
      else False.
    * `grid`: `"midrise"` if normalized or of at most `MIDRISE_UP_TO_BITS` bits, else `"integer"`.
    * `granularity`: `"tensor"` if normalized, as in the paper, else `"channel"`. (With a mean per channel each filter
      would lose its response to the sum of the inputs, which are not negative, and training at 1 bit ends several
      points of accuracy lower.)

    A float weight gets False and `"integer"`, which nothing reads. LSQ has its own grid, `"twos"`, is not normalized,
    and is per `"tensor"` unless set otherwise. `where` names the layer and the rule in error messages.

    Raises:
        PolicyError: For `grid="integer"` at 1 bit, whose largest code `2**(w_bits - 1) - 1` is 0, and for
            `grid="integer"` with `normalize=True`, since the normalized grid is mid-rise; for LSQ at 1 bit or with
            another grid, and for `grid="twos"` without LSQ.

    Example:
        >>> settled = resolve_auto(Settings(w_bits=2)), resolve_auto(Settings(w_bits=4))
        >>> [(s.grid, s.normalize, s.granularity) for s in settled]
        [('midrise', True, 'tensor'), ('integer', False, 'channel')]
    """
    check_lsq_bits(settings, where)
    if settings.w_bits is not None and (settings.rounding == "lsq" or settings.grid == "twos"):
        return _resolve_lsq(settings, where)
    bits, grid, normalize = settings.w_bits, settings.grid, settings.normalize
    if bits is not None and bits == 1 and grid == "integer":
        raise PolicyError(
            f'{where}: grid = "integer" has no level but 0 at w_bits = 1. '
            'Set grid = "midrise" or "auto", or w_bits to 2 or more.'
        )
    if bits is not None and grid == "integer" and normalize is True:
        raise PolicyError(
            f'{where}: normalize = true needs grid = "midrise"; found grid = "integer". '
            'Set grid = "midrise" or "auto", or normalize = false.'
        )
    if normalize == "auto":
        normalize = bits is not None and bits <= NORMALIZE_UP_TO_BITS and grid != "integer"
    if grid == "auto":
        low = bits is not None and bits <= MIDRISE_UP_TO_BITS
        grid = "midrise" if normalize or low else "integer"
    granularity = settings.granularity
    if granularity == "auto":
        granularity = "tensor" if normalize else "channel"
    return settings.replace(grid=grid, normalize=normalize, granularity=granularity)


def _resolve_lsq(settings: Settings, where: str) -> Settings:
    if settings.rounding != "lsq":
        raise PolicyError(
            f'{where}: grid = "twos" belongs to rounding = "lsq"; found rounding = "{settings.rounding}". '
            'Set grid = "auto", or rounding = "lsq".'
        )
    if settings.grid not in ("auto", "twos") or settings.normalize is True:
        found = f'grid = "{settings.grid}"' if settings.grid not in ("auto", "twos") else "normalize = true"
        raise PolicyError(
            f'{where}: rounding = "lsq" has a grid and a step of its own; found {found}. '
            'Set grid = "auto" and normalize = "auto" beside it.'
        )
    granularity = "tensor" if settings.granularity == "auto" else settings.granularity
    return settings.replace(grid="twos", normalize=False, granularity=granularity)


def check_lsq_bits(settings: Settings, where: str) -> None:
    """Raise for LSQ at 1 bit.

    Raises:
        PolicyError: If rounding is `"lsq"`, and `w_bits` or `a_bits` is 1.
    """
    if settings.rounding == "lsq" and 1 in (settings.w_bits, settings.a_bits):
        name = "w_bits" if settings.w_bits == 1 else "a_bits"
        raise PolicyError(
            f'{where}: rounding = "lsq" is defined for 2 bits and more; found {name} = 1. '
            f'Set {name} to 2 or more, or rounding to "daq", "ste", "ewgs" or "dsq".'
        )


def resolve_computed(settings: Settings) -> Settings:
    """Return the settings of a site whose second operand is computed from the model's input.

    Both operands are quantized as inputs are: per tensor, on the levels of an input's quantizer. There is no weight
    whose mean could be subtracted, and the mid-rise grid, which has no zero, is only for weights.

    Example:
        >>> resolve_computed(Settings(w_bits=1)).granularity
        'tensor'
    """
    return settings.replace(granularity="tensor", normalize=False, grid="integer")
