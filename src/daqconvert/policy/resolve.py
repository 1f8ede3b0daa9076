"""Making a `Plan` from a `Policy` and the sites of a model.

Precedence: exact name > pattern > type > position (last over first) > default. Among rules of equal precedence the
later wins. `exclude` overrides all of them, and then `include`. Everything that applies to a site is applied from the
weakest to the strongest, setting by setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from daqconvert.policy.checks import checked_policy
from daqconvert.policy.output_rows import check_held, decided, signed_row, with_outputs
from daqconvert.policy.presets import is_paper
from daqconvert.policy.rules import Level, Matcher, check_matches, label
from daqconvert.spec import BIT_FIELDS, Concat, Plan, PlanRow, Policy, Settings, Site, SiteOutput, input_groups
from daqconvert.spec.auto import check_lsq_bits, resolve_auto, resolve_computed
from daqconvert.spec.row import (
    EXCLUDED,
    FLOAT_POSITION,
    NO_BITS,
    NOT_INCLUDED,
    ONE_BIT_COMPUTED,
    ONE_BIT_PRODUCT,
    PRODUCT_OFF,
    settable,
)

EXACT_SUM = 2**24
"""The largest integer up to which float32 represents every integer exactly."""

SUM_NOTE = "sums may pass 2**24: layouts and batch sizes may differ in the last bit"
PAPER_NOTE = "departs from the paper: input may be negative, signed if calibrate sees negative values"
ONE_BIT_NOTE = "a 1-bit input must be non-negative: not proven here, calibrate checks"
COMPUTED_NOTE = "its weight is computed from the input: quantized per tensor as it comes"


class _Step(NamedTuple):
    """A default, position or rule that applies to a site: its strength, its name in the plan, what it changes.

    `reason` is why the site is left in float, if the step does that.
    """

    level: Level
    label: str
    changes: Mapping[str, Any]
    reason: str = ""


def resolve(
    policy: Policy,
    sites: Sequence[Site],
    *,
    model: str,
    order: str,
    other_params: int,
    input_size: tuple[int, ...] | None,
    sums: Sequence[SiteOutput] = (),
    concats: Sequence[Concat] = (),
    operators: Sequence[SiteOutput] = (),
) -> Plan:
    """Return the plan of a policy for the sites of one model; nothing is converted.

    Args:
        policy: The rules.
        sites: The sites of the model, in the order of the rows of the plan.
        model: Class name of the model.
        order: `"fx"` or `"modules"`: the source of the sites' order, first, last and signs.
        other_params: Number of elements of the parameters and buffers outside the sites.
        input_size: Size of the example input that the sites' MACs were counted with; None if they were not.
        sums: Sums of outputs of the sites.
        concats: Outputs of the sites that are concatenated.
        operators: Outputs of operators between the sites.

    Returns:
        A plan with a row for each site and for each output quantizer that `deploy="integer"` adds; without sites it is
        empty.

    Raises:
        PolicyError: If the policy is malformed, a rule or exclude entry matches no layer or names one that cannot
            be converted, or the settings of a layer contradict each other or the target.

    Example:
        >>> sites = [Site("stem", "Conv2d", first=True), Site("fc", "Linear", nonnegative=True)]
        >>> plan = resolve(Policy(), sites, model="Net", order="fx", other_params=0, input_size=None)
        >>> [(row.name, row.rule, row.input_text) for row in plan]
        [('stem', 'first', '8 (calibrate decides)'), ('fc', 'default', '8 unsigned')]
    """
    policy = decided(checked_policy(policy))
    check_matches(policy, sites)
    matchers = _Matchers.of(policy)
    rows = _finished(policy, [_row(policy, matchers, site) for site in sites])
    rows = with_outputs(policy, rows, sums, concats, operators)
    return Plan(
        rows, model, order=order, other_params=other_params, input_size=input_size, policy=policy.name,
        target=policy.target,
    )  # fmt: skip


class _Matchers(NamedTuple):
    """Matchers for the rules, `include` and `exclude` of a policy."""

    rules: Matcher
    include: Matcher
    exclude: Matcher

    @classmethod
    def of(cls, policy: Policy) -> _Matchers:
        return cls(Matcher(policy.rules), Matcher.of_patterns(policy.include), Matcher.of_patterns(policy.exclude))


def _row(policy: Policy, matchers: _Matchers, site: Site) -> PlanRow:
    """Return the row of one site; `_finished` adds what depends on other sites (sign, remarks)."""
    if site.reason:
        return PlanRow(site, None, "-", reason=site.reason, notes=site.notes)
    excluded = [rule for _, rule, _ in matchers.exclude.about(site)]
    if excluded:
        return PlanRow(site, None, f"exclude: {label(excluded[-1])}", reason=EXCLUDED, notes=site.notes)
    if policy.include and not any(matchers.include.about(site)):
        return PlanRow(site, None, "include", reason=NOT_INCLUDED, notes=site.notes)
    steps = _steps(policy, matchers.rules, site)
    setter = {name: step for step in steps for name in step.changes}
    merged = policy.default.replace(**{name: step.changes[name] for name, step in setter.items()})
    reason, deciding = _why_not(site, merged)
    if reason:
        decider = max((setter.get(name, steps[0]) for name in deciding), key=steps.index)
        reason = decider.reason if reason == NO_BITS and decider.reason else reason
        return PlanRow(site, None, decider.label, reason=reason, notes=site.notes)
    where = f"{policy.name}: layer {site.name or '(root)'} ({steps[-1].label})"
    settings = _settled(site, merged, where)
    if policy.target is not None:
        check_held(site, settings, policy.target, where)
    return PlanRow(site, settings, steps[-1].label, notes=site.notes)


def _why_not(site: Site, merged: Settings) -> tuple[str, tuple[str, ...]]:
    """Return why the settings leave a site in float (empty if they do not), and the names of the deciding settings."""
    if site.is_product:
        if merged.attention is None:
            return PRODUCT_OFF, ("attention",)
        one_bit = merged.attention == 1 and not site.nonnegative
        return (ONE_BIT_PRODUCT if one_bit else ""), ("attention",)
    if merged.w_bits is None and merged.a_bits is None:
        return NO_BITS, BIT_FIELDS
    one_bit = site.is_computed and merged.w_bits == 1
    return (ONE_BIT_COMPUTED if one_bit else ""), ("w_bits",)


def _settled(site: Site, merged: Settings, where: str) -> Settings:
    """Return a site's settings with nothing left on `"auto"`."""
    if site.is_product:
        bits = dict.fromkeys(BIT_FIELDS, merged.attention)
        merged = merged.replace(**bits, share_inputs=False, deploy="float")
        check_lsq_bits(merged, where)
        return resolve_computed(merged)
    merged = merged.replace(attention=None)
    if site.is_computed:
        check_lsq_bits(merged, where)
        return resolve_computed(merged)
    settings = resolve_auto(merged, where)
    return settings.replace(granularity="tensor") if site.one_scale else settings


