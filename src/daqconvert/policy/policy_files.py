"""Reading policies from TOML and from plain dicts; the format is described in `docs/policies.md`.

TOML has no None, so 32 bits mean "left in floating point" and `first = false` leaves first sites float; a dict may use
None for both. Reading is strict: unknown keys and wrong types are errors. `spec.toml` writes policies; plans are
written as JSON (`plan_json`).
"""

from __future__ import annotations

import dataclasses
import reprlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from daqconvert.errors import PolicyError, nearest
from daqconvert.policy.bits import bits_rules
from daqconvert.policy.checks import (
    check_target_changes,
    checked_changes,
    checked_include,
    checked_patterns,
    checked_rule,
)
from daqconvert.spec import SETTING_NAMES, Policy, Rule, Settings
from daqconvert.spec.targets import find_target

POLICY_KEYS = ("target", "default", "rule", "bits", "first", "last", "exclude", "include")
RULE_KEYS = ("match", "type", "optional")


def from_toml(source: str | Path) -> Policy:
    r"""Read a policy from a TOML file, or from TOML text.

    Args:
        source: A path, or text: a string is a path if it is one line that ends in `.toml` or contains no `=`.

    Raises:
        PolicyError: If the file cannot be read, is not TOML, or contains anything that does not belong to a policy;
            the message names the file, the number of the rule and the key.

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
        hint = (
            ' In [bits] a name that holds dots or stars stands in quotes: "layer4.*" = 2.' if "[bits]" in text else ""
        )
        raise PolicyError(f"{name} is not valid TOML: {error}.{hint}") from None
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
    """Return the policy that a dict of the same structure as a TOML file describes.

    Args:
        data: `{"default": {...}, "rule": [{"match": ..., ...}], "bits": {"layer4.*": 2}, "first": {...},
            "last": False, "exclude": [...], "include": [...], "target": "tensorrt"}`, each key optional. `bits` is
            applied after the rules.
        name: Where the dict comes from, for messages.

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
    default = _changes(data.get("default", {}), f"{name} [default]")
    target = data.get("target")
    if target is not None:
        check_target_changes(find_target(target, where=f"{name} target"), default, f"{name} [default]")
    return Policy(
        target=target,
        default=Settings(**default),
        rules=(
            *(rule_from_dict(rule, f"{name} rule {i}") for i, rule in enumerate(rules, start=1)),
            *bits_rules(data.get("bits", {}), f"{name} [bits]"),
        ),
        include=checked_include(data["include"], f"{name} include") if "include" in data else (),
        exclude=checked_patterns(data.get("exclude", []), f"{name} exclude"),
        name=name,
        **{key: _position(data[key], key, name) for key in ("first", "last") if key in data},
    )


def rule_from_dict(data: object, where: str) -> Rule:
    """Return the rule that one `[[rule]]` table describes; error messages name `where`.

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
    """Return `data`, which must be a table without any keys other than the `valid` ones."""
    if not isinstance(data, Mapping):
        raise PolicyError(f"{where}: expected a table; found {reprlib.repr(data)}.")
    for key in data:
        if key not in valid:
            close = nearest(key, valid) if isinstance(key, str) else ""
            raise PolicyError(f"{where}: unknown key {key!r}. Keys are: {', '.join(valid)}.{close}")
    return data
