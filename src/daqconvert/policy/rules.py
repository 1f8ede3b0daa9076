r"""Which layers a rule means, and how strongly.

A name rule holds one text, read in this order:

* the exact dotted name of a layer (`"layer4.0.conv1"`; the root module's name is `""`);
* `re:` and a regular expression that must match the whole name (`"re:layer[34]\..*"`);
* a glob: `*` is any text, **dots included** (`"layer4.*"` reaches `layer4.0.conv1`), `?` is one character,
  `[34]` one of these; upper and lower case differ.

A type rule holds the class name of the layer (`"Linear"`, `"Conv2d"`), compared as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import IntEnum
from fnmatch import fnmatchcase

from daqconvert.errors import PolicyError, nearest
from daqconvert.spec import Policy, Rule, Site

REGEX_PREFIX = "re:"


class Level(IntEnum):
    """How strongly something speaks about a layer; the higher wins, among equals the later."""

    DEFAULT = 0
    POSITION = 1
    TYPE = 2
    PATTERN = 3
    EXACT = 4


def check_pattern(pattern: str, where: str) -> str:
    """Return `pattern` if it can be matched against names.

    Args:
        pattern: An exact name, a glob, or `re:` and a regular expression.
        where: The place of the pattern, for the error.

    Raises:
        PolicyError: If the text after `re:` is no regular expression.

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
    """Return how strongly `pattern` speaks about the layer called `name`, or None if it does not.

    Args:
        pattern: An exact name, a glob, or `re:` and a regular expression.
        name: Dotted name of a layer.

    Example:
        >>> name_level("layer4.*", "layer4.0.conv1").name, name_level("fc", "fc").name, name_level("fc", "fc2")
        ('PATTERN', 'EXACT', None)
    """
    if pattern == name:
        return Level.EXACT
    if pattern.startswith(REGEX_PREFIX):
        return Level.PATTERN if re.fullmatch(pattern.removeprefix(REGEX_PREFIX), name) else None
    return Level.PATTERN if fnmatchcase(name, pattern) else None


def rule_level(rule: Rule, site: Site) -> Level | None:
    """Return how strongly `rule` speaks about `site`, or None if it does not.

    Args:
        rule: A rule with either `match` or `type`.
        site: A layer.

    Example:
        >>> rule_level(Rule({"w_bits": 2}, type="Linear"), Site("head", "Linear")).name
        'TYPE'
    """
    if rule.match is not None:
        return name_level(rule.match, site.name)
    return Level.TYPE if rule.type == site.kind else None


def label(rule: Rule) -> str:
    """Return what the rule looks for, as messages and plans show it.

    Example:
        >>> label(Rule({}, match="layer4.*")), label(Rule({}, type="Linear"))
        ('"layer4.*"', 'type "Linear"')
    """
    return f'"{rule.match}"' if rule.match is not None else f'type "{rule.type}"'


def check_matches(policy: Policy, sites: Sequence[Site]) -> None:
    """Refuse rules and exclude entries that have nothing to act on.

    Args:
        policy: A checked policy.
        sites: The layers of the model; where there are none nothing is refused, the caller has a better error.

    Raises:
        PolicyError: If a rule that is not optional matches no layer or only layers that cannot be converted, if it
            names such a layer exactly, or if an exclude entry matches no layer.
    """
    if not sites:
        return
    for number, rule in enumerate(policy.rules, start=1):
        if not rule.optional:
            _check_rule(rule, sites, f"{policy.name} rule {number}: {label(rule)}")
    for pattern in policy.exclude:
        if not any(name_level(pattern, site.name) is not None for site in sites):
            where = f'{policy.name} exclude: "{pattern}"'
            raise PolicyError(f"{where} matches no layer.{_name_hint(pattern, sites)} Fix the pattern or remove it.")


def _check_rule(rule: Rule, sites: Sequence[Site], where: str) -> None:
    levels = [(site, level) for site in sites if (level := rule_level(rule, site)) is not None]
    if not levels:
        hint = _type_hint(rule.type, sites) if rule.type is not None else _name_hint(rule.match or "", sites)
        raise PolicyError(
            f"{where} matches no layer.{hint} Fix the {'pattern' if rule.type is None else 'type'} "
            "or set optional = true."
        )
    for site, level in levels:
        if site.reason and level is Level.EXACT:
            raise PolicyError(f"{where} cannot be converted: {site.reason}. Remove the rule or set optional = true.")
    if all(site.reason for site, _ in levels):
        site = levels[0][0]
        raise PolicyError(
            f"{where} matches only layers that cannot be converted, as {site.name or '(root)'}: {site.reason}. "
            "Remove the rule or set optional = true."
        )


def _name_hint(pattern: str, sites: Iterable[Site]) -> str:
    names = [site.name for site in sites]
    inside = [name for name in names if name.startswith(pattern + ".")]
    if pattern and inside:
        return f' It is a module with {len(inside)} layer{"s" * (len(inside) > 1)} inside: write "{pattern}.*".'
    return nearest(pattern.removeprefix(REGEX_PREFIX), names)


def _type_hint(kind: str, sites: Iterable[Site]) -> str:
    kinds = sorted({site.kind for site in sites})
    return f" Types in this model: {', '.join(kinds)}.{nearest(kind, kinds)}"
