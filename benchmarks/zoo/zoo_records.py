"""The records of the zoo, one per network: what each says about the run that made it, and how they are written."""

from __future__ import annotations

from typing import Any

from benchmarks import common
from benchmarks.zoo import zoo_report
from benchmarks.zoo.zoo_models import networks

RESULT = "zoo"


def short_facts() -> dict[str, Any]:
    """Return the facts about machine and run, without long ones that every record would repeat."""
    facts = common.facts()
    machine = facts["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return {"date": facts["date"], "commit": facts["commit"], "command": facts["command"], "versions": versions,
            "machine": f"{machine['cpu']}, {machine['cores']} cores"}  # fmt: skip


def write(records: dict[str, Any]) -> None:
    """Write the records in the order of the list, and the table."""
    order = {network.key: i for i, network in enumerate(networks())}
    ordered = {key: records[key] for key in sorted(records, key=lambda k: order.get(k, len(order)))}
    common.write(RESULT, {"networks": ordered})
    zoo_report.write(common.RESULTS / "zoo.md", ordered, len(order))
