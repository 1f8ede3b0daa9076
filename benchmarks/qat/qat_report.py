"""The readable form of `qat_step.py`'s records: one table a network and mode, and the targets with their marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.qat.qat_contenders import CONTENDERS
from benchmarks.qat.qat_networks import NETWORKS

MODES = ("eager", "compile")
OURS = "daqconvert"
TARGETS = {("eager", "time"): 1.40, ("eager", "memory"): 1.15, ("compile", "time"): 1.08, ("compile", "memory"): 1.10}
"""Step time and peak memory of ours over float of the same mode, at most."""

Records = dict[str, dict[str, dict[str, Any]]]  # network -> mode -> "time" | "memory" -> record


def time_ratio(records: Records, network: str, mode: str, contender: str) -> float | None:
    """Return the median over rounds of step time over float's, or None where it was not measured."""
    found = records.get(network, {}).get(mode, {}).get("time", {}).get("contenders", {})
    return found.get(contender, {}).get("ratio")


def memory_ratio(records: Records, network: str, mode: str, contender: str, key: str = "peak_bytes") -> float | None:
    """Return peak bytes over float's, or None where either was not measured."""
    found = records.get(network, {}).get(mode, {}).get("memory", {})
    own, base = found.get(contender, {}).get(key), found.get("float", {}).get(key)
    return own / base if own and base else None


def fastest_peer(records: Records, network: str, mode: str) -> tuple[str, float] | None:
    """Return the peer with the smallest ratio and that ratio."""
    ratios = {c.name: time_ratio(records, network, mode, c.name) for c in CONTENDERS.values() if c.group == "peer"}
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    return min(known.items(), key=lambda item: item[1]) if known else None


def targets(records: Records) -> list[tuple[str, str, str, str, str, bool | None]]:
    """Return (network, mode, what, target, found, met) of every target; met is None where it was not measured."""
    rows: list[tuple[str, str, str, str, str, bool | None]] = []
    for network in NETWORKS:
        for mode in MODES:
            own = time_ratio(records, network, mode, OURS)
            for what, found in (("time", own), ("memory", memory_ratio(records, network, mode, OURS))):
                limit = TARGETS[mode, what]
                met = None if found is None else found <= limit
                rows.append((network, mode, f"{what} / float", f"<= {limit:.2f}", _number(found), met))
            peer = fastest_peer(records, network, mode)
            if peer is None or own is None:
                rows.append((network, mode, "fastest peer", "faster", "-", None))
            else:
                text = f"{own / peer[1]:.3f} of {peer[0]}"
                rows.append((network, mode, "fastest peer", "faster", text, own < peer[1]))
    return rows


def write(path: Path, records: Records) -> None:
    """Write the readable form, whole or not at all."""
    lines = ["# One training step at W4A4, against float", "", *_explained(), "", "## Targets", ""]
    lines += ["| network | mode | what | target | found | met |", "|---|---|---|---|---|---|"]
    for *cells, met in targets(records):
        lines.append(f"| {' | '.join(cells)} | {_mark(met)} |")
    for network, modes in records.items():
        for mode in (mode for mode in MODES if mode in modes):
            lines += ["", *_table(records, network, mode)]
            if "profile" in modes[mode]:
                lines += ["", f"### Where the time goes: {network}, {mode}", "", *modes[mode]["profile"]["lines"]]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)


def _explained() -> list[str]:
    return [
        "Made by `benchmarks/qat/qat_step.py`. Times: medians over rounds in which all contenders of a network and a",
        "mode take turns in one process; the ratio is taken within each round. Memory: bytes in tensors at the worst",
        "moment of a step, and growth of the resident memory, each contender in a process of its own. Ratios are to",
        "float in the same mode. `loss` is the mean of the first three and of the last three of the steps that learn",
        "one fixed batch; `start` is the time until the first step is done, `breaks` the number of graph breaks of",
        "`torch.compile`. A contender that failed has its reason in its row.",
    ]


def _table(records: Records, network: str, mode: str) -> list[str]:
    piece = records[network][mode]
    times, memory = piece.get("time", {}), piece.get("memory", {})
    given = NETWORKS[network]
    title = f"## {network}, {mode}: {given.pixels} px, batch {given.batch}"
    rows = [title, "", *_facts(times, memory), ""]
    heads = ["contender", "ms", "/ float", "quartiles", "tensors MiB", "/ float", "RSS MiB", "/ float"]
    heads += ["loss", "start s", "breaks"]
    rows += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in CONTENDERS:
        timed, held = times.get("contenders", {}).get(name, {}), memory.get(name, {})
        if not timed and not held:
            continue
        failed = "; ".join(f"{k}: {v['failed']}" for k, v in (("time", timed), ("memory", held)) if "failed" in v)
        if failed:
            rows.append(f"| {name} | {failed.replace('|', '/')} " + "| " * (len(heads) - 2) + "|")
            continue
        cells = [
            name,
            _number(timed.get("ms"), 1),
            _number(timed.get("ratio")),
            " - ".join(_number(q) for q in timed.get("ratio_quartiles", [])) or "-",
            _mebibytes(held.get("peak_bytes")),
            _number(memory_ratio(records, network, mode, name)),
            _mebibytes(held.get("rss_growth_bytes")),
            _number(memory_ratio(records, network, mode, name, "rss_growth_bytes")),
            " to ".join(_number(loss) for loss in timed.get("loss", [])) or "-",
            _number(timed.get("seconds_to_first_step"), 1),
            str(timed.get("graph_breaks", "-")),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _facts(times: dict[str, Any], memory: dict[str, Any]) -> list[str]:
    if not times:
        found = next((r["facts"] for r in memory.values() if "facts" in r), {})
        return [f"Memory: {', '.join(f'{k} {v}' for k, v in found.items())}."]
    facts = ", ".join(f"{key} {value}" for key, value in times.get("facts", {}).items())
    rows = [f"{times['layers']} layers, {times['rounds']} rounds of {times['steps']} steps; {facts}."]
    for name, own in times.get("losses", {}).items():
        rows.append(f"Losses of {name} anew: {', '.join(f'{key} {value}' for key, value in own.items())}.")
    return rows


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def _mark(met: bool | None) -> str:
    return {True: "yes", False: "NO", None: "not measured"}[met]


def show(records: Records) -> None:
    """Print the targets as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("network", "mode", "what", "target", "found", "met", title="targets")
    colours = {True: "green", False: "red", None: "dim"}
    for *cells, met in targets(records):
        table.add_row(*cells, f"[{colours[met]}]{_mark(met)}[/]")
    Console().print(table)
