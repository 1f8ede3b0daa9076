"""The data that deciding and doing share: `Settings`, `Rule`, `Policy`, `Site`, `PlanRow`, `Plan`.

All are frozen dataclasses. Bits are integers 1..8, or `None` for "left in floating point" (`32` is accepted at
the door and means the same). Names of layers are dotted paths as in `named_modules()`; the root module's is `""`.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from daqconvert.errors import PolicyError, nearest

BIT_FIELDS = ("w_bits", "a_bits")
CHOICES: dict[str, tuple[Any, ...]] = {
    "granularity": ("channel", "tensor"),
    "grid": ("auto", "midrise", "integer"),
    "normalize": ("auto", True, False),
    "rounding": ("daq", "ste"),
    "slope": ("unit", "paper"),
}
POSITIVE_FIELDS = ("w_gamma", "w_sigma", "a_gamma", "a_sigma")


def check_bits(name: str, value: object) -> int | None:
    """Return a bit-width as 1..8 or `None`.

    Args:
        name: What the value is called in the error.
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
        PolicyError: If there is no such setting or it cannot take that value; names the nearest valid one.
    """
    if name in BIT_FIELDS:
        return check_bits(name, value)
    if name in CHOICES:
        for choice in CHOICES[name]:
            if value == choice and type(value) is type(choice):
                return choice
        raise PolicyError(
            f"{name}: expected one of {', '.join(map(repr, CHOICES[name]))}; found {value!r}."
            + (nearest(value, [c for c in CHOICES[name] if isinstance(c, str)]) if isinstance(value, str) else "")
        )
    if name in POSITIVE_FIELDS:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
            return float(value)
        raise PolicyError(f"{name}: expected a positive number; found {value!r}.")
    valid = [f.name for f in dataclasses.fields(Settings)]
    raise PolicyError(f"{name!r} is not a setting. Settings are: {', '.join(valid)}.{nearest(name, valid)}")


@dataclass(frozen=True)
class Settings:
    """How one site is quantized; every field is a key of a policy's `[default]` and a keyword of `quantize`.

    Attributes:
        w_bits: Bits of the weight, 1..8, or None for float.
        a_bits: Bits of the input, 1..8, or None for float.
        granularity: Bounds and output scale per output `"channel"` or per `"tensor"`.
        grid: `"midrise"` (odd multiples, no zero), `"integer"` (symmetric, with zero), `"auto"` (by bits).
        normalize: Quantize `(W - mean) / std` as the paper does (True), `W` itself (False), `"auto"` (by bits).
        rounding: Gradient of the rounding: `"daq"` (DASR) or `"ste"` (1).
        slope: `"unit"` scales the DASR gradient to a mean of 1 between two levels, `"paper"` leaves it.
        w_gamma: Temperature of the weight's soft rounding.
        w_sigma: Kernel width of the weight's soft rounding.
        a_gamma: Temperature of the input's soft rounding.
        a_sigma: Kernel width of the input's soft rounding.
    """

    w_bits: int | None = 8
    a_bits: int | None = 8
    granularity: str = "channel"
    grid: str = "auto"
    normalize: bool | str = "auto"
    rounding: str = "daq"
    slope: str = "unit"
    w_gamma: float = 2.0
    w_sigma: float = 1.0
    a_gamma: float = 2.0
    a_sigma: float = 2.0

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
    """One rule of a policy: which layers (`match` or `type`), and the settings it changes for them.

    Attributes:
        changes: Setting name -> value; only what the rule changes.
        match: A dotted name, a glob on dotted names, or `re:` and a regular expression; None for a type rule.
        type: A class name such as `"Linear"`; None for a name rule.
        optional: If True, matching no layer is no error.
    """

    changes: Mapping[str, Any]
    match: str | None = None
    type: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Policy:
    """Rules that say which layers get how many bits.

    Precedence: exact name > pattern > type > position > default; among equals the later wins; `exclude` beats all.

    Attributes:
        default: Settings of every layer that no rule touches.
        rules: Rules by name, pattern or type.
        first: Changes for first sites (a model input reaches them without passing another); None leaves them float.
        last: The mirror of `first`.
        exclude: Names, globs or `re:` patterns of layers to leave alone.
        name: Where the policy comes from, for messages: a file or preset name.
    """

    default: Settings = field(default_factory=Settings)
    rules: tuple[Rule, ...] = ()
    first: Mapping[str, Any] | None = field(default_factory=lambda: {"w_bits": 8, "a_bits": 8})
    last: Mapping[str, Any] | None = field(default_factory=lambda: {"w_bits": 8, "a_bits": 8})
    exclude: tuple[str, ...] = ()
    name: str = "arguments"


@dataclass(frozen=True)
class Site:
    """One convolution or linear layer found in a model, before anything is decided about it.

    Attributes:
        name: Dotted path, the first of its aliases.
        kind: Class name, as `"Conv2d"`.
        weight_shape: Shape of the weight; empty where it has none.
        out_channels: Number of output channels.
        reduction: Number of products summed in one output element.
        params: Number of parameters of this module (weight and bias).
        reason: Why it cannot be converted; empty if it can.
        first: Whether it is a first site.
        last: Whether it is a last site.
        nonnegative: Whether the dataflow proves its input non-negative.
        macs: Multiply-accumulates of one forward at batch size 1, or None where no input size is known.
        notes: Remarks for the plan's row.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...] = ()
    out_channels: int = 0
    reduction: int = 0
    params: int = 0
    reason: str = ""
    first: bool = False
    last: bool = False
    nonnegative: bool = False
    macs: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanRow:
    """What is done with one site, and why.

    Attributes:
        site: The site.
        settings: Its settings with nothing left on `"auto"`, or None if it is left alone.
        rule: The rule that decided, as `default`, `first`, `rule 2: "layer4.*"`, `exclude: "head"`.
        reason: Why it is left alone; empty if it is converted.
        signed: False: unsigned input, proven; True: signed; None: `calibrate` decides from data.
        notes: Remarks, the site's and the resolver's.
    """

    site: Site
    settings: Settings | None
    rule: str
    reason: str = ""
    signed: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Dotted path of the site."""
        return self.site.name

    @property
    def converted(self) -> bool:
        """Whether the site is quantized."""
        return self.settings is not None

    @property
    def weight_text(self) -> str:
        """The weight's side in a word: `4 channel integer`, `float`."""
        s = self.settings
        if s is None or s.w_bits is None:
            return "float"
        return f"{s.w_bits} {s.granularity} {s.grid}" + (" normalized" if s.normalize is True else "")

    @property
    def input_text(self) -> str:
        """The input's side in a word: `4 unsigned`, `4 signed`, `4 (calibrate decides)`, `float`."""
        s = self.settings
        if s is None or s.a_bits is None:
            return "float"
        return f"{s.a_bits} " + {True: "signed", False: "unsigned", None: "(calibrate decides)"}[self.signed]

    @property
    def weight_bytes(self) -> float:
        """Bytes of weight and bias at the planned bits: `n * w_bits / 8`, float32 where left alone."""
        weight = math.prod(self.site.weight_shape) if self.site.weight_shape else 0
        bits = 32 if self.settings is None or self.settings.w_bits is None else self.settings.w_bits
        return weight * bits / 8 + (self.site.params - weight) * 4


