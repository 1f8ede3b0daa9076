"""What was decided about one model: `Site`, `PlanRow`, `Plan`; immutable, printable before anything happens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from daqconvert.errors import nearest
from daqconvert.spec.settings import Settings


@dataclass(frozen=True)
class Call:
    """Where a site computes, if that is not the forward of the layer it is named after.

    Attributes:
        function: Name of what is called: `"linear"`, `"conv2d"`, `"matmul"`, `"scaled_dot_product_attention"`, ...
        modules: Dotted names of the modules whose forwards make the call, and are rewritten.
        holder: Dotted name of the module that keeps the quantizers.
        tensors: Dotted names of the parameters and buffers that the weight is computed from; none for a product of
            activations.
        dynamic: Whether the second operand depends on the model's inputs: it has no codes to store.
    """

    function: str
    modules: tuple[str, ...]
    holder: str
    tensors: tuple[str, ...] = ()
    dynamic: bool = False

    @property
    def is_product(self) -> bool:
        """Whether both operands are activations, as in attention."""
        return not self.tensors


@dataclass(frozen=True)
class Site:
    """One convolution, linear layer or product found in a model, before anything is decided about it.

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
        call: Where it computes, if not in its own layer's forward.
        one_scale: Why its bounds and scale cannot be per channel; empty if they can.
        reads: Name of the first site that reads the same input tensor; its own where it is the first or the only one.
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
    call: Call | None = None
    one_scale: str = ""
    reads: str = ""

    @property
    def is_product(self) -> bool:
        """Whether both operands are activations, as in attention: quantized only where `attention` asks for it."""
        return self.call is not None and self.call.is_product


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

    Example:
        >>> import daqconvert as dq
        >>> chosen = dq.plan(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> chosen["2"].signed, len(chosen.converted), chosen.bytes, chosen.float_bytes
        (False, 2, 48.0, 120)
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
