"""The data that deciding and doing share: what a user asks for (`settings`), what was decided (`plan`)."""

from daqconvert.spec.plan import Call, Plan, PlanRow, Site
from daqconvert.spec.settings import (
    BIT_FIELDS,
    CHOICES,
    POSITIVE_FIELDS,
    SETTING_NAMES,
    Policy,
    Rule,
    Settings,
    check_bits,
    check_setting,
)

__all__ = [
    "BIT_FIELDS",
    "CHOICES",
    "POSITIVE_FIELDS",
    "SETTING_NAMES",
    "Call",
    "Plan",
    "PlanRow",
    "Policy",
    "Rule",
    "Settings",
    "Site",
    "check_bits",
    "check_setting",
]
