"""What `"auto"` means: the one place where the default turns bits into a grid.

The constants below are choices, not laws: a measurement that says otherwise changes them here and nowhere else.
"""

from __future__ import annotations

from daqconvert.errors import PolicyError
from daqconvert.spec.settings import Settings

NORMALIZE_UP_TO_BITS = 2
"""Weights of at most this many bits are normalized by `normalize="auto"`, as the paper does."""

MIDRISE_UP_TO_BITS = 1
"""Weights of at most this many bits take the mid-rise grid by `grid="auto"` even where not normalized."""


def resolve_auto(settings: Settings, where: str = "settings") -> Settings:
    """Return the settings with nothing left on `"auto"`, refusing what no quantizer can do.

    `normalize`: True where the weight has at most `NORMALIZE_UP_TO_BITS` bits and the grid is not asked to be
    `"integer"`, else False. `grid`: `"midrise"` where normalized or of at most `MIDRISE_UP_TO_BITS` bits, else
    `"integer"`. A float weight gives False and `"integer"`, which nothing reads. `granularity`: `"tensor"` where
    normalized, as in the paper - a mean per channel would take from each filter what it says of the non-negative
    inputs' sum, and training at 1 bit ends several points lower -, else `"channel"`.

    Args:
        settings: Settings of one layer.
        where: The layer and the rule that decided, for the error.

    Returns:
        Settings with `normalize` a bool, `grid` `"midrise"` or `"integer"`, `granularity` `"tensor"` or `"channel"`.

    Raises:
        PolicyError: For `grid="integer"` at 1 bit, whose largest code `2**(w_bits - 1) - 1` is 0, and for
            `grid="integer"` with `normalize=True`, since the normalized grid is mid-rise.

    Example:
        >>> settled = resolve_auto(Settings(w_bits=2)), resolve_auto(Settings(w_bits=4))
        >>> [(s.grid, s.normalize, s.granularity) for s in settled]
        [('midrise', True, 'tensor'), ('integer', False, 'channel')]
    """
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


def resolve_computed(settings: Settings) -> Settings:
    """Return the settings of a site whose second operand is computed from the model's input.

    Both operands are quantized as inputs are: per tensor, on the levels of an input's quantizer. There is no weight to
    take a mean from, and the mid-rise grid, which has no zero, is for weights.

    Args:
        settings: Settings of one site.

    Example:
        >>> resolve_computed(Settings(w_bits=1)).granularity
        'tensor'
    """
    return settings.replace(granularity="tensor", normalize=False, grid="integer")