@dataclass(frozen=True)
class Plan:
    """A policy applied to one model: one row per convolution or linear, immutable and printable.

    Attributes:
        rows: One per site, in order of execution where fx can tell, else of registration.
        model: Class name of the model.
        order: `"fx"` or `"modules"`: what first, last and signs were read from.
        other_params: Parameters and buffers outside the sites.
        input_size: Size of the example input behind the MACs, or None.
        policy: Name of the policy.
    """

    rows: tuple[PlanRow, ...]
    model: str
    order: str = "fx"
    other_params: int = 0
    input_size: tuple[int, ...] | None = None
    policy: str = "arguments"

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> PlanRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is no site of this plan.{nearest(name, [r.name for r in self.rows])}")

    @property
    def converted(self) -> tuple[PlanRow, ...]:
        """Rows of the sites that are quantized."""
        return tuple(row for row in self.rows if row.converted)

    @property
    def skipped(self) -> tuple[PlanRow, ...]:
        """Rows of the sites left alone, each with its reason."""
        return tuple(row for row in self.rows if not row.converted)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all sites at batch size 1, or None where no input size is known."""
        known = [row.site.macs for row in self.rows if row.site.macs is not None]
        return sum(known) if known else None

    @property
    def bytes(self) -> float:
        """Bytes of all parameters at the planned bits (4 for each one outside the sites)."""
        return sum(row.weight_bytes for row in self.rows) + 4.0 * self.other_params

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in float32."""
        return 4 * (sum(row.site.params for row in self.rows) + self.other_params)

    def __str__(self) -> str:
        """Return the plan as plain text, one row a line (`daqconvert.report` draws the same in colour)."""
        table = [("layer", "type", "weight", "input", "decided by", "remarks"), *map(_text_row, self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]) for row in table]
        done, size = len(self.converted), f"{self.float_bytes / 1e6:.2f} MB -> {self.bytes / 1e6:.2f} MB"
        return "\n".join([line.rstrip() for line in lines] + [f"{self.model}: {done} of {len(self)} sites, {size}"])


def _text_row(row: PlanRow) -> tuple[str, str, str, str, str, str]:
    remarks = "; ".join(filter(None, (row.reason, *row.notes)))
    return (row.name or "(root)", row.site.kind, row.weight_text, row.input_text, row.rule, remarks)
