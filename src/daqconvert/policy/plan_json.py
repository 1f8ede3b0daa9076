"""Converting a whole `Plan` to JSON and back; a saved artifact contains the plan in this form.

The JSON has the structure of the dataclasses in `spec`, field by field, and is read strictly (`plain_values`). In
addition a plan must be consistent: no two rows have the same name, and a row either has settings without `"auto"` (it
is converted), or a reason (it is left in float).
"""

from __future__ import annotations

import reprlib
from typing import Any

from daqconvert.errors import PolicyError
from daqconvert.spec import Plan, PlanRow
from daqconvert.spec.auto import resolve_auto, resolve_computed
from daqconvert.spec.plain_values import from_plain, to_plain
from daqconvert.spec.targets import find_target

ORDERS = ("fx", "modules")
LATER = ("delta", "alpha")
"""Settings that are missing in older files, because these were written before the settings existed."""


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as nested dicts, lists, texts and numbers that JSON can hold.

    Args:
        plan: The plan.

    Example:
        >>> plan_to_dict(Plan((), "Net"))["order"]
        'fx'
    """
    data: dict[str, Any] = to_plain(plan)
    return data


def plan_from_dict(data: object) -> Plan:
    """Return the plan that `plan_to_dict` wrote, refusing anything else.

    Args:
        data: What a JSON reader returned.

    Raises:
        PolicyError: If a field is missing, unknown or of the wrong type, two rows have the same name, or a row
            contradicts itself; the message names the field.

    Example:
        >>> plan_from_dict(plan_to_dict(Plan((), "Net"))) == Plan((), "Net")
        True
    """
    plan = from_plain(Plan, data, "plan", later=LATER)
    if plan.target is not None:
        find_target(plan.target, where="plan.target")
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
