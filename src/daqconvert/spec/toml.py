"""Policies as plain dicts and as TOML text: the writing side (`daqconvert.policy.policy_files` reads).

TOML has no None, so bits are written 32 for "left in floating point", and `first = false`, `attention = false`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from daqconvert.spec.row import FLOAT_BITS
from daqconvert.spec.settings import BIT_FIELDS, Policy, Rule

LONGEST_LIST = 100
"""Characters of a list on one line; the items of a longer one get a line each."""


def to_dict(policy: Policy) -> dict[str, Any]:
    """Return the policy as a dict that TOML and JSON can hold; `from_dict` reads it back.

    Args:
        policy: The policy; its `name` is not part of the dict.

    Example:
        >>> to_dict(Policy(first=None, rules=(Rule({"a_bits": None}, match="fc"),)))["rule"]
        [{'match': 'fc', 'a_bits': 32}]
    """
    data: dict[str, Any] = {"include": list(policy.include)} if policy.include else {}
    data["exclude"] = list(policy.exclude)
    data["default"] = _plain(dataclasses.asdict(policy.default))
    for key, changes in (("first", policy.first), ("last", policy.last)):
        data[key] = False if changes is None else _plain(changes)
    data["rule"] = [_rule_to_dict(rule) for rule in policy.rules]
    return data


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    key, text = ("match", rule.match) if rule.match is not None else ("type", rule.type)
    return {key: text, **({"optional": True} if rule.optional else {}), **_plain(rule.changes)}


def _plain(changes: Mapping[str, Any]) -> dict[str, Any]:
    none = {**dict.fromkeys(BIT_FIELDS, FLOAT_BITS), "attention": False}
    return {name: none[name] if value is None and name in none else value for name, value in changes.items()}


def to_toml(policy: Policy) -> str:
    """Return the policy as the text of a TOML file; `from_toml` reads it back.

    Args:
        policy: The policy; its `name` is not part of the text.

    Example:
        >>> print(to_toml(Policy(first=None, last=None)).splitlines()[:2])
        ['exclude = []', 'first = false']
    """
    data = to_dict(policy)
    tables = {key: data.pop(key) for key in ("default", "first", "last") if isinstance(data[key], dict)}
    rules = data.pop("rule")
    parts = ["\n".join(f"{key} = {toml_value(value)}" for key, value in data.items())]
    parts += [toml_table(f"[{key}]", table) for key, table in tables.items()]
    parts += [toml_table("[[rule]]", rule) for rule in rules]
    return "\n\n".join(parts) + "\n"


def toml_table(header: str, table: Mapping[str, Any], quoted: bool = False) -> str:
    """Return a table of a TOML file.

    Args:
        header: Its first line.
        table: Key -> value.
        quoted: Whether keys are written as texts, as names that hold dots must be.

    Example:
        >>> toml_table("[bits]", {"layer4.0": [2, 4]}, quoted=True).splitlines()
        ['[bits]', '"layer4.0" = [2, 4]']
    """
    lines = (f"{toml_value(key) if quoted else key} = {toml_value(value)}" for key, value in table.items())
    return "\n".join([header, *lines])


def toml_value(value: Any) -> str:
    """Return a text, number, truth value or list of these as TOML.

    Args:
        value: The value.

    Example:
        >>> toml_value(["a.*", True, 2])
        '["a.*", true, 2]'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, but TOML wants DEL escaped too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        items = list(map(toml_value, value))
        text = f"[{', '.join(items)}]"
        return text if len(text) <= LONGEST_LIST else "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    return repr(value)
