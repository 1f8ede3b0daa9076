r"""Which layers a rule applies to, and with which precedence (`Level`).

A name rule (`match`) has one text. The first of these readings that fits is used:

* the exact dotted name of a layer (`"layer4.0.conv1"`; the root module's name is `""`);
* `re:` and a regular expression that must match the whole name (`"re:layer[34]\..*"`);
* a glob: `*` is any text, **dots included** (`"layer4.*"` reaches `layer4.0.conv1`), `?` is one character,
  `[34]` one of these; upper and lower case differ.

A type rule (`type`) has the class name of the layer (`"Linear"`, `"Conv2d"`), which must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from fnmatch import fnmatchcase

from daqconvert.errors import ROOT, PolicyError, nearest
from daqconvert.spec import Policy, Rule, Site
from daqconvert.spec.row import settable

REGEX_PREFIX = "re:"


class Level(IntEnum):
    """Precedence of what applies to a layer: the higher level wins; among equal levels the later wins."""

    DEFAULT = 0
    POSITION = 1
    TYPE = 2
    PATTERN = 3
    EXACT = 4


def check_pattern(pattern: str, where: str) -> str:
    """Return `pattern` unchanged if it is valid: a name, a glob, or `re:` and a regular expression.

    Raises:
        PolicyError: If the text after `re:` is not a regular expression.

    Example:
        >>> check_pattern("re:layer[34]", "rule 1")
        're:layer[34]'
    """
    if pattern.startswith(REGEX_PREFIX):
        try:
            re.compile(pattern.removeprefix(REGEX_PREFIX))
        except (re.error, OverflowError, RecursionError) as error:
            raise PolicyError(
                f'{where}: "{pattern}" is no regular expression ({error}). '
                f'Fix the text after "{REGEX_PREFIX}", or leave the prefix out to write a glob.'
            ) from None
    return pattern


def name_level(pattern: str, name: str) -> Level | None:
    """Return the level at which `pattern` applies to the layer called `name`, or None if it does not apply.

    Example:
        >>> name_level("layer4.*", "layer4.0.conv1").name, name_level("fc", "fc").name, name_level("fc", "fc2")
        ('PATTERN', 'EXACT', None)
        >>> name_level("(root)", "").name  # a layer that is the model itself
        'EXACT'
    """
    if pattern == name or (pattern == ROOT and not name):
        return Level.EXACT
    if pattern.startswith(REGEX_PREFIX):
        return Level.PATTERN if re.fullmatch(pattern.removeprefix(REGEX_PREFIX), name) else None
    return Level.PATTERN if fnmatchcase(name, pattern) else None


def rule_level(rule: Rule, site: Site) -> Level | None:
    """Return the level at which `rule`, which has either `match` or `type`, applies to a site; None if it does not.

    Example:
        >>> rule_level(Rule({"w_bits": 2}, type="Linear"), Site("head", "Linear")).name
        'TYPE'
    """
    if rule.match is not None:
        return name_level(rule.match, site.name)
    return Level.TYPE if rule.type == site.kind else None


def is_name(pattern: str) -> bool:
    """Return whether a pattern is a plain name, which matches only the layer with exactly this name.

    Example:
        >>> is_name("layer4.0.conv1"), is_name("layer4.*"), is_name("re:fc")
        (True, False, False)
    """
    return not pattern.startswith(REGEX_PREFIX) and not any(special in pattern for special in "*?[")


class Matcher:
    """Finds the rules of a policy that apply to a layer; rules with a plain name are looked up by the name.

    A plan that was written as a policy has a rule for each layer, and testing each rule against each layer would take
    quadratic time.

    Example:
        >>> matcher = Matcher((Rule({"w_bits": 2}, match="layer4.*"), Rule({"w_bits": 3}, match="fc")))
        >>> [(place, level.name) for place, _, level in matcher.about(Site("fc", "Linear"))]
        [('rule 2', 'EXACT')]
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._places = tuple(places(rules))
        self._named: dict[str, list[int]] = {}
        self._others: list[int] = []
        for number, (_, rule) in enumerate(self._places):
            if rule.match is not None and is_name(rule.match):
                self._named.setdefault(rule.match, []).append(number)
            else:
                self._others.append(number)

    @classmethod
    def of_patterns(cls, patterns: Iterable[str]) -> Matcher:
        """Return a matcher for names and patterns without settings, as in `include` and `exclude`."""
        return cls(Rule({}, match=pattern) for pattern in patterns)

    def about(self, site: Site) -> Iterator[tuple[str, Rule, Level]]:
        """Yield the rules that apply to a layer, in order: the rule's place, the rule and its level."""
        also = () if site.name else self._named.get(ROOT, ())
        for number in sorted((*self._named.get(site.name, ()), *also, *self._others)):
            place, rule = self._places[number]
            level = rule_level(rule, site)
            if level is not None:
                yield place, rule, level


def label(rule: Rule) -> str:
    """Return the name, pattern or type of a rule as messages and plans show it.

    Example:
        >>> label(Rule({}, match="layer4.*")), label(Rule({}, type="Linear"))
        ('"layer4.*"', 'type "Linear"')
    """
    return f'"{rule.match}"' if rule.match is not None else f'type "{rule.type}"'


