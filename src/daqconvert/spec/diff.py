"""The differences between two plans: `PlanDiff`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from daqconvert.spec.row import PlanRow
from daqconvert.spec.totals import Totals

_SITE_FACTS = ("kind", "weight_shape", "params")


@dataclass(frozen=True)
class RowChange:
    """One site that two plans treat differently.

    Attributes:
        before: The site's row in the first plan.
        after: The site's row in the second plan.
    """

    before: PlanRow
    after: PlanRow

    @property
    def name(self) -> str:
        """Dotted path of the site."""
        return self.before.name

    @property
    def what(self) -> dict[str, tuple[object, object]]:
        """What differs: name of a setting or fact -> its values before and after. Rules and reasons do not count."""
        pairs: dict[str, tuple[object, object]] = {
            fact: (getattr(self.before.site, fact), getattr(self.after.site, fact)) for fact in _SITE_FACTS
        }
        one, two = self.before.settings, self.after.settings
        if one is None or two is None:
            pairs["bits"] = (_bits(self.before), _bits(self.after))
        else:
            pairs |= {f.name: (getattr(one, f.name), getattr(two, f.name)) for f in fields(one)}
            if one.a_bits is not None and two.a_bits is not None:
                pairs["signed"] = (self.before.signed, self.after.signed)
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    def __str__(self) -> str:
        """Return one line: the name, and each change as `before -> after`."""
        changes = (f"{key} {_text(key, one)} -> {_text(key, two)}" for key, (one, two) in self.what.items())
        return f"{self.name or '(root)'}: {', '.join(changes)}"


@dataclass(frozen=True)
class PlanDiff:
    """The difference between two plans. It is false if there is none, and prints as text.

    Attributes:
        changed: Sites of both plans that are treated differently, in the order of the first plan.
        added: Rows that only the second plan has.
        removed: Rows that only the first plan has.
        before: Sizes of the first plan.
        after: Sizes of the second plan.
        targets: Targets of the first and the second plan; None for none.

    Example:
        >>> import daqconvert as dq
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(dq.plan(model, w_bits=4).diff(dq.plan(model, w_bits=4, last=None)))
        2: bits W8A8 -> float
        1 of 2 layers changed; bytes 120 -> 168
    """

    changed: tuple[RowChange, ...]
    added: tuple[PlanRow, ...]
    removed: tuple[PlanRow, ...]
    before: Totals
    after: Totals
    targets: tuple[str | None, str | None] = (None, None)

    @classmethod
    def of(
        cls, before: Mapping[str, PlanRow], after: Mapping[str, PlanRow], sizes: tuple[Totals, Totals],
        targets: tuple[str | None, str | None] = (None, None),
    ) -> PlanDiff:  # fmt: skip
        """Return the difference between the rows of two plans.

        Args:
            before: The first plan's rows by name.
            after: The second plan's rows by name.
            sizes: Totals of the first and the second plan.
            targets: Targets of the first and the second plan.
        """
        both = (RowChange(row, after[name]) for name, row in before.items() if name in after)
        return cls(
            changed=tuple(change for change in both if change.what),
            added=tuple(row for name, row in after.items() if name not in before),
            removed=tuple(row for name, row in before.items() if name not in after),
            before=sizes[0],
            after=sizes[1],
            targets=targets,
        )

    def __bool__(self) -> bool:
        aims = self.targets[0] != self.targets[1]
        return bool(self.changed or self.added or self.removed or self.before != self.after or aims)

    def __str__(self) -> str:
        """Return a line for each site that changed, was added (`+`) or removed (`-`), and the totals that changed."""
        if not self:
            return "no difference"
        lines = [str(change) for change in self.changed]
        for sign, rows in (("+", self.added), ("-", self.removed)):
            lines += [f"{sign} {row.name or '(root)'}: {row.site.kind}, {_bits(row)}" for row in rows]
        total = f"{len(self.changed)} of {self.before.sites} layers changed"
        total += "".join(
            f", {len(rows)} {word}" for word, rows in (("added", self.added), ("removed", self.removed)) if rows
        )
        for key in ("params", "macs", "bops", "bytes"):
            one, two = getattr(self.before, key), getattr(self.after, key)
            if one != two:
                total += f"; {key} {_text(key, one)} -> {_text(key, two)}"
        if self.targets[0] != self.targets[1]:
            total += "; target " + " -> ".join(name or "none" for name in self.targets)
        return "\n".join([*lines, total])


def _bits(row: PlanRow) -> str:
    if row.settings is None:
        return "float"
    return "".join(f"{side}{bits}" for side, bits in zip("WA", row.bits, strict=True))


def _text(key: str, value: object) -> str:
    if key == "signed":
        return {True: "yes", False: "no", None: "(calibrate decides)"}[value]  # type: ignore[index]
    if value is None:
        return {"attention": "off", "w_bits": "float", "a_bits": "float"}.get(key, "-")
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "-"
    return f"{value:,}" if type(value) is int else str(value)
