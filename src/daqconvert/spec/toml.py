"""Writing dicts as TOML, and policies as plain dicts and as TOML (`policy.policy_files` reads them).

TOML has no None, so None is written as 32 for bits, and as `false` for `first`, `last` and `attention`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from daqconvert.spec.row import FLOAT_BITS
from daqconvert.spec.settings import BIT_FIELDS, Policy, Rule

LONGEST_LIST = 100
"""A list of at most this many characters is on one line; the items of a longer list get a line each."""


def to_dict(policy: Policy) -> dict[str, Any]:
    """Return the policy, without its name, as a dict that TOML and JSON can hold; `from_dict` reads it back.

    Args:
        policy: Any policy.

    Example:
        >>> to_dict(Policy(first=None, rules=(Rule({"a_bits": None}, match="fc"),)))["rule"]
        [{'match': 'fc', 'a_bits': 32}]
    """
    data: dict[str, Any] = {} if policy.target is None else {"target": policy.target}
    data |= {"include": list(policy.include)} if policy.include else {}
    data["exclude"] = list(policy.exclude)
    data["default"] = _plain(dataclasses.asdict(policy.default))
    if policy.target is not None:  # which decides about both, and a file that contradicts it is refused
        del data["default"]["deploy"]
    if policy.target is not None or not policy.default.symmetric:
        del data["default"]["symmetric"]
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


def to_toml(policy: Policy, bits: Mapping[str, list[int]] | None = None) -> str:
    """Return the policy as the text of a TOML file; `from_toml` reads it back.

    Args:
        policy: The policy; its `name` is not part of the text.
        bits: Name of a layer -> `[w_bits, a_bits]`: rules that are written as the table `[bits]`.

    Example:
        >>> print(to_toml(Policy(first=None, last=None)).splitlines()[:2])
        ['exclude = []', 'first = false']
    """
    data = to_dict(policy)
    if not data["rule"]:
        del data["rule"]  # `rule = []` would have no effect
    return toml_text(data | ({"bits": dict(bits)} if bits else {}))


def toml_text(data: Mapping[str, Any]) -> str:
    """Return a dict as the text of a TOML file: values first, then tables.

    It is written by tomlkit, because tomlkit keeps `[2, 4]` on one line and puts each rule under `[[rule]]`, as a
    person would. The smaller package tomli-w writes each item of a list on its own line, so that the bits of one layer
    would take four lines.

    Example:
        >>> toml_text({"bits": {"layer4.0": [2, 4]}, "exclude": ["fc"]}).splitlines()
        ['exclude = ["fc"]', '', '[bits]', '"layer4.0" = [2, 4]']
    """
    import tomlkit  # imported here, because most callers never write a file

    document = tomlkit.document()
    for key, value in data.items():
        item = tomlkit.item(value)
        if isinstance(item, tomlkit.items.Array) and len(item.as_string()) > LONGEST_LIST:
            item.multiline(True)
        document.append(key, item)
    return document.as_string()
