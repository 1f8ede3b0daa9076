"""What integer deployment adds to a plan: the grid to which each output is rounded, and output quantizers.

If only one quantized input reads the output of a convolution (with or without a batch norm, a clip or a pool between
them), the output is rounded to the grid of that input. If several inputs, a sum or anything else reads the output, it
gets an output quantizer of its own, of 8 bits. Each sum of such outputs gets one too, unless only one quantized input
reads the sum. The output of a linear layer may stay in float, because its integer kernel returns float.

A target (`spec.targets`) may ask for more: an output quantizer behind every linear layer, sums in which one term stays
in float, one grid for all values that are concatenated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from daqconvert.errors import PolicyError
from daqconvert.spec import (
    OUTPUT_KIND,
    OUTPUT_QUANTIZER,
    Concat,
    PlanRow,
    Policy,
    Settings,
    Site,
    SiteOutput,
    input_groups,
)
from daqconvert.spec.auto import resolve_computed
from daqconvert.spec.targets import Target, find_target

OUTPUT_BITS = 8
INTEGER = "integer"
LARGEST_WEIGHT = 127
"""The largest absolute value of a weight's operand that an integer kernel takes (int8)."""
ANY = Target("", "", "")
"""What is asked of the outputs where no target is named."""

STAYS = "its output stays in float"
NO_PLACE = f"{STAYS}: no module of the model returns it, so no quantizer can stand there"
NOT_FOLLOWED = f"{STAYS}: torch.fx cannot tell what becomes of it, or the model's code reads its bias"
TRANSPOSED = f"{STAYS}: integer runtimes have no kernel for transposed convolutions"
FLOAT_OPERAND = f"{STAYS}: weight or input is in float"
TOO_WIDE = f"{STAYS}: codes of the mid-rise grid at 8 bits reach 255, an integer kernel takes {LARGEST_WEIGHT}"
LSQ_TOO_WIDE = f"{STAYS}: codes of LSQ at 8 bits reach -128, an integer kernel takes {LARGEST_WEIGHT}"
SEVEN_BITS = "7 bits, for unsigned codes above 127 need a zero point in int8"


def decided(policy: Policy) -> Policy:
    """Return a policy with what its target decides for every site among its default settings."""
    if policy.target is None:
        return policy
    symmetric = policy.default.symmetric or find_target(policy.target).symmetric
    return dataclasses.replace(policy, default=policy.default.replace(deploy=INTEGER, symmetric=symmetric))


def check_held(site: Site, settings: Settings, target: str, where: str) -> None:
    """Raise if integers cannot hold what a site's settings ask; messages start with `where`.

    Raises:
        PolicyError: If one operand is in float, or codes of the weight pass 127.
    """
    if site.is_computed:
        return
    wide = _too_wide(settings)
    if settings.w_bits is None or settings.a_bits is None:
        found = "w_bits" if settings.w_bits is None else "a_bits"
        reason = f"{found} is float, and an integer kernel takes codes of both weight and input"
        excluded = f'exclude = ["{site.name or "(root)"}"]'
        fix = f"Give it bits, such as 8, or leave the layer in float altogether: {excluded}"
    elif wide:
        reason = wide.removeprefix(f"{STAYS}: ")
        fix = "Set w_bits = 7" + (', or grid = "integer" with normalize = false' if wide == TOO_WIDE else "")
    else:
        return
    raise PolicyError(f'{where}: target = "{target}" cannot hold it: {reason}. {fix}.')


def signed_row(row: PlanRow, nonnegative: bool) -> PlanRow:
    """Return a row with the sign of its input: unsigned if it is proven `nonnegative`, else what `calibrate` finds.

    With the setting `symmetric`, 8 bits cannot wait for `calibrate`: unsigned they are 7, because int8 without a zero
    point has 127 codes above zero; and a signed grid has the same 127 there, so nothing is lost by being signed.
    """
    s = row.settings
    if s is None or not s.symmetric or s.a_bits != OUTPUT_BITS:
        return dataclasses.replace(row, signed=False if nonnegative else None)
    if not nonnegative:
        return dataclasses.replace(row, signed=True)
    return dataclasses.replace(row, settings=s.replace(a_bits=7), signed=False, notes=(*row.notes, SEVEN_BITS))


