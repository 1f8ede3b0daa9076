"""Where the time of our training step goes, compared with a float step: torch's profiler, operator by operator."""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
from torch.profiler import ProfilerActivity, profile

from benchmarks.qat.qat_contenders import CONTENDERS, Trainee
from benchmarks.qat.qat_networks import Task, task

WARM_UP, STEPS, ROWS = 4, 4, 16


def compare(network: str, contender: str, mode: str) -> dict[str, Any]:
    """Return milliseconds per step in each operator, of a contender and of float, the largest differences first.

    Args:
        network: Key of `qat_networks.NETWORKS`.
        contender: Key of `qat_contenders.CONTENDERS`.
        mode: `"eager"` or `"compile"`.
    """
    torch._dynamo.reset()
    torch._inductor.config.cpp.enable_kernel_profile = True  # otherwise a compiled network is one operator
    given = task(network)
    own, base = (_operators(name, given, mode == "compile") for name in (contender, "float"))
    rows = []
    for name in {*own, *base}:
        (ms, calls), (float_ms, float_calls) = own.get(name, (0.0, 0)), base.get(name, (0.0, 0))
        rows.append({"operator": name, "ms": ms, "calls": calls, "float_ms": float_ms, "float_calls": float_calls})
    rows.sort(key=lambda row: row["float_ms"] - row["ms"])
    total, float_total = (sum(ms for ms, _ in found.values()) for found in (own, base))
    lines = _lines(rows, contender, total, float_total)
    return {"contender": contender, "rows": rows, "lines": lines}


def _operators(name: str, given: Task, compiled: bool) -> dict[str, tuple[float, int]]:
    """Return operator -> (milliseconds in the operator itself, calls), per step."""
    trainee = Trainee(CONTENDERS[name], given, compiled)
    for _ in range(WARM_UP):
        trainee.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            trainee.step()
    found = profiler.key_averages()
    return {e.key: (e.self_cpu_time_total / 1e3 / STEPS, round(e.count / STEPS)) for e in found}


def _lines(rows: list[dict[str, Any]], contender: str, total: float, float_total: float) -> list[str]:
    lines = [
        "Milliseconds a step in each operator itself, under the profiler, which makes every operator slower;",
        f"the {ROWS} operators with the largest difference. All: {total:.1f} against {float_total:.1f}.",
        "",
        f"| operator | {contender} ms | calls | float ms | calls | difference |",
        "|---|---|---|---|---|---|",
    ]
    ranked = sorted(rows, key=lambda row: -abs(row["ms"] - row["float_ms"]))[:ROWS]
    for row in ranked:
        difference = row["ms"] - row["float_ms"]
        lines.append(
            f"| {row['operator'].replace('|', '/')[:60]} | {row['ms']:.2f} | {row['calls']} | {row['float_ms']:.2f} "
            f"| {row['float_calls']} | {difference:+.2f} |"
        )
    return lines
