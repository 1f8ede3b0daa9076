"""All decisions about one model: `Plan`, which is immutable and can be printed before a model is converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

from daqconvert.errors import ROOT, nearest
from daqconvert.spec.diff import PlanDiff
from daqconvert.spec.plain_values import added
from daqconvert.spec.reproduce import plan_toml
from daqconvert.spec.row import PlanRow, input_groups
from daqconvert.spec.text_table import text_table
from daqconvert.spec.totals import Totals


@dataclass(frozen=True)
class Plan:
    """A policy applied to one model: one row for each site, immutable and printable.

    Attributes:
        rows: One for each site, in order of execution if fx could follow the model, else in order of registration;
            `deploy="integer"` adds one for each output quantizer.
        model: Class name of the model.
        order: `"fx"` or `"modules"`: the source of the order, of first and last sites and of signs.
        other_params: Number of elements of the parameters and buffers outside the sites.
        input_size: Size of the example input that the MACs were counted with; None if they were not.
        policy: Name of the policy.
        target: Name of the runtime that the model is quantized for; None for none.

    Example:
        >>> import daqconvert as dq
        >>> chosen = dq.plan(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> chosen[0].name, [row.name for row in chosen[1:]]
        ('0', ['2'])
        >>> chosen["2"].signed, len(chosen.converted), chosen.bytes, chosen.float_bytes
        (False, 2, 48, 120)
    """

    rows: tuple[PlanRow, ...]
    model: str
    order: str = "fx"
    other_params: int = 0
    input_size: tuple[int, ...] | None = None
    policy: str = "arguments"
    target: str | None = added(None)

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, key: str | int) -> PlanRow: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[PlanRow, ...]: ...

    def __getitem__(self, key: str | int | slice) -> PlanRow | tuple[PlanRow, ...]:
        """Return the row of a name or of a place, or the rows of a slice.

        Raises:
            KeyError: If no row has this name.
            IndexError: If there are fewer rows.
        """
        if not isinstance(key, str):
            return self.rows[key]
        for row in self.rows:
            if row.name == key or (key == ROOT and not row.name):
                return row
        raise KeyError(f"{key!r} is no site of this plan.{nearest(key, [r.name or ROOT for r in self.rows])}")

    @property
    def converted(self) -> tuple[PlanRow, ...]:
        """Rows of the sites that are quantized."""
        return tuple(row for row in self.rows if row.converted)

    @property
    def skipped(self) -> tuple[PlanRow, ...]:
        """Rows of the sites that stay in float, each with its reason."""
        return tuple(row for row in self.rows if not row.converted)

    @property
    def totals(self) -> Totals:
        """Parameters, MACs, BOPs and bytes of all rows, as planned and in float32."""
        return Totals.of(self.rows, self.other_params)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all sites at batch size 1, or None if no input size is known."""
        return self.totals.macs

    @property
    def bops(self) -> int | None:
        """Bit operations, `MACs * w_bits * a_bits` with 32 for float, or None if no input size is known."""
        return self.totals.bops

    @property
    def bytes(self) -> int:
        """Bytes of all parameters at the planned bits (4 bytes for each one outside the sites), without scales."""
        return self.totals.bytes

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in float32."""
        return self.totals.float_bytes

    @property
    def label(self) -> str:
        """The bits that were asked for, as `W4A4`: those of most layers that no special rule decided; or `float`.

        First and last layers have bits of their own, so two ends of 8 bits around one layer of 4 are still `W4A4`.
        """
        converted = [row for row in self.converted if not row.site.is_output]
        counted = [row for row in converted if row.rule == "default"] or converted
        found = Counter(f"W{row.bits[0]}A{row.bits[1]}" for row in counted)
        return found.most_common(1)[0][0] if found else "float"

    def input_groups(self) -> dict[str, str]:
        """Return the sites that use another's input quantizer: name -> name of the site that has it."""
        return input_groups(self.rows)

    def diff(self, other: Plan) -> PlanDiff:
        """Return the difference between this plan and another; it is false if there is none, and prints as text.

        Args:
            other: The second plan.
        """
        mine, others = ({row.name: row for row in plan.rows} for plan in (self, other))
        return PlanDiff.of(mine, others, (self.totals, other.totals), (self.target, other.target))

    def to_toml(self) -> str:
        """Return the text of a policy file that gives this plan again for the same model; comments name the model.

        Example:
            >>> from daqconvert.policy import from_toml
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> chosen = dq.plan(model, w_bits=4, a_bits=4, bits={"2": 2})
            >>> again = dq.plan(model, policy=from_toml(chosen.to_toml()))
            >>> bool(chosen.diff(again))
            False
        """
        order = "by torch.fx" if self.order == "fx" else "by registration"
        totals = self.totals
        done = f"{totals.converted} of {totals.sites} sites converted"
        heading = f"Reproduces the plan of {self.model}: policy {self.policy}, {done}, order {order}"
        return plan_toml(self.rows, heading, self.target)

    def __str__(self) -> str:
        """Return the plan as plain text, one row per line (`daqconvert.report` draws the same table with lines)."""
        table = [("layer", "type", "weight", "input", "decided by", "remarks"), *map(_text_row, self.rows)]
        totals, size = self.totals, f"{self.float_bytes / 1e6:.2f} MB -> {self.bytes / 1e6:.2f} MB"
        if self.totals.bops is not None and self.totals.float_bops is not None:
            size += f", {self.totals.float_bops / 1e9:.3g} -> {self.totals.bops / 1e9:.3g} GBOPs"
        outputs = len(self) - totals.sites
        done = f"{totals.converted} of {totals.sites} sites" + (f", {outputs} outputs" if outputs else "")
        aim = "" if self.target is None else f" for {self.target}"
        return "\n".join([*text_table(table), f"{self.model}{aim}: {done}, {size}"])


def _text_row(row: PlanRow) -> tuple[str, str, str, str, str, str]:
    remarks = "; ".join(filter(None, (row.reason, *row.notes)))
    return (row.name or "(root)", row.site.kind, row.weight_text, row.input_text, row.rule, remarks)