def places(rules: Iterable[Rule]) -> Iterator[tuple[str, Rule]]:
    """Yield pairs of a rule's place, as messages and plans name it (`rule 1`, `rule 2`, or `bits`), and the rule.

    Example:
        >>> [place for place, _ in places((Rule({}, "a"), Rule({}, "b", place="bits"), Rule({}, "c")))]
        ['rule 1', 'bits', 'rule 2']
    """
    number = 0
    for rule in rules:
        number += not _place(rule)
        yield _place(rule) or f"rule {number}", rule


def _place(rule: object) -> str:
    return rule.place if isinstance(rule, Rule) else ""  # `checks` refuses anything else later


def check_matches(policy: Policy, sites: Sequence[Site]) -> None:
    """Raise for rules, and for entries of `include` and `exclude`, that have no effect on the sites.

    If the model has no sites, nothing is raised, because the caller reports this with a better message.

    Raises:
        PolicyError: If a rule that is not optional matches no layer or only layers that cannot be converted; if its
            `match` is the exact name of such a layer; if it sets only what the layers that it matches do not take
            (`attention` of a layer, `w_bits` of an attention product); if an include or exclude entry matches no
            layer; or if an include entry matches only layers that cannot be converted.
    """
    if not sites:
        return
    named: dict[str, list[Site]] = {}
    for site in sites:
        for name in {site.name, site.name or ROOT}:
            named.setdefault(name, []).append(site)
    for place, rule in places(policy.rules):
        if not rule.optional:
            _check_rule(rule, sites, named, f"{policy.name} {place}: {label(rule)}")
    for key, patterns in (("include", policy.include), ("exclude", policy.exclude)):
        for pattern in patterns:
            possible = named.get(pattern, ()) if is_name(pattern) else sites
            matched = [site for site in possible if name_level(pattern, site.name) is not None]
            where = f'{policy.name} {key}: "{pattern}"'
            if not matched:
                hint = _name_hint(pattern, sites)
                raise PolicyError(f"{where} matches no layer.{hint} Fix the pattern or remove it.")
            if key == "include" and all(site.reason for site in matched):
                raise PolicyError(
                    f"{where} matches only layers that cannot be converted, as {matched[0].name or '(root)'}: "
                    f"{matched[0].reason}. Remove it."
                )


def _check_rule(rule: Rule, sites: Sequence[Site], named: Mapping[str, Sequence[Site]], where: str) -> None:
    possible = named.get(rule.match, ()) if rule.match is not None and is_name(rule.match) else sites
    levels = [(site, level) for site in possible if (level := rule_level(rule, site)) is not None]
    if not levels:
        hint = _type_hint(rule.type, sites) if rule.type is not None else _name_hint(rule.match or "", sites)
        raise PolicyError(
            f"{where} matches no layer.{hint} Fix the {'pattern' if rule.type is None else 'type'}"
            f"{_optional(rule, ' or leave it out')}."
        )
    for site, level in levels:
        if site.reason and level is Level.EXACT:
            raise PolicyError(f"{where} cannot be converted: {site.reason}. {_drop(rule)}.")
    if all(site.reason for site, _ in levels):
        site = levels[0][0]
        raise PolicyError(
            f"{where} matches only layers that cannot be converted, as {site.name or '(root)'}: {site.reason}. "
            f"{_drop(rule)}."
        )
    _check_effect(rule, [site for site, _ in levels if not site.reason], where)


def _check_effect(rule: Rule, sites: Sequence[Site], where: str) -> None:
    """Raise for a rule whose settings none of the layers that it matches takes."""
    if not rule.changes or any(name in settable(site) for site in sites for name in rule.changes):
        return
    names = ", ".join(rule.changes)
    if any(site.is_product for site in sites) and "attention" not in rule.changes:
        raise PolicyError(
            f"{where} sets {names} of an attention product ({sites[0].name}), whose bits are one setting. "
            "Write attention = 8."
        )
    raise PolicyError(
        f"{where} sets {names}, which {sites[0].name or '(root)'} ({sites[0].kind}) does not take. {_drop(rule)}."
    )


def _drop(rule: Rule) -> str:
    """Return how to get rid of a rule that has no effect."""
    return f"Remove the entry of {rule.place}" if rule.place else f"Remove the rule{_optional(rule)}"


def _optional(rule: Rule, other: str = "") -> str:
    """Return the words for `optional = true`; an entry of `bits` has no place for it, and gets the other words."""
    return other if rule.place else " or set optional = true"


def _name_hint(pattern: str, sites: Iterable[Site]) -> str:
    names = [site.name or ROOT for site in sites]
    inside = [name for name in names if name.startswith(pattern + ".")]
    if pattern and inside:
        return f' It is a module with {len(inside)} layer{"s" * (len(inside) > 1)} inside: write "{pattern}.*".'
    return nearest(pattern.removeprefix(REGEX_PREFIX), names)


def _type_hint(kind: str, sites: Iterable[Site]) -> str:
    kinds = sorted({site.kind for site in sites})
    return f" Types in this model: {', '.join(kinds)}.{nearest(kind, kinds)}"
