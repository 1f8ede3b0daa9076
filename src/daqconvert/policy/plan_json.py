"""A whole `Plan` as JSON and back: what a saved artifact says about its layers.

The shape is that of the dataclasses in `spec`, field by field, tuples as arrays. Reading is strict, since a file may
have been edited: every field must be there, none besides, each of its type; counts are not negative; a row is either
converted, with settings that hold no `"auto"`, or left alone with a reason.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from daqconvert.errors import PolicyError, nearest
from daqconvert.spec import Plan, PlanRow
from daqconvert.spec.auto import resolve_auto, resolve_computed

ORDERS = ("fx", "modules")
LATER = ("delta", "alpha")
"""Settings that plans written before they existed do not have."""
_WORDS = {str: "a text", bool: "true or false", int: "a count", float: "a number", NoneType: "null"}


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as nested dicts, lists, texts and numbers that JSON can hold.

    Args:
        plan: The plan.

    Example:
        >>> plan_to_dict(Plan((), "Net"))["order"]
        'fx'
    """
    data: dict[str, Any] = _encode(plan)
    return data


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def plan_from_dict(data: object) -> Plan:
    """Return the plan that `plan_to_dict` wrote, refusing anything else.

    Args:
        data: What a JSON reader returned.

    Raises:
        PolicyError: If a field is missing, unknown or of the wrong type, two rows have one name, or a row contradicts
            itself; names the field.

    Example:
        >>> plan_from_dict(plan_to_dict(Plan((), "Net"))) == Plan((), "Net")
        True
    """
    plan: Plan = _decode_dataclass(Plan, data, "plan")
    if plan.order not in ORDERS:
        raise PolicyError(f"plan.order: expected one of {', '.join(ORDERS)}; found {reprlib.repr(plan.order)}.")
    names: set[str] = set()
    for index, row in enumerate(plan.rows):
        _check_row(row, f"plan.rows[{index}]")
        if row.name in names:
            raise PolicyError(f"plan.rows[{index}].site.name: expected each name once; found {row.name!r} again.")
        names.add(row.name)
    return plan


def _check_row(row: PlanRow, where: str) -> None:
    if (row.settings is None) != bool(row.reason):
        raise PolicyError(
            f"{where}: expected either settings or a reason for leaving {row.name!r} alone; "
            f"found {'neither' if row.settings is None else 'both'}."
        )
    if row.settings is None:
        return
    if row.site.reason:
        raise PolicyError(f"{where}: {row.name!r} has settings but cannot be converted: {row.site.reason}.")
    if row.settings.w_bits is None and row.settings.a_bits is None:
        raise PolicyError(f"{where}.settings: expected w_bits or a_bits; found null for both.")
    if "auto" in (row.settings.grid, row.settings.normalize, row.settings.granularity):
        raise PolicyError(f'{where}.settings: expected nothing on "auto"; found {row.settings}.')
    if not row.site.is_computed:
        resolve_auto(row.settings, f"{where}.settings")
    elif row.settings != resolve_computed(row.settings):
        raise PolicyError(
            f"{where}.settings: {row.name!r} is computed from the input: expected granularity 'tensor', grid "
            f"'integer' and normalize false; found {row.settings}."
        )


def _decode_dataclass(kind: Any, data: object, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise PolicyError(f"{where}: expected an object; found {reprlib.repr(data)}.")
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key in data:
        if key not in names:
            close = nearest(key, names) if isinstance(key, str) else ""
            raise PolicyError(f"{where}: unknown field {reprlib.repr(key)}.{close}")
    missing = [name for name in names if name not in data and name not in LATER]
    if missing:
        raise PolicyError(f"{where}: missing field {missing[0]!r}.")
    values = {name: _decode(hints[name], data[name], f"{where}.{name}") for name in names if name in data}
    try:
        return kind(**values)
    except PolicyError as error:
        raise PolicyError(f"{where}.{error}") from None


def _decode(kind: Any, value: object, where: str) -> Any:
    """Return `value` as the annotated type `kind`: a scalar, a dataclass, `tuple[T, ...]`, or a union of these."""
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise PolicyError(f"{where}: expected a list; found {reprlib.repr(value)}.")
        return tuple(_decode(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        members = [member for member in get_args(kind) if member is not NoneType]
        fitting = [member for member in members if _is_scalar(member, value)]
        return _decode(fitting[0] if fitting else members[0], value, where)
    if not _is_scalar(kind, value):
        raise PolicyError(f"{where}: expected {_WORDS[kind]}; found {reprlib.repr(value)}.")
    return value


def _is_scalar(kind: Any, value: object) -> bool:
    if kind is int:
        return type(value) is int and value >= 0
    if kind is float:
        return type(value) in (int, float)
    return kind in _WORDS and type(value) is kind
