"""What `deploy="integer"` adds to a plan: the grid to which each output is rounded, and output quantizers.

If only one quantized input reads the output of a convolution (with or without a batch norm, a clip or a pool between
them), the output is rounded to the grid of that input. If several inputs, a sum or anything else reads the output, it
gets an output quantizer of its own, of 8 bits. Each sum of such outputs gets one too, unless only one quantized input
reads the sum. The output of a linear layer may stay in float, because its integer kernel returns float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from daqconvert.spec import OUTPUT_KIND, OUTPUT_QUANTIZER, PlanRow, Policy, Settings, Site, SiteOutput, input_groups
from daqconvert.spec.auto import resolve_computed

OUTPUT_BITS = 8
INTEGER = "integer"
LARGEST_WEIGHT = 127
"""The largest absolute value of a weight's operand that an integer kernel takes (int8)."""

STAYS = "its output stays in float"
NO_PLACE = f"{STAYS}: no module of the model returns it, so no quantizer can stand there"
NOT_FOLLOWED = f"{STAYS}: torch.fx cannot tell what becomes of it, or the model's code reads its bias"
TRANSPOSED = f"{STAYS}: integer runtimes have no kernel for transposed convolutions"
FLOAT_OPERAND = f"{STAYS}: weight or input is in float"
TOO_WIDE = f"{STAYS}: codes of the mid-rise grid at 8 bits reach 255, an integer kernel takes {LARGEST_WEIGHT}"
LSQ_TOO_WIDE = f"{STAYS}: codes of LSQ at 8 bits reach -128, an integer kernel takes {LARGEST_WEIGHT}"


def with_outputs(policy: Policy, rows: Sequence[PlanRow], sums: Sequence[SiteOutput]) -> tuple[PlanRow, ...]:
    """Return the rows of a plan with what `deploy="integer"` decides about outputs.

    The signs of the rows must be decided already, and `sums` be in order of execution. The output quantizers that are
    added take their rounding from the policy's default. If no row has `deploy="integer"`, the rows are returned
    unchanged.
    """
    if not any(row.settings is not None and row.settings.deploy == INTEGER for row in rows):
        return tuple(rows)
    return _Outputs(policy, rows).run(sums)


class _Outputs:
    def __init__(self, policy: Policy, rows: Sequence[PlanRow]) -> None:
        self.rows, self.default = rows, policy.default
        self.groups = input_groups(rows)
        self.by_name = {row.name: row for row in rows}
        self.added: dict[str, list[PlanRow]] = {}
        self.known: set[str] = set()

    def run(self, sums: Sequence[SiteOutput]) -> tuple[PlanRow, ...]:
        done = {row.name: self._of_site(row) for row in self.rows}
        for output in sums:
            if output.place is not None and all(source in self.known for source in output.sources):
                self.known.add(output.place)
                if self._reader(output) is None:
                    self._add(output, output.after, "a sum")
        return tuple(r for row in self.rows for r in (done[row.name], *self.added.get(row.name, ())))

    def _of_site(self, row: PlanRow) -> PlanRow:
        settings, output = row.settings, row.site.output
        if settings is None or settings.deploy != INTEGER or row.site.is_computed:
            return row
        reason = _why_float(row, settings)
        if reason:
            return dataclasses.replace(row, notes=(*row.notes, reason))
        reader = None if output is None else self._reader(output)
        if not row.site.is_convolution and (output is None or reader is None):
            return row
        assert output is not None
        self.known.add(row.name)
        meets = reader if reader is not None else self._add(output, row.name, row.name)
        return dataclasses.replace(
            row, site=dataclasses.replace(row.site, output=dataclasses.replace(output, meets=meets))
        )

    def _reader(self, output: SiteOutput) -> str | None:
        """Return the site whose quantized input is the only reader of an output; None if there is no single reader.

        Sites that share one input quantizer count as one reader: the site that has it.
        """
        rows = [self.by_name[name] for name in output.readers]
        if not output.alone or not rows or any(r.settings is None or r.settings.a_bits is None for r in rows):
            return None
        keepers = {self.groups.get(row.name, row.name) for row in rows}
        return keepers.pop() if len(keepers) == 1 else None

    def _add(self, output: SiteOutput, after: str, of: str) -> str:
        """Add the row of an output quantizer, behind the row called `after`, and return its name."""
        name = f"{output.place}.{OUTPUT_QUANTIZER}" if output.place else OUTPUT_QUANTIZER
        site = Site(name, OUTPUT_KIND, output=output, nonnegative=output.nonnegative)
        settings = resolve_computed(
            self.default.replace(w_bits=None, a_bits=OUTPUT_BITS, deploy=INTEGER, attention=None, share_inputs=False)
        )
        note = f"output of {of or '(root)'}"
        row = PlanRow(
            site, settings, f'deploy = "{INTEGER}"', signed=False if output.nonnegative else None, notes=(note,)
        )
        self.added.setdefault(after, []).append(row)
        return name


def _why_float(row: PlanRow, settings: Settings) -> str:
    """Return why the output of a site is not rounded to codes; empty if it is, or if the site is a linear layer."""
    output = row.site.output
    if "transpose" in (row.site.kind if row.site.call is None else row.site.call.function).lower():
        return TRANSPOSED
    if settings.w_bits is None or settings.a_bits is None:
        return FLOAT_OPERAND
    if settings.grid == "midrise" and 2**settings.w_bits - 1 > LARGEST_WEIGHT:
        return TOO_WIDE
    if settings.grid == "twos" and 2 ** (settings.w_bits - 1) > LARGEST_WEIGHT:
        return LSQ_TOO_WIDE
    if not row.site.is_convolution:
        return ""
    if output is None:
        return NOT_FOLLOWED
    return NO_PLACE if output.place is None else ""
