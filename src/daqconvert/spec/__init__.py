"""The data that `policy` (deciding) and `graph`, `layers` (doing) share: settings, facts about sites, plans."""

from daqconvert.spec.diff import PlanDiff, RowChange
from daqconvert.spec.plans import Plan
from daqconvert.spec.row import PlanRow, input_groups
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
from daqconvert.spec.site_facts import OUTPUT_KIND, OUTPUT_QUANTIZER, Call, Concat, Site, SiteOutput
from daqconvert.spec.totals import Totals

__all__ = [
    "BIT_FIELDS",
    "CHOICES",
    "OUTPUT_KIND",
    "OUTPUT_QUANTIZER",
    "POSITIVE_FIELDS",
    "SETTING_NAMES",
    "Call",
    "Concat",
    "Plan",
    "PlanDiff",
    "PlanRow",
    "Policy",
    "RowChange",
    "Rule",
    "Settings",
    "Site",
    "SiteOutput",
    "Totals",
    "check_bits",
    "check_setting",
    "input_groups",
]
