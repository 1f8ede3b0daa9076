"""Does `dq.plan` work for every timm network, on `meta`, without weights in memory, and how long does it take?

Each block of names has a process of its own, so that the peak of memory is that of the block. Results are written as
they come, so that an interrupted run goes on where it stopped:

    python benchmarks/zoo/plan_all.py [--only PATTERN ...] [--again] [--failed] [--block 10]

Seconds are those of `dq.plan` alone, after the network has been built. Peak memory is that of the process (Python,
torch and timm take the larger part: `base_mb`).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

from benchmarks import common
from daqconvert.report.progress import progress

RESULT = "plan_all"
LIMIT = 5.0  # seconds beyond building the model


def peak() -> int:
    """Return the peak of this process's memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def plan_one(name: str) -> dict[str, Any]:
    """Build one network on `meta` and plan it."""
    import timm
    import torch

    import daqconvert as dq

    record: dict[str, Any] = {"before_mb": peak()}
    started = time.perf_counter()
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        record["build"] = round(time.perf_counter() - started, 2)
        started, used = time.perf_counter(), time.process_time()
        plan = dq.plan(model)
        record["seconds"] = round(time.perf_counter() - started, 2)
        record["cpu_seconds"] = round(time.process_time() - used, 2)  # processor time: other programs do not count
        reasons = Counter(row.reason or "no reason given" for row in plan.skipped)
        record |= {"rows": len(plan), "converted": len(plan.converted), "order": plan.order, "skipped": dict(reasons)}
    except Exception as error:
        record["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return {**record, "peak_mb": peak()}


def worker(names: list[str]) -> None:
    """Plan some networks and print one JSON line for each."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names:
        print(json.dumps([name, plan_one(name)]), flush=True)


def run(names: list[str], timeout: int) -> dict[str, Any]:
    """Plan some networks in one process; if it dies, the networks that it did not reach are marked."""
    command = [sys.executable, __file__, "--worker", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, timeout=timeout, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        out, died = done.stdout, f"ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1][:200]}"
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        died = f"stopped after {timeout} s"
    found = dict(json.loads(line) for line in out.splitlines() if line.startswith('["'))
    if len(found) < len(names):
        found[names[len(found)]] = {"error": died}
    return found


def summary(records: dict[str, Any]) -> dict[str, Any]:
    """Return the totals."""
    good = {name: r for name, r in records.items() if "seconds" in r}
    slowest = sorted(good, key=lambda name: -good[name]["seconds"])[:5]
    hungriest = max(good, key=lambda name: good[name]["peak_mb"], default="")
    seconds = round(sum(r["seconds"] for r in good.values()))
    reasons: Counter[str] = Counter()
    for r in good.values():
        reasons.update(r["skipped"])
    return {
        "names": len(records), "planned": len(good), "errors": len(records) - len(good),
        "slower_than_limit": [n for n in good if good[n]["seconds"] > LIMIT], "limit_seconds": LIMIT,
        "slower_than_limit_cpu": [n for n in good if good[n]["cpu_seconds"] > LIMIT],
        "slowest": {n: good[n]["seconds"] for n in slowest}, "total_seconds": seconds,
        "peak_mb": {hungriest: good[hungriest]["peak_mb"]} if hungriest else {},
        "base_mb": min((r["before_mb"] for r in good.values()), default=0),
        "rows": sum(r["rows"] for r in good.values()), "converted": sum(r["converted"] for r in good.values()),
        "by_modules": sum(r["order"] != "fx" for r in good.values()), "skipped": dict(reasons.most_common(30)),
    }  # fmt: skip


def main() -> None:
    """Plan what is still to do; write after each block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names or globs")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--failed", action="store_true", help="also what failed or was too slow")
    parser.add_argument("--block", type=int, default=10, help="networks of one process")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one block")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    import timm

    records: dict[str, Any] = common.read(RESULT).get("networks", {})
    names = [n for n in timm.list_models() if not args.only or any(fnmatch.fnmatch(n, p) for p in args.only)]
    bad = {n for n, r in records.items() if r.get("seconds", LIMIT + 1) > LIMIT} if args.failed else set()
    todo = [n for n in names if args.again or n not in records or n in bad]
    with progress(len(todo), "planning") as bar:
        while todo:
            found = run(todo[: args.block], args.timeout)
            todo = [n for n in todo if n not in found]
            records |= found
            common.write(RESULT, {"summary": summary(records), "networks": dict(sorted(records.items()))})
            bar.advance(len(found), network=next(reversed(found)))
    print(json.dumps(summary(records), indent=1))


if __name__ == "__main__":
    main()
