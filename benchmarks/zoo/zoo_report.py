"""The readable form of the zoo's records: totals per target, one row a network, and what failed in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

COLUMNS = {
    "converts": "converts",
    "identical": "identical",
    "identical_train": "identical in training",
    "coverage": "coverage",
    "sqnr": "SQNR",
    "gradients": "gradients",
    "frozen": "frozen",
    "saved": "saved",
}
TARGETS = {
    "converts": "converts",
    "identical": "identical output under `dq.disabled`, evaluation",
    "identical_train": "the same in training mode",
    "coverage": "MAC coverage >= 99.5 %, recurrent layers and attention products aside",
    "sqnr": "SQNR >= 20 dB at W8A8",
    "gradients": "gradients finite, none lost, the same quantizers in all modes",
    "frozen": "frozen equals evaluation, every element",
    "saved": "saved and loaded: outputs and files identical",
}


def passed(record: dict[str, Any], check: str) -> bool:
    """Whether a check was done and passed."""
    return bool(record.get(check, {}).get("ok"))


def failures(record: dict[str, Any]) -> list[str]:
    """Return the checks that are missing or failed."""
    return [check for check in COLUMNS if not passed(record, check)]


def cell(record: dict[str, Any], check: str) -> str:
    """Return one check in a word or a number."""
    found = record.get(check)
    if found is None:
        return "-"
    if "error" in found:
        return "error"
    if check == "coverage":
        return f"{math.floor(found['share_aside'] * 10000) / 100:.2f} %"
    if check == "sqnr":
        return f"{found['db']:.1f} dB"
    return "yes" if found.get("ok") else "NO"


def why(record: dict[str, Any], check: str) -> str:
    """Return in words why a check failed."""
    found = record.get(check)
    if found is None:
        return record.get("died", "not reached")
    if "error" in found:
        return str(found["error"])
    if check == "gradients":
        kinds = ("not_finite", "weights", "bounds", "input_bounds", "modes")
        lost = [(kind, found[kind]) for kind in kinds if found.get(kind, {}).get("count")]
        return "; ".join(f"{kind}: {value['count']}, as {', '.join(value['first'][:2])}" for kind, value in lost)
    if check == "coverage":
        return f"{found['share_aside']:.4f}, left: {'; '.join(found['left'][:3])}"
    if check == "sqnr":
        return f"{found['db']} dB (worst output {found['worst_db']} dB)"
    return ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("ok", "seconds"))


def line(record: dict[str, Any]) -> str:
    """Return a record as one line for the terminal."""
    parts = [f"{name} {cell(record, check)}" for check, name in COLUMNS.items()]
    return ", ".join(parts) + (f" ({record['died']})" if record.get("died") else "")


def table(records: dict[str, Any]) -> list[str]:
    """Return one row a network."""
    heads = [
        "network",
        "parameters",
        "input",
        *COLUMNS.values(),
        "worst output",
        "what varies",
        "gain of noise",
        "seconds to convert",
        "peak MB",
    ]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for key, record in records.items():
        sqnr = record.get("sqnr", {})
        size = "x".join(map(str, record.get("size", [])[1:]))
        gain = record.get("float", {}).get("gain_db")
        numbers = (sqnr.get("worst_db"), sqnr.get("varying_db"), gain)
        last = [*("-" if value is None else f"{value:.1f} dB" for value in numbers),
                str(record.get("converts", {}).get("seconds", "-")), str(record.get("peak_mb", "-"))]  # fmt: skip
        cells = [key, f"{record.get('params', 0):,}", size, *(cell(record, check) for check in COLUMNS), *last]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def totals(records: dict[str, Any]) -> list[str]:
    """Return how many networks meet each target, per library."""
    groups = {group: [r for r in records.values() if r["group"] == group] for group in ("timm", "torchvision")}
    rows = ["| target | timm | torchvision |", "|---|---|---|"]
    for check, text in TARGETS.items():
        cells = [f"{sum(passed(r, check) for r in found)} of {len(found)}" for found in groups.values()]
        rows.append(f"| {text} | {' | '.join(cells)} |")
    taken = [[r.get("converts", {}).get("seconds", 0.0) for r in found] for found in groups.values()]
    rows.append("| seconds to convert, largest | " + " | ".join(f"{max(s, default=0):.1f}" for s in taken) + " |")
    return rows


def failed(records: dict[str, Any]) -> list[str]:
    """Return what failed, in words."""
    rows = [
        f"* {key}, {COLUMNS[check]}: {why(record, check)}"
        for key, record in records.items()
        for check in failures(record)[: 1 if "error" in record.get("converts", {}) else None]
    ]
    return rows or ["Nothing."]


def explained(records: dict[str, Any]) -> list[str]:
    """Return the networks below 20 dB, each with the layer that loses most and ONNX Runtime's SQNR."""
    rows = ["| network | SQNR | the layer that loses most | without it | ONNX Runtime W8A8 |", "|---|---|---|---|---|"]
    for key, record in records.items():
        found = record.get("explained")
        if found and not passed(record, "sqnr"):
            peer = found["onnxruntime"]
            shown = f"{peer['db']:.1f} dB" if "db" in peer else peer["error"]
            rows.append(f"| {key} | {found['db']:.1f} dB | {found['site']} | {found['without']:.1f} dB | {shown} |")
    return rows if len(rows) > 2 else ["None was explained."]


def write(path: Path, records: dict[str, Any], total: int) -> None:
    """Write the table, whole or not at all."""
    dates = sorted(r["date"] for r in records.values() if "date" in r)
    lines = [
        "# The zoo", "",
        f"{len(records)} of {total} networks, {dates[0]} to {dates[-1]}. " if dates else "",
        "Made by `python benchmarks/zoo/zoo.py`; records with machine, versions, command and commit: `zoo.json`.", "",
        *totals(records), "", "## Below 20 dB", "", *explained(records), "", "## Networks", "", *table(records), "",
        "## What failed", "", *failed(records), "",
    ]  # fmt: skip
    temporary = path.with_suffix(".md.tmp")
    temporary.write_text("\n".join(lines))
    temporary.replace(path)
