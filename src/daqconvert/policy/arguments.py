"""Making a `Policy` from the keyword arguments of `quantize` and `plan`."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from daqconvert.errors import PolicyError
from daqconvert.policy.bits import bits_rules
from daqconvert.policy.checks import (
    check_target_changes,
    checked_changes,
    checked_include,
    checked_patterns,
    checked_policy,
    checked_position,
    checked_rule,
)
from daqconvert.policy.policy_files import from_dict, from_toml, rule_from_dict
from daqconvert.policy.presets import preset as preset_policy
from daqconvert.policy.presets import preset_names
from daqconvert.spec import BIT_FIELDS, Policy, Rule
from daqconvert.spec.targets import find_target


class Unset(Enum):
    """The type of `UNSET`, so that type checkers can tell it from None."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return self.name


UNSET = Unset.UNSET
"""Default of arguments for which None has another meaning: the caller gave no value."""

Position = Mapping[str, Any] | Sequence[int | None] | None
"""How first or last sites are quantized: None leaves them float, `(w_bits, a_bits)`, or a dict of settings."""


def build(
    policy: Policy | str | Path | Mapping[str, Any] | None = None,
    preset: str | None = None,
    first: Position | Unset = UNSET,
    last: Position | Unset = UNSET,
    exclude: str | Sequence[str] = (),
    rules: Rule | Mapping[str, Any] | Sequence[Rule | Mapping[str, Any]] = (),
    include: str | Sequence[str] | None = None,
    bits: Mapping[str, Any] | None = None,
    target: str | None = None,
    **settings: Any,
) -> Policy:
    """Return the policy that these arguments ask for.

    Args:
        policy: A `Policy`, the path of a `.toml` file, or a dict of the same structure as the file.
        preset: Name of a preset, instead of `policy`.
        first: Replaces the policy's `first`: None leaves first sites float, `(w_bits, a_bits)`, or a dict of settings.
        last: Replaces the policy's `last`, in the same forms.
        exclude: Names or patterns of layers to leave in float, in addition to the policy's; a single one may be a
            string.
        rules: Rules that are added after the policy's, each a `Rule` or a dict like one `[[rule]]` table; a single one
            needs no list.
        include: Names or patterns of the only layers to convert, instead of the policy's; None keeps the policy's.
        bits: Name or pattern -> bits of weight and input (one number), `(w_bits, a_bits)`, or None for float; these
            become rules after all others.
        target: Name of the runtime to quantize for, instead of the policy's; None keeps the policy's.
        **settings: Fields of `Settings`, which override the policy's `[default]`; a field with value `UNSET` does not.

    Raises:
        PolicyError: If policy and preset are both given, or any part cannot be understood.

    Example:
        >>> asked = build(preset="paper-w1a1", rounding="ste", first=(8, None))
        >>> asked.name, asked.default.rounding, asked.first
        ('paper-w1a1 + arguments', 'ste', {'w_bits': 8, 'a_bits': None})
    """
    base = _base(policy, preset)
    changes: dict[str, Any] = {}
    asked = {name: value for name, value in settings.items() if value is not UNSET}
    if preset is not None and asked.get("rounding") == "lsq":
        asked = {"grid": "auto", "normalize": "auto"} | asked  # LSQ has its own grid
    if asked:
        changes["default"] = base.default.replace(**checked_changes(asked, "arguments"))
    for key, value in (("first", first), ("last", last)):
        if not isinstance(value, Unset):
            changes[key] = _position(value, key)
    if exclude:
        more = (exclude,) if isinstance(exclude, str) else checked_patterns(exclude, "exclude")
        changes["exclude"] = (*base.exclude, *more)
    if include is not None:
        changes["include"] = checked_include(include, "include")
    more_rules = _rules(rules, base) + (() if bits is None else bits_rules(bits, "bits"))
    if more_rules:
        changes["rules"] = (*base.rules, *more_rules)
    if target is not None or base.target is not None:
        changes |= {} if target is None else {"target": target}
        check_target_changes(find_target(base.target if target is None else target), asked, "arguments")
    if changes and (policy is not None or preset is not None):
        changes["name"] = f"{base.name} + arguments"
    return checked_policy(dataclasses.replace(base, **changes))


def _base(policy: object, preset: str | None) -> Policy:
    if policy is not None and preset is not None:
        raise PolicyError(f"policy and preset = {preset!r} cannot both be given. Leave one out.")
    if preset is not None:
        return preset_policy(preset)
    if policy is None:
        return Policy()
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return from_dict(policy)
    if isinstance(policy, (str, Path)) and str(policy).endswith(".toml"):
        return from_toml(Path(policy))
    hint = f' Did you mean preset = "{policy}"?' if policy in preset_names() else ""
    raise PolicyError(
        f"policy: expected a Policy, a dict, or the path of a .toml file; found {reprlib.repr(policy)}.{hint}"
    )


def _position(value: object, key: str) -> dict[str, Any] | None:
    if value is None or isinstance(value, Mapping):
        return checked_position(value, key)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return checked_changes(dict(zip(BIT_FIELDS, value, strict=True)), key)
    raise PolicyError(
        f"{key}: expected None (float), a pair {key} = (w_bits, a_bits), or a dict of settings; "
        f"found {reprlib.repr(value)}."
    )


def _rules(rules: Rule | Mapping[str, Any] | Sequence[Rule | Mapping[str, Any]], base: Policy) -> tuple[Rule, ...]:
    asked = (rules,) if isinstance(rules, (Rule, Mapping)) else rules
    first = 1 + sum(not rule.place for rule in base.rules if isinstance(rule, Rule))
    places = (f"rule {number}" for number, _ in enumerate(asked, start=first))
    return tuple(
        checked_rule(rule, where) if isinstance(rule, Rule) else rule_from_dict(rule, where)
        for where, rule in zip(places, asked, strict=True)
    )