def with_outputs(
    policy: Policy, rows: Sequence[PlanRow], sums: Sequence[SiteOutput], concats: Sequence[Concat] = (),
    operators: Sequence[SiteOutput] = (),
) -> tuple[PlanRow, ...]:  # fmt: skip
    """Return the rows of a plan with what `deploy="integer"` and the policy's target decide about outputs.

    The signs of the rows must be decided already, and `sums` be in order of execution. The output quantizers that are
    added take their rounding from the policy's default. If no row has `deploy="integer"`, the rows are returned
    unchanged.
    """
    if not any(row.settings is not None and row.settings.deploy == INTEGER for row in rows):
        return tuple(rows)
    outputs = _Outputs(policy, rows)
    joined = {source for concat in concats for source in concat.sources} if outputs.target.one_scale_concat else set()
    found = outputs.run(sums, [o for o in operators if outputs.target.operators or o.place in joined])
    return _on_one_grid(found, concats, outputs.quantizers) if outputs.target.one_scale_concat else found


class _Outputs:
    """Decides about the outputs of all rows of a plan.

    Attributes:
        quantizers: Name of a site or `place` of a sum -> name of the row of its output quantizer.
    """

    def __init__(self, policy: Policy, rows: Sequence[PlanRow]) -> None:
        self.rows, self.default = rows, policy.default
        self.target = ANY if policy.target is None else find_target(policy.target)
        self.groups = input_groups(rows)
        self.by_name = {row.name: row for row in rows}
        self.added: dict[str, list[PlanRow]] = {}
        self.known: set[str] = set()
        self.places: set[str] = set()
        self.quantizers: dict[str, str] = {}

    def run(self, sums: Sequence[SiteOutput], operators: Sequence[SiteOutput]) -> tuple[PlanRow, ...]:
        joining = self._joining(sums) if self.target.sums == "shortcut" else {}
        done = {row.name: self._of_site(row, joining.get(row.name)) for row in self.rows}
        for output, of in [(o, "an operator") for o in operators if o.after] + [(o, "a sum") for o in sums]:
            if output.place is not None and all(source in self.known for source in output.sources):
                self.known.add(output.place)
                if self._reader(output) is None and output.place not in self.places:
                    self.quantizers[output.place] = self._add(output, output.after, of)
        return tuple(r for row in self.rows for r in (done[row.name], *self.added.get(row.name, ())))

    def _joining(self, sums: Sequence[SiteOutput]) -> dict[str, str]:
        """Return the sites whose output enters a sum in float: name -> `place` of the sum.

        In each sum that will be codes it is the last site that only this sum reads, and if there is a choice, none
        that reads the input of its block as a shortcut does. All other terms are codes.
        """
        known = {row.name for row in self.rows if self._returns_codes(row)}
        place_of, order = {}, {row.name: number for number, row in enumerate(self.rows)}
        for output in sums:
            if output.place is None or not all(source in known for source in output.sources):
                continue
            known.add(output.place)
            terms = [name for name in output.entering if name in known and self.by_name[name].site.call is None]
            if terms and len(output.sources) > 1:
                place_of[max(terms, key=lambda name: (not self.by_name[name].site.reads, order[name]))] = output.place
        return place_of

    def _returns_codes(self, row: PlanRow) -> bool:
        """Return whether the output of a row will be codes, on the grid of a reader or of an output quantizer."""
        settings, output = row.settings, row.site.output
        if settings is None or settings.deploy != INTEGER or row.site.is_computed or output is None:
            return False
        reader = self._reader(output)
        return not self._why_float(row, settings, reader) and (self._is_rounded(row) or reader is not None)

    def _is_rounded(self, row: PlanRow) -> bool:
        """Return whether a row's output has to be codes, whoever reads it."""
        return row.site.is_convolution or self.target.outputs == "all"

    def _of_site(self, row: PlanRow, joins: str | None) -> PlanRow:
        settings, output = row.settings, row.site.output
        if settings is None or settings.deploy != INTEGER or row.site.is_computed:
            return row
        reader = None if output is None else self._reader(output)
        reason = self._why_float(row, settings, reader)
        if reason:
            return dataclasses.replace(row, notes=(*row.notes, reason))
        if output is None or not (self._is_rounded(row) or reader is not None):
            return row
        self.known.add(row.name)
        if joins is not None:
            note = f"enters the sum at {joins or '(root)'} in float, as {self.target.name} adds"
            output = dataclasses.replace(output, joins=joins)
            row = dataclasses.replace(row, notes=(*row.notes, note))
        else:
            if reader is None:
                self.quantizers[row.name] = self._add(output, row.name, row.name)
            output = dataclasses.replace(output, meets=reader if reader is not None else self.quantizers[row.name])
        return dataclasses.replace(row, site=dataclasses.replace(row.site, output=output))

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
        rule = f'deploy = "{INTEGER}"' if self.target is ANY else f'target = "{self.target.name}"'
        row = PlanRow(site, settings, rule, notes=(f"output of {of or '(root)'}",))
        self.added.setdefault(after, []).append(signed_row(row, output.nonnegative))
        self.places.add(output.place or "")
        return name

    def _why_float(self, row: PlanRow, settings: Settings, reader: str | None) -> str:
        """Return why the output of a site is not rounded to codes; empty if it is, or if it need not be."""
        output = row.site.output
        if "transpose" in (row.site.kind if row.site.call is None else row.site.call.function).lower():
            return TRANSPOSED
        if settings.w_bits is None or settings.a_bits is None:
            return FLOAT_OPERAND
        wide = _too_wide(settings)
        if wide or not self._is_rounded(row) or (reader is not None and not row.site.is_convolution):
            return wide
        if output is None:
            return NOT_FOLLOWED
        return NO_PLACE if output.place is None else ""


