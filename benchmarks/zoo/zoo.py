"""Does conversion work for every network? The smallest of each timm family, and torchvision's networks, at W8A8.

Each network runs in a process of its own with a time and a memory limit. Its record is written when it is done, so an
interrupted run goes on where it stopped; `--again` also runs networks that are done already:

    python benchmarks/zoo/zoo.py [--group timm|torchvision] [--only PATTERN ...] [--again] [--failed]
    python benchmarks/zoo/zoo.py --table                     # results/zoo.md again, from the records
    python benchmarks/zoo/zoo.py --explain timm/NAME         # which site loses the SQNR; ONNX Runtime's figure beside

What is checked: `zoo_checks.py`; which networks: `zoo_models.py`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

from benchmarks import common
from benchmarks.zoo import zoo_explain, zoo_report
from benchmarks.zoo.zoo_models import Network, find, networks
from benchmarks.zoo.zoo_records import RESULT, short_facts, write
from daqconvert.report.progress import progress


def selected(args: argparse.Namespace, done: dict[str, Any]) -> list[Network]:
    """Return the networks that are asked for and still to do."""
    found = [n for n in networks() if args.group in (None, n.group)]
    if args.only:
        found = [n for n in found if any(fnmatch.fnmatch(n.key, p) or fnmatch.fnmatch(n.name, p) for p in args.only)]
    if args.failed:
        return [n for n in found if n.key not in done or zoo_report.failures(done[n.key])]
    return found if args.again else [n for n in found if n.key not in done]


def run_one(network: Network, args: argparse.Namespace) -> dict[str, Any]:
    """Run one network in a process of its own; if it is killed, its results until then are kept."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [sys.executable, __file__, "--worker", network.key, str(path), "--memory", str(args.memory)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        try:
            done = subprocess.run(
                command, env=environment, timeout=args.timeout, capture_output=True, text=True, check=False
            )
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            error = f"ended with {done.returncode}: {last}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            error = f"stopped after {args.timeout} s"
        record = json.loads(path.read_text()) if path.is_file() else {"group": network.group, "task": network.task}
    return {**record, **({"died": error} if error else {})}


def worker(key: str, path: Path, threads: int, memory: int) -> None:
    """Check one network and write its record after each check."""
    import torch

    from benchmarks.zoo.zoo_checks import run_all

    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))

    def save(record: dict[str, Any]) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record))
        temporary.replace(path)

    run_all(find(key), save)


def main() -> None:
    """Run what is still to do, and write records and table after each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=("timm", "torchvision"))
    parser.add_argument("--only", nargs="*", default=[], help="names or globs")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--failed", action="store_true", help="only what is missing or failed a check")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one network")
    parser.add_argument("--memory", type=int, default=22, help="GiB for one network")
    parser.add_argument("--table", action="store_true", help="only write results/zoo.md again")
    parser.add_argument("--explain", metavar="NAME")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], Path(args.worker[1]), args.threads, args.memory)
        return
    if args.explain:
        zoo_explain.explain(find(args.explain), args.threads)
        return
    records = common.read(RESULT).get("networks", {})
    todo = [] if args.table else selected(args, records)
    with progress(len(todo), "zoo") as bar:
        for network in todo:
            before = {key: value for key, value in records.get(network.key, {}).items() if key == "explained"}
            records[network.key] = {**short_facts(), **run_one(network, args), **before}
            write(records)
            print(network.key, zoo_report.line(records[network.key]), flush=True)
            bar.advance(network=network.name)
    if args.table:
        write(records)


if __name__ == "__main__":
    main()
