"""Making a policy that gives the rows of a plan again, in a form that is easy to edit.

The most common settings become `[default]`, and what the first and the last sites have in common becomes `[first]` and
`[last]`. Every other difference becomes a rule with the exact name of its site, or a line of `[bits]` if only bits
differ. A setting is written as `"auto"` if `"auto"` gives the same value, so that someone who edits the bits need not
change other settings.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from daqconvert.spec.auto import resolve_auto
from daqconvert.spec.row import (
    EXCLUDED,
    FLOAT_BITS,
    FLOAT_POSITION,
    NO_BITS,
    NOT_INCLUDED,
    ONE_BIT_COMPUTED,
    ONE_BIT_PRODUCT,
    PRODUCT_OFF,
    PlanRow,
    settable,
)
from daqconvert.spec.settings import BIT_FIELDS, Policy, Rule, Settings
from daqconvert.spec.toml import to_toml

_FLOAT: dict[str, Any] = dict.fromkeys(BIT_FIELDS)
_EXCLUDE = 'exclude: "'
_DECIDED = (NO_BITS, PRODUCT_OFF, ONE_BIT_PRODUCT, ONE_BIT_COMPUTED, *FLOAT_POSITION.values())


def reproduce(rows: Iterable[PlanRow]) -> Policy:
    """Return a policy that, resolved on the same sites, gives all these rows of a plan again.

    Example:
        >>> from daqconvert.spec import Site
        >>> rows = [PlanRow(Site(name, "Linear"), Settings(4, 4), "default") for name in "abc"]
        >>> rows.append(PlanRow(Site("d", "Linear"), Settings(2, 4), 'rule 1: "d"'))
        >>> policy = reproduce(rows)
        >>> policy.default.w_bits, [(rule.match, rule.changes) for rule in policy.rules]
        (4, [('d', {'w_bits': 2})])
    """
    candidates = [row for row in rows if not row.site.reason and not row.site.is_output]
    decided = [_loosened(row) for row in candidates if row.converted or row.reason in _DECIDED]
    others = [row for row in candidates if row.reason == NOT_INCLUDED]
    excluded = [row for row in candidates if not row.converted and row.reason not in (*_DECIDED, NOT_INCLUDED)]
    include: tuple[str, ...] = ()
    if others:
        include = tuple(exact_pattern(row.name) for row in decided or excluded)
        excluded += [] if include else others
    default = _default(decided)
    ends = {key: _position(key, decided, default) for key in ("first", "last")}
    changes = {row.name: _changes(row, default, ends) for row in decided}
    return Policy(
        default=default,
        rules=tuple(Rule(change, match=exact_pattern(name)) for name, change in changes.items() if change),
        first=ends["first"],
        last=ends["last"],
        exclude=tuple(dict.fromkeys(_exclude_pattern(row) for row in excluded)),
        include=include,
    )


def plan_toml(rows: Sequence[PlanRow], heading: str, target: str | None = None) -> str:
    """Return `reproduce(rows)` as TOML, after comments with `heading` and the number of sites that a rule converts.

    `target` is that of the plan.
    """
    rows = [row for row in rows if not row.site.is_output]  # `deploy="integer"` adds output quantizers again
    policy = reproduce(rows)
    bits = {rule.match: rule for rule in policy.rules if rule.match and set(rule.changes) <= set(BIT_FIELDS)}
    rules = tuple(rule for rule in policy.rules if rule.match not in bits)
    by_name = {exact_pattern(row.name): list(_bits(row)) for row in rows}
    text = to_toml(dataclasses.replace(policy, rules=rules, target=target), {name: by_name[name] for name in bits})
    counts = Counter(row.rule for row in rows if row.converted)
    comments = [heading, *(f"{rule}: {count} converted" for rule, count in counts.items())]
    return "".join(f"# {_printable(line)}\n" for line in comments) + "\n" + text


def exact_pattern(name: str) -> str:
    """Return a pattern that matches only the site of this name: the name, with special characters escaped.

    Example:
        >>> exact_pattern("layer4.0"), exact_pattern("a*"), exact_pattern("re:a")
        ('layer4.0', 'a[*]', '[r]e:a')
    """
    text = "".join(f"[{c}]" if c in "*?[" else c for c in name)
    return f"[r]{text[1:]}" if text.startswith("re:") else text


def _loosened(row: PlanRow) -> PlanRow:
    """Return the row with every setting on `"auto"` for which `"auto"` gives the same value."""
    settings = row.settings
    if settings is None or row.site.is_computed:
        return row
    fields = [name for name in ("granularity", "grid", "normalize") if name in settable(row.site)]
    for name in fields:
        candidate = settings.replace(**{name: "auto"})
        settled = resolve_auto(candidate)
        if all(getattr(settled, field) == getattr(row.settings, field) for field in fields):
            settings = candidate
    return dataclasses.replace(row, settings=settings)


def _exclude_pattern(row: PlanRow) -> str:
    """Return the pattern that excluded the row, taken from the row's `rule`; without one, the exact name."""
    if row.reason == EXCLUDED and row.rule.startswith(_EXCLUDE) and row.rule.endswith('"'):
        return row.rule.removeprefix(_EXCLUDE)[:-1]
    return exact_pattern(row.name)


