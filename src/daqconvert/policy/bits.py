"""Rules from a mapping of bits: `bits={"layer4.*": 2, "fc": (8, 8), "head": None}`, or a file's table `[bits]`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from daqconvert.errors import PolicyError
from daqconvert.policy.rules import check_pattern
from daqconvert.spec import BIT_FIELDS, Rule, check_bits

PLACE = "bits"


def bits_rules(bits: object, where: str) -> tuple[Rule, ...]:
    """Return a rule for each entry of a mapping of bits, in the order of the mapping.

    A number sets both `w_bits` and `a_bits`, a pair sets `(w_bits, a_bits)`; None or 32 is floating point.

    Raises:
        PolicyError: If `bits` is not a mapping, a key is not a name or pattern, or a value is not bits. The message
            starts with `where`.

    Example:
        >>> [rule.changes for rule in bits_rules({"layer4.*": 2, "fc": (8, None)}, "arguments bits")]
        [{'w_bits': 2, 'a_bits': 2}, {'w_bits': 8, 'a_bits': None}]
    """
    if not isinstance(bits, Mapping):
        raise PolicyError(
            f'{where}: expected layers and their bits, such as {{"layer4.*": 2, "fc": (8, 8)}}; '
            f"found {reprlib.repr(bits)}."
        )
    rules = []
    for name, value in bits.items():
        if not isinstance(name, str):
            raise PolicyError(f"{where}: expected the name or pattern of a layer; found {reprlib.repr(name)}.")
        here = f'{where} "{name}"'
        pair = _pair(name, value, here)
        rules.append(Rule(dict(zip(BIT_FIELDS, pair, strict=True)), match=check_pattern(name, here), place=PLACE))
    return tuple(rules)


def _pair(name: str, value: Any, where: str) -> tuple[int | None, ...]:
    if isinstance(value, Mapping):  # TOML reads `layer4.0.conv1 = 2` without quotes as nested tables
        path, inner = [name], value
        while isinstance(inner, Mapping) and inner:
            key, inner = next(iter(inner.items()))
            path.append(str(key))
        quoted = ".".join(path)
        raise PolicyError(
            f"{where}: expected bits such as 4, [4, 8] or 32; found a table. "
            f'Put a name that holds dots in quotes: "{quoted}" = {reprlib.repr(inner) if inner else 4}.'
        )
    both = value if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != len(BIT_FIELDS):
        raise PolicyError(
            f"{where}: expected bits of weight and input such as 4, (4, 8) or None; found {reprlib.repr(value)}."
        )
    try:
        return tuple(check_bits(field, bits) for field, bits in zip(BIT_FIELDS, both, strict=True))
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None
