"""The readable form of `inference.py`'s records: the targets with their marks, and one table a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.inference.inference_files import FLOAT, NETWORKS
from daqconvert.report.tables import render, simple_table

COLUMNS = (
    "contender", "ms", "p95", "/ float", "quartiles", "/ static int8", "quartiles", "integer kernels", "products",
    "file kB", "check",
)  # fmt: skip
NAMED = 8  # how many of the layers that run in float are named; the records have all
HEAD = """# Inference in ONNX Runtime, beside float and its own static int8

Made by `benchmarks/inference/inference.py`: random weights, batch 1, 224 px; contenders have processes of their own
and take turns. Times are medians over rounds of the medians within a round, ratios are of those medians, quartiles
those of the ratio within each round. `integer kernels` counts the convolutions and linears of ONNX Runtime's
optimized graph that run as integer kernels, of all; `products` likewise those of two activations, as in attention.
Each contender was checked before it was timed: it loads, its output is finite, and ours agrees with the frozen model
(`report.agrees`)."""


def targets(records: dict[str, Any]) -> list[tuple[str, str, str, str, str, bool | None]]:
    """Return network, contender, what, target, what was found, and whether that is enough (None: not measured)."""
    rows: list[tuple[str, str, str, str, str, bool | None]] = []
    for key, network in NETWORKS.items():
        found = {
            name: one for name, one in records.get(key, {}).get("contenders", {}).items() if name.startswith("ours")
        }
        for name, one in found.items() or {"ours": {}}.items():
            for what, measure, most in (
                ("time / float", "of_float", network.targets[0]),
                ("time / static int8", "of_static", network.targets[1]),
            ):
                value = one.get(measure)
                shown = one.get("failed", "-") if value is None else f"{value:.3f}"
                rows.append((key, name, what, f"<= {most:.2f}", shown, None if value is None else value <= most))
            kernels = one.get("kernels")
            shown = "-" if kernels is None else _share(kernels)
            rows.append(
                (key, name, "integer kernels", "all", shown, None if kernels is None else not kernels["float"])
            )
    return rows


def _share(kernels: dict[str, Any]) -> str:
    return f"{kernels['integer']} of {kernels['integer'] + len(kernels['float'])}"


def _products(kernels: dict[str, Any]) -> str:
    total = kernels["products_integer"] + kernels["products_float"]
    return f"{kernels['products_integer']} of {total}" if total else "-"


def _target_table(records: dict[str, Any]) -> str:
    marks = {True: "yes", False: "NO", None: "not measured"}
    rows = [(*row[:5], marks[row[5]]) for row in targets(records)]
    return render(simple_table("", ("network", "contender", "what", "target", "found", "met"), rows))


def _network_table(record: dict[str, Any]) -> str:
    rows = []
    for name, one in record["contenders"].items():
        if "failed" in one:
            rows.append((name, *["-"] * 9, one["failed"]))
            continue
        ratios = []
        for key in ("of_float", "of_static"):
            there = key in one
            ratios += [f"{one[key]:.3f}" if there else "-"]
            ratios += ["{:.3f} - {:.3f}".format(*one[f"{key}_quartiles"]) if there else "-"]
        check = _check_text(one["check"])
        numbers = (f"{one['ms']:.2f}", f"{one['p95_ms']:.2f}", *ratios)
        rows.append(
            (name, *numbers, _share(one["kernels"]), _products(one["kernels"]), f"{one['bytes'] / 1e3:.0f}", check)
        )
    return render(simple_table("", COLUMNS, rows))


def _check_text(check: dict[str, Any]) -> str:
    words = ["finite"]
    if "codes" in check:
        words.append(f"{check['codes_differing']} of {check['codes']:,} codes differ from the frozen model's")
    if check.get("sqnr_to_float_db") is not None:
        words.append(f"{check['sqnr_to_float_db']} dB to float")
    return ", ".join(words)


def _float_layers(record: dict[str, Any]) -> list[str]:
    told = []
    for name, one in record["contenders"].items():
        layers = [] if "failed" in one or name == FLOAT else one["kernels"]["float"]
        if layers:
            more = f", and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
            told.append(f"In float, of {name}: {', '.join(layers[:NAMED])}{more}.")
    return told


def write(path: Path, records: dict[str, Any]) -> None:
    """Write the page."""
    parts = [HEAD, "## Targets", _target_table(records)]
    for key, record in records.items():
        facts = record["facts"]
        machine = facts["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        parts += [
            f"## {key}",
            f"{record['threads']} threads, {record['rounds']} rounds of {record['repeats']} calls; {facts['date']}, "
            f"commit {facts['commit']}, {machine['cpu']}, {machine['cores']} cores, {versions}; `{facts['command']}`.",
            _network_table(record),
            *_float_layers(record),
        ]
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n")


def show(records: dict[str, Any]) -> None:
    """Print the targets."""
    print(_target_table(records))
