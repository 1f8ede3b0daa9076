"""What a user asks for: `Settings`, `Rule`, `Policy`, and the checks of each value.

The three are frozen dataclasses. Bits are integers 1..8, or `None` for "left in floating point" (`32` is accepted and
stored as `None`). Names of layers are dotted paths as in `named_modules()`; the name of the root module is `""`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from daqconvert.errors import PolicyError, nearest
from daqconvert.spec.plain_values import added

BIT_FIELDS = ("w_bits", "a_bits")
CHOICES: dict[str, tuple[Any, ...]] = {
    "granularity": ("auto", "channel", "tensor"),
    "grid": ("auto", "midrise", "integer", "twos"),
    "normalize": ("auto", True, False),
    "rounding": ("daq", "ste", "ewgs", "dsq", "lsq"),
    "slope": ("unit", "paper"),
    "share_inputs": (False, True),
    "deploy": ("float", "integer"),
    "symmetric": (False, True),
}
POSITIVE_FIELDS = ("w_gamma", "w_sigma", "a_gamma", "a_sigma")


def check_bits(name: str, value: object) -> int | None:
    """Return a bit-width as 1..8 or `None`.

    Args:
        name: Name of the value in error messages.
        value: An integer 1..8, or `None` or 32 for floating point.

    Raises:
        PolicyError: For anything else: 0, 9, 2.5, True, "4".

    Example:
        >>> check_bits("w_bits", 32) is None
        True
    """
    if value is None or (value == 32 and type(value) is int):
        return None
    if type(value) is int and 1 <= value <= 8:
        return value
    raise PolicyError(f"{name}: expected an integer from 1 to 8, or None (32) for floating point; found {value!r}.")


def check_setting(name: str, value: object) -> Any:
    """Return the value of one setting as `Settings` stores it.

    Args:
        name: A field of `Settings`.
        value: The value as the user wrote it.

    Raises:
        PolicyError: If there is no such setting or it cannot take the value; the message names the nearest valid one.
    """
    if name in BIT_FIELDS:
        return check_bits(name, value)
    if name == "attention":
        return _check_attention(value)
    if name in CHOICES:
        for choice in CHOICES[name]:
            if value == choice and type(value) is type(choice):
                return choice
        raise PolicyError(
            f"{name}: expected one of {', '.join(map(repr, CHOICES[name]))}; found {value!r}."
            + (nearest(value, [c for c in CHOICES[name] if isinstance(c, str)]) if isinstance(value, str) else "")
        )
    if name in ("delta", "alpha"):
        return _check_baseline(name, value)
    if name in POSITIVE_FIELDS:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
            return float(value)
        raise PolicyError(f"{name}: expected a positive number; found {value!r}.")
    valid = [f.name for f in dataclasses.fields(Settings)]
    if name == "bits":
        hint = 'Write bits beside them: bits = {"layer4.*": 2}, or a table [bits] at the top of a file.'
        raise PolicyError(f"'bits' is not a setting. {hint} One layer's are w_bits and a_bits.")
    raise PolicyError(f"{name!r} is not a setting. Settings are: {', '.join(valid)}.{nearest(name, valid)}")


def _check_attention(value: object) -> int | None:
    if value is None or value is False or (value == 32 and type(value) is int):
        return None
    if type(value) is int and 1 <= value <= 8:
        return value
    raise PolicyError(
        "attention: expected the bits of both operands of attention products, 1 to 8, or None (false) to leave these "
        f"products in floating point; found {value!r}. Write attention = 8."
    )


def _check_baseline(name: str, value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "delta":
        if number and 0.0 <= value <= sys.float_info.max:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        raise PolicyError(f"delta: expected a number of 0 or more; found {value!r}. Write delta = 0.001.")
    if number and 0.0 < value < 1.0:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise PolicyError(f"alpha: expected a number between 0 and 1, both excluded; found {value!r}. Write alpha = 0.2.")


@dataclass(frozen=True)
class Settings:
    """How one site is quantized; every field is a key of a policy's `[default]` and a keyword of `quantize`.

    Attributes:
        w_bits: Bits of the weight, 1..8, or None for float.
        a_bits: Bits of the input, 1..8, or None for float.
        granularity: Whether bounds and output scale are per output `"channel"`, per `"tensor"`, or `"auto"` (by bits).
        grid: Levels of the weight: `"midrise"` (odd multiples, no zero), `"integer"` (symmetric, with zero), `"twos"`
            (one more level below zero than above, only for LSQ), or `"auto"` (by bits and rounding).
        normalize: Quantize `(W - mean) / std` as the paper does (True), `W` itself (False), or `"auto"` (by bits).
        rounding: Gradient of the rounding: `"daq"` (DASR, the paper's soft rounding), `"ste"` (1), `"ewgs"`, `"dsq"`,
            or `"lsq"`, which learns a step size instead of bounds and output scale.
        slope: `"unit"` scales the DASR gradient to a mean of 1 between two levels, `"paper"` does not scale it.
        w_gamma: Temperature of the weight's soft rounding.
        w_sigma: Kernel width of the weight's soft rounding.
        a_gamma: Temperature of the input's soft rounding.
        a_sigma: Kernel width of the input's soft rounding.
        delta: Scaling factor of EWGS, 0 or more.
        alpha: Parameter of DSQ, in (0, 1): the smaller it is, the closer the soft levels are to hard ones.
        attention: Bits of both operands of products of two activations, 1..8, or None (False) to leave them float.
        share_inputs: Whether layers that read the same tensor at the same bits share one input quantizer.
        deploy: `"float"` leaves everything between the layers in float, as the paper does; `"integer"` quantizes every
            output too, so that an integer-only runtime can run the model.
        symmetric: Whether zero points are 0 in int8, as some runtimes ask: zero is the middle code of a signed input,
            and an unsigned input has at most 7 bits.

    With `slope="unit"` the two temperatures `w_gamma` and `a_gamma` cancel out and change nothing.

    Example:
        >>> Settings(w_bits=4, a_bits=32).a_bits is None
        True
    """

    w_bits: int | None = 8
    a_bits: int | None = 8
    granularity: str = "auto"
    grid: str = "auto"
    normalize: bool | str = "auto"
    rounding: str = "daq"
    slope: str = "unit"
    w_gamma: float = 2.0
    w_sigma: float = 0.5
    a_gamma: float = 2.0
    a_sigma: float = 0.5
    delta: float = 0.001
    alpha: float = 0.2
    attention: int | None = None
    share_inputs: bool = False
    deploy: str = "float"
    symmetric: bool = added(False)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, check_setting(f.name, getattr(self, f.name)))

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some fields changed; unknown names raise `PolicyError`."""
        for name in changes:
            check_setting(name, changes[name])
        return dataclasses.replace(self, **changes)


SETTING_NAMES = tuple(f.name for f in dataclasses.fields(Settings))


@dataclass(frozen=True)
class Rule:
    """One rule of a policy: the layers that it applies to (`match` or `type`), and the settings it changes for them.

    Attributes:
        changes: Setting name -> value; only what the rule changes.
        match: A dotted name, a glob on dotted names, or `re:` and a regular expression; None for a type rule.
        type: A class name such as `"Linear"`; None for a name rule.
        optional: If True, it is not an error that the rule matches no layer.
        place: Name of the rule in messages and plans: `"bits"` for an entry of a mapping of bits; `""` for `rule N`.

    Example:
        >>> Rule({"w_bits": 2}, match="layer4.*").changes["w_bits"]
        2
    """

    changes: Mapping[str, Any]
    match: str | None = None
    type: str | None = None
    optional: bool = False
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class Policy:
    """Rules that say which layers get how many bits.

    Precedence: exact name > pattern > type > position > default. Among rules of equal precedence the later wins.
    `exclude` overrides all of them, and then `include`.

    Attributes:
        default: Settings of every layer, which the rest of the policy changes.
        rules: Rules by name, pattern or type.
        first: Changes for first sites (a model input reaches them without passing another); None leaves them float.
        last: Changes for last sites (they reach a model output without passing another); None leaves them float.
        exclude: Names, globs or `re:` patterns of layers to leave in float.
        include: Names, globs or `re:` patterns of the only layers to convert; empty converts all.
        target: Name of the runtime that the model is quantized for, a key of `spec.targets.TARGETS`; None for none. It
            stands for `deploy="integer"` everywhere, and for what else the runtime asks.
        name: Where the policy comes from, for messages: name of a file or preset.

    Example:
        >>> Policy(Settings(w_bits=4, a_bits=4), rules=(Rule({"w_bits": 2}, match="layer4.*"),)).first
        {'w_bits': 8, 'a_bits': 8}
    """

    default: Settings = field(default_factory=Settings)
    rules: tuple[Rule, ...] = ()
    first: Mapping[str, Any] | None = field(default_factory=lambda: {"w_bits": 8, "a_bits": 8})
    last: Mapping[str, Any] | None = field(default_factory=lambda: {"w_bits": 8, "a_bits": 8})
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    target: str | None = None
    name: str = "arguments"