def _default(decided: Sequence[PlanRow]) -> Settings:
    products = Counter(_attention(row) for row in decided if row.site.is_product)
    attention = products.most_common(1)[0][0] if products else None
    layers = [row for row in decided if not row.site.is_product]
    inner = [row for row in layers if not (row.site.first or row.site.last)] or layers
    plain = [row for row in inner if not row.site.is_computed and not row.site.one_scale] or inner
    found = Counter(row.settings for row in plain if row.converted or row.reason == NO_BITS)
    common = next((s for s, _ in found.most_common() if s is not None), None)
    common = common or next((row.settings for row in decided if row.settings is not None), None) or Settings(8, 8)
    if found and found.most_common(1)[0][0] is None:
        common = common.replace(**_FLOAT)
    return common.replace(attention=attention)


def _attention(row: PlanRow) -> int | None:
    if row.settings is not None:
        return row.settings.attention
    return 1 if row.reason == ONE_BIT_PRODUCT else None


def _position(key: str, decided: Sequence[PlanRow], default: Settings) -> dict[str, Any] | None:
    """Return the changes that most first (or last) sites make to the default; None for float.

    They are empty if a site is both first and last.
    """
    rows = [row for row in decided if getattr(row.site, key) and not row.site.is_product]
    if any(row.reason == FLOAT_POSITION[key] for row in rows):
        return None
    if any(row.site.first and row.site.last for row in rows):
        return {}
    found = Counter(tuple(_differences(row, default).items()) for row in rows if row.converted)
    return dict(found.most_common(1)[0][0]) if found else {}


def _changes(row: PlanRow, default: Settings, ends: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Return the settings that a rule for this one site has to change; empty if it needs no rule."""
    base = default
    if not row.site.is_product:
        for key in ("first", "last"):
            if getattr(row.site, key):
                changes = ends[key]
                base = base.replace(**(_FLOAT if changes is None else changes))
    if row.converted:
        return _differences(row, base)
    if row.site.is_product:
        return {} if base.attention == _attention(row) else {"attention": _attention(row)}
    if row.reason == ONE_BIT_COMPUTED:
        return {} if base.w_bits == 1 else {"w_bits": 1}
    floats = any(getattr(row.site, key) and ends[key] is None for key in ends)
    if row.reason == NO_BITS and (floats or (base.w_bits, base.a_bits) != (None, None)):
        return dict(_FLOAT)
    return {}


def _differences(row: PlanRow, base: Settings) -> dict[str, Any]:
    settings = row.settings
    pairs = ((name, getattr(settings, name)) for name in settable(row.site))
    return {name: value for name, value in pairs if value != getattr(base, name)}


def _bits(row: PlanRow) -> tuple[int, int]:
    return (1, FLOAT_BITS) if row.reason == ONE_BIT_COMPUTED else row.bits


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
