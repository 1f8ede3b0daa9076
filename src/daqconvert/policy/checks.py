"""Checks of the parts of a policy, the same for policies written in Python and policies read from a file.

Each function returns the part as it is stored. `where` is the place that error messages name, such as
`policy.toml rule 3` or `arguments [first]`.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from daqconvert.errors import PolicyError
from daqconvert.policy.presets import is_paper
from daqconvert.policy.rules import check_pattern, label, places
from daqconvert.spec import Policy, Rule, Settings, check_setting
from daqconvert.spec.targets import Target, find_target


def checked_changes(changes: object, where: str) -> dict[str, Any]:
    """Return settings to change (setting name -> value), each as `Settings` stores it.

    Raises:
        PolicyError: If `changes` is not a mapping, a name is not a setting, or a setting cannot take its value.

    Example:
        >>> checked_changes({"w_bits": 32, "w_gamma": 3}, "[default]")
        {'w_bits': None, 'w_gamma': 3.0}
    """
    if not isinstance(changes, Mapping):
        raise PolicyError(f"{where}: expected settings such as w_bits = 4; found {reprlib.repr(changes)}.")
    checked = {}
    for name, value in changes.items():
        if not isinstance(name, str):
            raise PolicyError(f"{where}: expected the name of a setting; found {reprlib.repr(name)}.")
        try:
            checked[name] = check_setting(name, value)
        except PolicyError as error:
            raise PolicyError(f"{where}: {error}") from None
    return checked


def checked_rule(rule: object, where: str) -> Rule:
    """Return a rule whose parts fit together.

    Raises:
        PolicyError: If `rule` is not a `Rule`, has both `match` and `type` or neither, if the one it has is not a text
            or is a bad regular expression, if `optional` is not a bool, or if the rule changes nothing or changes a
            setting to an impossible value.
    """
    if not isinstance(rule, Rule):
        raise PolicyError(f"{where}: expected a Rule; found {reprlib.repr(rule)}.")
    if (rule.match is None) == (rule.type is None):
        found = "neither" if rule.match is None else f'match = "{rule.match}" and type = "{rule.type}"'
        raise PolicyError(f"{where}: expected either match (a name or pattern) or type (a class name); found {found}.")
    key, text = ("match", rule.match) if rule.type is None else ("type", rule.type)
    if not isinstance(text, str):
        raise PolicyError(f"{where}: {key}: expected a text; found {reprlib.repr(text)}.")
    if not isinstance(rule.optional, bool):
        raise PolicyError(f"{where}: optional: expected true or false; found {reprlib.repr(rule.optional)}.")
    if key == "match":
        check_pattern(text, where)
    changes = checked_changes(rule.changes, where)
    if not changes:
        raise PolicyError(f"{where}: {label(rule)} changes nothing. Add a setting such as w_bits = 4, or remove it.")
    return dataclasses.replace(rule, changes=changes)


def checked_position(value: object, where: str) -> dict[str, Any] | None:
    """Return the settings to change for first or last sites, or None to leave them float.

    Raises:
        PolicyError: If `value` is neither None nor a mapping, or contains an unknown or impossible setting.
    """
    return None if value is None else checked_changes(value, where)


def checked_patterns(patterns: object, where: str) -> tuple[str, ...]:
    """Return a list of names and patterns of layers as a tuple.

    Raises:
        PolicyError: If `patterns` is not a list or tuple of texts, or one of them is a bad regular expression.
    """
    if not isinstance(patterns, Sequence) or isinstance(patterns, (str, bytes)):
        raise PolicyError(f'{where}: expected a list of names such as ["head"]; found {reprlib.repr(patterns)}.')
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PolicyError(f"{where}: expected a name or pattern; found {reprlib.repr(pattern)}.")
    return tuple(check_pattern(pattern, where) for pattern in patterns)


def checked_include(patterns: object, where: str) -> tuple[str, ...]:
    """Return names and patterns of the only layers to convert, given as a list or a single text, as a tuple.

    Raises:
        PolicyError: If `patterns` is neither, is empty, or contains a bad regular expression.

    Example:
        >>> checked_include("layer4.*", "arguments include")
        ('layer4.*',)
    """
    checked = checked_patterns([patterns] if isinstance(patterns, str) else patterns, where)
    if not checked:
        raise PolicyError(
            f"{where}: an empty list would convert nothing. Name a layer, or leave it out to convert all."
        )
    return checked


def checked_policy(policy: Policy) -> Policy:
    """Return the policy with every part checked, and its values as `Settings` stores them.

    Raises:
        PolicyError: If any part of it is malformed; the message names the part.

    Example:
        >>> checked_policy(Policy(rules=(Rule({"w_bits": 32}, match="fc"),))).rules[0].changes
        {'w_bits': None}
    """
    name = policy.name
    if not isinstance(policy.default, Settings):
        raise PolicyError(f"{name} [default]: expected Settings; found {reprlib.repr(policy.default)}.")
    checked = Policy(
        default=policy.default,
        rules=tuple(checked_rule(rule, f"{name} {place}") for place, rule in places(policy.rules)),
        first=checked_position(policy.first, f"{name} [first]"),
        last=checked_position(policy.last, f"{name} [last]"),
        exclude=checked_patterns(policy.exclude, f"{name} exclude"),
        include=checked_patterns(policy.include, f"{name} include"),
        target=policy.target,
        name=name,
    )
    if checked.target is not None:
        _check_target(checked, find_target(checked.target, where=f"{name} target"))
    return checked


def _check_target(policy: Policy, target: Target) -> None:
    """Raise if a part of a policy contradicts its target."""
    if is_paper(policy.name):
        raise PolicyError(
            f"{policy.name}: a preset of the paper leaves everything between the layers in float, and target = "
            f'"{target.name}" needs codes there. Leave one out: w_bits = 4, a_bits = 4 beside the target, for example.'
        )
    for place, rule in places(policy.rules):
        check_target_changes(target, rule.changes, f"{policy.name} {place}: {label(rule)}")
    for place, changes in (("first", policy.first), ("last", policy.last)):
        check_target_changes(target, changes or {}, f"{policy.name} [{place}]")


def check_target_changes(target: Target, changes: Mapping[str, Any], where: str) -> None:
    """Raise if settings that are written somewhere contradict a target.

    Raises:
        PolicyError: If `deploy` is `"float"`, or `symmetric` is False for a target that needs it.
    """
    if changes.get("deploy") == "float":
        raise PolicyError(
            f'{where}: deploy = "float" contradicts target = "{target.name}", which stands for deploy = "integer". '
            "Remove one of them; exclude = [...] leaves a layer in float altogether."
        )
    if target.symmetric and changes.get("symmetric") is False:
        raise PolicyError(
            f'{where}: symmetric = false contradicts target = "{target.name}", which has no zero points. Remove it.'
        )