def _too_wide(settings: Settings) -> str:
    """Return why the codes of a weight pass what an integer kernel takes; empty if they do not."""
    if settings.w_bits is None:
        return ""
    if settings.grid == "midrise" and 2**settings.w_bits - 1 > LARGEST_WEIGHT:
        return TOO_WIDE
    return LSQ_TOO_WIDE if settings.grid == "twos" and 2 ** (settings.w_bits - 1) > LARGEST_WEIGHT else ""


def _on_one_grid(
    rows: tuple[PlanRow, ...], concats: Sequence[Concat], quantizers: dict[str, str]
) -> tuple[PlanRow, ...]:
    """Return the rows with one quantizer for all values that are concatenated, and for what reads them on that grid.

    `quantizers` maps names of sites and places of sums to rows of output quantizers. A value that two concatenations
    read joins both. A reader joins if its input has the same bits and the same sign.
    """
    found = {row.name: row for row in rows}
    leader = {name: name for name in found}

    def of(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    order = {name: number for number, name in enumerate(found)}
    joined = [concat for concat in concats if all(source in quantizers for source in concat.sources)]
    for concat in joined:
        first, *others = sorted((of(quantizers[source]) for source in concat.sources), key=order.__getitem__)
        leader.update(dict.fromkeys(others, first))
    members: dict[str, list[str]] = {}
    for name in dict.fromkeys(quantizers[source] for concat in joined for source in concat.sources):
        members.setdefault(of(name), []).append(name)
    for first, names in members.items():
        nonnegative = all(found[name].signed is False for name in names)
        for name in names:
            found[name] = _shared(_resigned(found[name], nonnegative), first)
        for reader in {r for c in joined if of(quantizers[c.sources[0]]) == first for r in c.readers}:
            if _reads_alike(found[reader], found[first]):
                found[reader] = _shared(found[reader], first)
    return tuple(found[row.name] for row in rows)


def _resigned(row: PlanRow, nonnegative: bool) -> PlanRow:
    """Return the row of an output quantizer with the sign that all values on its grid have."""
    if row.settings is None or row.signed is not False or nonnegative:
        return row
    notes = tuple(note for note in row.notes if note != SEVEN_BITS)
    return signed_row(dataclasses.replace(row, settings=row.settings.replace(a_bits=OUTPUT_BITS), notes=notes), False)


def _shared(row: PlanRow, first: str) -> PlanRow:
    assert row.settings is not None
    note = () if row.name == first else (f"one grid with {first}: their values are concatenated",)
    return dataclasses.replace(
        row, site=dataclasses.replace(row.site, reads=first), settings=row.settings.replace(share_inputs=True),
        notes=(*row.notes, *note),
    )  # fmt: skip


def _reads_alike(row: PlanRow, grid: PlanRow) -> bool:
    """Return whether the input of a row is quantized as another row's is: one quantizer serves both."""
    if row.settings is None or grid.settings is None or row.site.is_product:
        return False
    fields = ("a_bits", "rounding", "slope", "a_gamma", "a_sigma", "symmetric")
    alike = all(getattr(row.settings, name) == getattr(grid.settings, name) for name in fields)
    return alike and row.signed == grid.signed