def _finished(policy: Policy, rows: Sequence[PlanRow]) -> tuple[PlanRow, ...]:
    """Return the rows with signs and remarks; a shared input is unsigned only if this is proven for all its sites."""
    groups = input_groups(rows)
    unproven = {groups.get(row.name, row.name) for row in rows if row.converted and not row.site.nonnegative}
    done = []
    for row in rows:
        if row.settings is not None:
            nonnegative = groups.get(row.name, row.name) not in unproven
            notes = row.notes + _notes(policy, row.site, row.settings, nonnegative)
            if row.name in groups:
                notes += (f"shares the input quantizer of {groups[row.name] or '(root)'}",)
            row = signed_row(dataclasses.replace(row, notes=notes), nonnegative)
        done.append(row)
    return tuple(done)


def _steps(policy: Policy, rules: Matcher, site: Site) -> list[_Step]:
    """Return all steps that apply to a site, the weakest first; the default comes first and changes nothing."""
    steps = [_Step(Level.DEFAULT, "default", {})]
    if site.first and not site.is_product:
        steps.append(_position("first", policy.first))
    if site.last and not site.is_product:
        steps.append(_position("last", policy.last))
    taken = settable(site)
    for place, rule, level in rules.about(site):
        if any(name in taken for name in rule.changes):
            steps.append(_Step(level, f"{place}: {label(rule)}", rule.changes))
    return sorted(steps, key=lambda step: step.level)  # stable, so that among equals the later wins


def _position(name: str, changes: Mapping[str, Any] | None) -> _Step:
    if changes is None:
        return _Step(Level.POSITION, name, dict.fromkeys(BIT_FIELDS), FLOAT_POSITION[name])
    return _Step(Level.POSITION, name, changes)


def _notes(policy: Policy, site: Site, settings: Settings, nonnegative: bool) -> tuple[str, ...]:
    notes = []
    if site.is_computed and not site.is_product:
        notes.append(COMPUTED_NOTE)
    if site.one_scale:
        notes.append(site.one_scale)
    if largest_sum(site, settings) >= EXACT_SUM:
        notes.append(SUM_NOTE)
    if settings.a_bits is not None and not nonnegative:
        if is_paper(policy.name):
            notes.append(PAPER_NOTE)
        if settings.a_bits == 1:
            notes.append(ONE_BIT_NOTE)
    return tuple(notes)


def largest_sum(site: Site, settings: Settings) -> int:
    """Return the largest absolute value that a site's sum of integer products can reach; 0 if an operand is float.

    It is `reduction * (2**a_bits - 1) * w`, with `w = 2**w_bits - 1` on the mid-rise grid, `2**(w_bits - 1) - 1` on
    the integer grid, `2**(w_bits - 1)` on the grid of LSQ, and `2**w_bits - 1` if the second operand is computed from
    the model's input. The settings must have nothing left on `"auto"`.

    Example:
        >>> largest_sum(Site("fc", "Linear", reduction=10), resolve_auto(Settings(w_bits=8, a_bits=8)))
        323850
    """
    if settings.w_bits is None or settings.a_bits is None:
        return 0
    weight_bits = settings.w_bits if settings.grid == "midrise" or site.is_computed else settings.w_bits - 1
    largest = 2**weight_bits - (settings.grid != "twos")
    return int(site.reduction * (2**settings.a_bits - 1) * largest)
