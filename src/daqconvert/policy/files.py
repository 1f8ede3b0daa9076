"""Policies as TOML and as plain dicts; the format is described in `docs/policies.md`.

TOML has no None, so bits are written 32 for "left in floating point" and `first = false` leaves first sites float;
a dict may use None for both. What is read is never trusted: unknown keys and wrong types are errors.
(Plans have their own form, JSON, in `plan_json`.)
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from daqconvert.errors import PolicyError, nearest
from daqconvert.policy.checks import checked_changes, checked_patterns, checked_rule
from daqconvert.policy.plan_json import plan_from_dict as plan_from_dict
from daqconvert.policy.plan_json import plan_to_dict as plan_to_dict
from daqconvert.spec import BIT_FIELDS, SETTING_NAMES, Policy, Rule, Settings

POLICY_KEYS = ("default", "rule", "first", "last", "exclude")
RULE_KEYS = ("match", "type", "optional")
FLOAT_BITS = 32


def from_toml(source: str | Path) -> Policy:
    r"""Read a policy from a TOML file, or from TOML text.

    Args:
        source: A path, or text: a string is a path if it is one line that ends in `.toml` or holds no `=`.

    Raises:
        PolicyError: If the file cannot be read, is no TOML, or holds anything that is no policy; names the file, the
            rule's number and the key.

    Example:
        >>> from_toml('[default]\nw_bits = 4\n').default.w_bits
        4
    """
    if isinstance(source, str) and not _is_path(source):
        name, text = "policy text", source
    else:
        name, text = str(source), _read(Path(source))
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{name} is not valid TOML: {error}.") from None
    policy = from_dict(data, name=name)
    return policy if name == "policy text" else dataclasses.replace(policy, name=Path(source).name)


def _is_path(source: str) -> bool:
    return "\n" not in source and (source.endswith(".toml") or "=" not in source)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PolicyError(f"{path} does not exist. Write the policy there, or give another path.") from None
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PolicyError(f"{path} cannot be read: {found}.") from None


def from_dict(data: Mapping[str, Any], name: str = "dict") -> Policy:
    """Return the policy that a dict of the TOML file's shape describes.

    Args:
        data: `{"default": {...}, "rule": [{"match": ..., ...}], "first": {...}, "last": False, "exclude": [...]}`,
            each key optional.
        name: Where it comes from, for messages.

    Raises:
        PolicyError: For an unknown key, a wrong type, a rule with both or neither of match and type, or a setting
            that cannot take its value.

    Example:
        >>> from_dict({"rule": [{"type": "Linear", "w_bits": 2}], "first": False}).rules[0].changes
        {'w_bits': 2}
    """
    data = _table(data, POLICY_KEYS, name)
    rules = data.get("rule", [])
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise PolicyError(f"{name} rule: expected a list of tables, each under [[rule]]; found {reprlib.repr(rules)}.")
    return Policy(
        default=Settings(**_changes(data.get("default", {}), f"{name} [default]")),
        rules=tuple(rule_from_dict(rule, f"{name} rule {i}") for i, rule in enumerate(rules, start=1)),
        exclude=checked_patterns(data.get("exclude", []), f"{name} exclude"),
        name=name,
        **{key: _position(data[key], key, name) for key in ("first", "last") if key in data},
    )


def rule_from_dict(data: object, where: str) -> Rule:
    """Return the rule that one `[[rule]]` table describes.

    Args:
        data: `match` or `type`, `optional` if wanted, and the settings to change.
        where: The place, for the error.

    Raises:
        PolicyError: For an unknown key, a wrong type, both or neither of match and type, or an impossible value.

    Example:
        >>> rule_from_dict({"match": "layer4.*", "w_bits": 2}, "rule 1").match
        'layer4.*'
    """
    table = _table(data, (*RULE_KEYS, *SETTING_NAMES), where)
    for key in ("match", "type"):
        if key in table and not isinstance(table[key], str):
            raise PolicyError(f"{where}: {key}: expected a text; found {reprlib.repr(table[key])}.")
    changes = {key: value for key, value in table.items() if key not in RULE_KEYS}
    return checked_rule(Rule(changes, **{key: table[key] for key in RULE_KEYS if key in table}), where)


def _position(value: object, key: str, name: str) -> dict[str, Any] | None:
    if value is None or value is False:
        return None
    if not isinstance(value, Mapping):
        raise PolicyError(
            f"{name} {key}: expected a table [{key}] of settings, or {key} = false for floating point; "
            f"found {reprlib.repr(value)}."
        )
    return _changes(value, f"{name} [{key}]")


def _changes(data: object, where: str) -> dict[str, Any]:
    return checked_changes(_table(data, SETTING_NAMES, where), where)


def _table(data: object, valid: Iterable[str], where: str) -> Mapping[str, Any]:
    """Return `data`, which must be a table with no other keys than `valid`."""
    if not isinstance(data, Mapping):
        raise PolicyError(f"{where}: expected a table; found {reprlib.repr(data)}.")
    for key in data:
        if key not in valid:
            close = nearest(key, valid) if isinstance(key, str) else ""
            raise PolicyError(f"{where}: unknown key {key!r}. Keys are: {', '.join(valid)}.{close}")
    return data


def to_dict(policy: Policy) -> dict[str, Any]:
    """Return the policy as a dict that TOML and JSON can hold; `from_dict` reads it back.

    Args:
        policy: The policy; its `name` is not part of the dict.

    Example:
        >>> to_dict(Policy(first=None, rules=(Rule({"a_bits": None}, match="fc"),)))["rule"]
        [{'match': 'fc', 'a_bits': 32}]
    """
    data: dict[str, Any] = {"exclude": list(policy.exclude)}
    for key, changes in (("first", policy.first), ("last", policy.last)):
        data[key] = False if changes is None else _plain(changes)
    data["default"] = _plain(dataclasses.asdict(policy.default))
    data["rule"] = [_rule_to_dict(rule) for rule in policy.rules]
    return data


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    key, text = ("match", rule.match) if rule.match is not None else ("type", rule.type)
    return {key: text, **({"optional": True} if rule.optional else {}), **_plain(rule.changes)}


def _plain(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: FLOAT_BITS if value is None and name in BIT_FIELDS else value for name, value in changes.items()}


def to_toml(policy: Policy) -> str:
    """Return the policy as the text of a TOML file; `from_toml` reads it back.

    Args:
        policy: The policy; its `name` is not part of the text.

    Example:
        >>> print(to_toml(Policy(first=None, last=None)).splitlines()[:2])
        ['exclude = []', 'first = false']
    """
    data = to_dict(policy)
    tables = {key: data.pop(key) for key in ("first", "last", "default") if isinstance(data[key], dict)}
    rules = data.pop("rule")
    parts = ["\n".join(f"{key} = {_toml(value)}" for key, value in data.items())]
    parts += [_write_table(f"[{key}]", table) for key, table in tables.items()]
    parts += [_write_table("[[rule]]", rule) for rule in rules]
    return "\n\n".join(parts) + "\n"


def _write_table(header: str, table: Mapping[str, Any]) -> str:
    return "\n".join([header, *(f"{key} = {_toml(value)}" for key, value in table.items())])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, but TOML wants DEL escaped too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
