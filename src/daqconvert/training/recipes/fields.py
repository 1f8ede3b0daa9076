"""Checks of the fields of a recipe: each returns a value as stored, or raises `ValueError(what was expected)`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from daqconvert.errors import nearest

Check = Callable[[Any], Any]


def count(least: int) -> Check:
    """Return the check for integers of `least` or more."""

    def check(value: Any) -> int:
        if type(value) is not int or value < least:
            raise ValueError(f"an integer of {least} or more")
        return value

    return check


def number(fits: Callable[[float], bool], expected: str) -> Check:
    """Return the check for finite numbers that fit; stored as floats.

    Args:
        fits: Whether a number is allowed.
        expected: What to say if not.

    Example:
        >>> number(lambda value: value > 0, "a number greater than 0")(2)
        2.0
    """

    def check(value: Any) -> float:
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not finite or not fits(value):
            raise ValueError(expected)
        return float(value)

    return check


nonnegative = number(lambda value: value >= 0, "a number of 0 or more")
positive = number(lambda value: value > 0, "a number greater than 0")
share = number(lambda value: 0 <= value <= 1, "a number from 0 to 1")
below_one = number(lambda value: 0 <= value < 1, "a number from 0 to below 1")


def limit(value: Any) -> float | None:
    """Return a positive number, or None for None and 0."""
    checked = number(lambda limit: limit >= 0, "None (0 in TOML), or a number greater than 0")
    return None if value is None else checked(value) or None


def choice(*valid: str) -> Check:
    """Return the check for one of some words."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in valid:
            close = nearest(value, valid).rstrip(".") if isinstance(value, str) else ""
            raise ValueError(f"one of {', '.join(valid)}{f' ({close.strip()})' if close else ''}")
        return value

    return check


def text(value: Any) -> str:
    """Return a string.

    Raises:
        ValueError: For anything else.
    """
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def yes_or_no(value: Any) -> bool:
    """Return True or False.

    Raises:
        ValueError: For anything else.
    """
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def names(value: Any) -> tuple[str, ...]:
    """Return a list of texts as a tuple; one text alone is a list of one.

    Raises:
        ValueError: For anything else.

    Example:
        >>> names(["layer1", "layer2.*"]), names("fc")
        (('layer1', 'layer2.*'), ('fc',))
    """
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(item, str) and item for item in listed):
        raise ValueError("a list of names")
    return tuple(listed)


def stages(value: Any) -> tuple[tuple[float, int, int], ...]:
    """Return stages `(until, w_bits, a_bits)` with rising shares and falling bits.

    Raises:
        ValueError: For anything else.

    Example:
        >>> stages([[0.25, 4, 4], [0.5, 2, 4]])
        ((0.25, 4, 4), (0.5, 2, 4))
    """
    expected = "stages [share of the run, w_bits, a_bits], shares rising from 0 to 1, bits 1 to 8 and never rising"
    if not isinstance(value, (list, tuple)):
        raise ValueError(expected)
    found: list[tuple[float, int, int]] = []
    for stage in value:
        if not isinstance(stage, (list, tuple)) or len(stage) != 3:
            raise ValueError(expected)
        until, w_bits, a_bits = stage
        numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in stage)
        if not numbers or not 0 < until < 1 or not all(type(b) is int and 1 <= b <= 8 for b in (w_bits, a_bits)):
            raise ValueError(expected)
        if found and (until <= found[-1][0] or w_bits > found[-1][1] or a_bits > found[-1][2]):
            raise ValueError(expected)
        found.append((float(until), w_bits, a_bits))
    return tuple(found)
