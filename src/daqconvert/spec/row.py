"""The decision about one site, with its reason: `PlanRow`, and the reasons for leaving a site in float."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from daqconvert.spec.settings import BIT_FIELDS, SETTING_NAMES, Settings
from daqconvert.spec.site_facts import Site

FLOAT_BITS = 32
EXCLUDED = "excluded"
NOT_INCLUDED = "not included"
NO_BITS = "w_bits and a_bits are None"
FLOAT_POSITION = {key: f"{key} layer ({key} = None)" for key in ("first", "last")}
PRODUCT_OFF = "attention product: off; attention = 8 turns it on"
ONE_BIT_PRODUCT = "attention = 1 needs a non-negative input, not proven here; write attention = 2 or more"
ONE_BIT_COMPUTED = (
    "its weight is computed from the input and may be negative: w_bits = 1 cannot hold it, 2 or more can"
)

_LEVELS = ("granularity", "grid", "normalize")


def settable(site: Site) -> tuple[str, ...]:
    """Return the settings that a policy decides for a site; the others are fixed by the kind of the site.

    Example:
        >>> "attention" in settable(Site("fc", "Linear")), "w_bits" in settable(Site("fc", "Linear"))
        (False, True)
    """
    if site.is_product:  # both operands are quantized as inputs, at the bits of `attention`, and share no quantizer
        left = (*BIT_FIELDS, *_LEVELS, "share_inputs", "deploy")
        return tuple(name for name in SETTING_NAMES if name not in left)
    fixed = _LEVELS if site.is_computed else _LEVELS[:1] if site.one_scale else ()
    return tuple(name for name in SETTING_NAMES if name not in (*fixed, "attention"))


@dataclass(frozen=True)
class PlanRow:
    """The decision about one site, with its reason.

    Attributes:
        site: The site.
        settings: Settings of the site with nothing left on `"auto"`; None if the site stays in float.
        rule: The rule that decided, such as `default`, `first`, `rule 2: "layer4.*"`, `exclude: "head"`.
        reason: Why the site stays in float; empty if it is converted.
        signed: Whether the input is signed: False if proven non-negative; None if `calibrate` decides from data.
        notes: Remarks: those of the site, and those of the decision.
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
        """How the weight is quantized, in words: `4 channel integer`, `8 tensor computed`, `float`."""
        s = self.settings
        if s is None or s.w_bits is None:
            return "float"
        if self.site.is_computed:
            return f"{s.w_bits} tensor computed"
        return f"{s.w_bits} {s.granularity} {s.grid}" + (" normalized" if s.normalize is True else "")

    @property
    def input_text(self) -> str:
        """How the input is quantized, in words: `4 unsigned`, `4 signed`, `4 (calibrate decides)`, `float`."""
        s = self.settings
        if s is None or s.a_bits is None:
            return "float"
        return f"{s.a_bits} " + {True: "signed", False: "unsigned", None: "(calibrate decides)"}[self.signed]

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of weight and input, 32 for float."""
        s = self.settings
        return (FLOAT_BITS, FLOAT_BITS) if s is None else (s.w_bits or FLOAT_BITS, s.a_bits or FLOAT_BITS)

    @property
    def bops(self) -> int | None:
        """Bit operations of one forward at batch size 1, `MACs * w_bits * a_bits`; None if the MACs are unknown."""
        return None if self.site.macs is None else self.site.macs * self.bits[0] * self.bits[1]

    @property
    def float_bops(self) -> int | None:
        """Bit operations in float32, `MACs * 32 * 32`; None if the MACs are unknown."""
        return None if self.site.macs is None else self.site.macs * FLOAT_BITS**2

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the site's own parameters at the planned bits; None if their size is not known (a lazy layer).

        The codes of `N` weights are packed into `w_bits * ceil(N / 8)` bytes; all other parameters, such as a bias,
        count as float32. A weight that is computed from the model's input is not stored.
        """
        site, s = self.site, self.settings
        weight = math.prod(site.weight_shape) if site.weight_shape else 0
        if s is None or s.w_bits is None or not weight or site.is_computed:
            return self.float_bytes
        return s.w_bits * -(-weight // 8) + 4 * max(site.params - weight, 0)

    @property
    def float_bytes(self) -> int | None:
        """Bytes of the site's own parameters in float32; None if their size is not known."""
        known = self.site.is_computed or self.site.weight_shape or self.site.params
        return 4 * self.site.params if known else None

    @property
    def scale_bytes(self) -> int:
        """Bytes of the frozen form's scales (float32) and input zero points (a byte each), not in `weight_bytes`."""
        s = self.settings
        if s is None:
            return 0
        as_inputs = (s.a_bits is not None) + (self.site.is_computed and s.w_bits is not None)
        return 4 * (self.site.out_channels if s.granularity == "channel" else 1) + 5 * as_inputs


def input_groups(rows: Iterable[PlanRow]) -> dict[str, str]:
    """Return the sites that use the input quantizer of another site: name -> name of the site that has it.

    Sites share an input quantizer if all of them have `share_inputs`, read the same tensor (`Site.reads`), and
    quantize it in the same way: bits, rounding, slope, temperature and kernel width of the input. The first of them in
    the plan has the quantizer. Products of two activations never share one.

    Args:
        rows: All rows of a plan.

    Example:
        >>> asked = Settings(share_inputs=True)
        >>> input_groups(PlanRow(Site(name, "Linear", reads="q"), asked, "default") for name in ("q", "k", "v"))
        {'k': 'q', 'v': 'q'}
    """
    keepers: dict[tuple[object, ...], str] = {}
    groups = {}
    for row in rows:
        s = row.settings
        if s is None or s.a_bits is None or not s.share_inputs or row.site.is_product:
            continue
        key = (row.site.reads or row.name, s.a_bits, s.rounding, s.slope, s.a_gamma, s.a_sigma)
        keeper = keepers.setdefault(key, row.name)
        if keeper != row.name:
            groups[row.name] = keeper
    return groups
