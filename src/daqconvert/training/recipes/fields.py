"""The fields of a recipe as declarations: default, meaning, and the kind of values that a field takes.

A field is one line: `epochs: int = setting(5, "Passes over the training loader.", Integer(1))`. A kind
refuses a value with a `ValueError` that says what was expected; the caller adds the names of field and recipe.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from typing import Any, TypeVar

from daqconvert.errors import nearest

T = TypeVar("T")

_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False}


def setting(default: T, meaning: str, kind: Kind, *, before: T | None = None) -> T:
    """Declare one field of a recipe.

    Args:
        default: Value of the field in the recipe `quick`.
        meaning: One or two sentences for users, with code in backticks.
        kind: Kind of values that the field takes, with its bounds or choices.
        before: Value that stands for what runs did before this field was added; None for a field that always existed.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning, "kind": kind, "before": before})


def with_meanings(cls: type[T]) -> type[T]:
    """Class decorator for a dataclass of settings: add what each field means to its docstring."""
    lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:"]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        text = f"{field.name}: {field.metadata['meaning']}"
        lines += textwrap.wrap(text, 112, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    cls.__doc__ = "\n".join(lines) + "\n"
    return cls


class Kind:
    """The values that a field takes: how they are checked, and how they are read from a command line."""

    def stored(self, value: Any) -> Any:
        """Return a value as a recipe keeps it, or raise `ValueError(what was expected)`."""
        raise NotImplementedError

    def parsed(self, text: str) -> Any:
        """Return the value that a text means; a text without a meaning is returned, for `stored` to refuse."""
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            return text


@dataclass(frozen=True)
class Integer(Kind):
    """An integer of `least` or more."""

    least: int

    def stored(self, value: Any) -> int:
        """Return the integer."""
        if type(value) is not int or value < self.least:
            raise ValueError(f"an integer of {self.least} or more")
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A finite number, stored as a float: from `least` to `most`, greater than `above` and less than `below`.

    Example:
        >>> Number(above=0).stored(2), Number(least=0, below=1).expected
        (2.0, 'a number from 0 to below 1')
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    @property
    def expected(self) -> str:
        """The bounds in words."""
        if self.above > -math.inf:
            return f"a number greater than {self.above:g}"
        if self.below < math.inf:
            return f"a number from {self.least:g} to below {self.below:g}"
        if self.most < math.inf:
            return f"a number from {self.least:g} to {self.most:g}"
        return f"a number of {self.least:g} or more"

    def stored(self, value: Any) -> float:
        """Return the number as a float."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        finite = number and abs(value) <= sys.float_info.max
        if not finite or not self.least <= value <= self.most or not self.above < value < self.below:
            raise ValueError(self.expected)
        return float(value)


class Limit(Kind):
    """A number greater than 0, or None for no limit; TOML has no None, so 0 means no limit too."""

    def stored(self, value: Any) -> float | None:
        """Return the number as a float, None for None and 0."""
        try:
            return None if value is None else Number(least=0).stored(value) or None
        except ValueError:
            raise ValueError("None (0 in TOML), or a number greater than 0") from None


class Flag(Kind):
    """True or false."""

    def stored(self, value: Any) -> bool:
        """Return the boolean."""
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value


class Text(Kind):
    """Any text; on a command line it stands without quotes."""

    def stored(self, value: Any) -> str:
        """Return the text."""
        if not isinstance(value, str):
            raise ValueError("a text")
        return value

    def parsed(self, text: str) -> str:
        """Return the text itself."""
        return text


class Choice(Text):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def stored(self, value: Any) -> str:
        """Return the word."""
        if not isinstance(value, str) or value not in self.words:
            close = nearest(value, self.words).strip(" .") if isinstance(value, str) else ""
            raise ValueError(f"one of {', '.join(self.words)}{f' ({close})' if close else ''}")
        return value


class Names(Kind):
    """A list of names, stored as a tuple; one text alone is a list of one.

    Example:
        >>> Names().stored(["layer1", "layer2.*"]), Names().stored("fc"), Names().parsed("layer1, fc")
        (('layer1', 'layer2.*'), ('fc',), ['layer1', 'fc'])
    """

    def stored(self, value: Any) -> tuple[Any, ...]:
        """Return the names as a tuple."""
        listed = (value,) if isinstance(value, str) else value
        if not isinstance(listed, (list, tuple)) or not all(isinstance(item, str) and item for item in listed):
            raise ValueError("a list of names")
        return tuple(listed)

    def parsed(self, text: str) -> Any:
        """Return what stands between commas, or what a TOML array means."""
        if text.startswith("["):
            return super().parsed(text)
        return [item.strip() for item in text.split(",")] if text else []


class Stages(Names):
    """Stages `(until, w_bits, a_bits)`: shares of the run that rise, and bits that never rise.

    Example:
        >>> Stages().stored([[0.25, 4, 4], [0.5, 2, 4]])
        ((0.25, 4, 4), (0.5, 2, 4))
    """

    def stored(self, value: Any) -> tuple[tuple[float, int, int], ...]:
        """Return the stages as a tuple of tuples."""
        stages = tuple(value) if isinstance(value, (list, tuple)) else (None,)
        if not all(map(_is_stage, stages)) or not all(
            a[0] < b[0] and a[1] >= b[1] and a[2] >= b[2] for a, b in itertools.pairwise(stages)
        ):
            raise ValueError(
                "stages [share of the run, w_bits, a_bits], shares rising from 0 to 1, bits 1 to 8 and never rising"
            )
        return tuple((float(until), w_bits, a_bits) for until, w_bits, a_bits in stages)


def _is_stage(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    until, *bits = value
    share = isinstance(until, (int, float)) and not isinstance(until, bool) and 0 < until < 1
    return share and all(type(b) is int and 1 <= b <= 8 for b in bits)
