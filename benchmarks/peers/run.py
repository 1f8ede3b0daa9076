"""The first three columns of the zoo for Brevitas and NNCF: converts, identical when switched off, MAC coverage.

Networks, their preparation and the random batches are those of `zoo.py`. Each network and tool has a process of its
own with one thread, a time limit and a memory limit. An interrupted run goes on where it stopped:

    python benchmarks/peers/run.py [--tool brevitas nncf] [--group timm|torchvision] [--only PATTERN ...] [--again]
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
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

from benchmarks import common
from benchmarks.zoo.zoo_models import Network, call, find, inputs, leaves, networks

RESULT = "peers"
CALIBRATION = (1, 2, 3, 4)
common.PACKAGES = ("torch", "torchvision", "timm", "brevitas", "nncf", "numpy")


def check(tool: str, network: Network, save: Any) -> None:
    """Check one network; `save` the record after each step."""
    import copy

    import torch

    from benchmarks.peers.counting import count
    from benchmarks.peers.tools import TOOLS
    from benchmarks.zoo.zoo_prepare import prepared

    convert, quantizers, disabled = TOOLS[tool]
    model = prepared(network)
    batch = inputs(network, 11)
    with torch.no_grad():
        expected = leaves(call(model, batch))
    total = count(model, lambda: call(model, batch), batch, []).total
    record: dict[str, Any] = {"group": network.group, "tool": tool, "macs": total}
    started = time.perf_counter()
    try:
        quantized, how = convert(copy.deepcopy(model), [inputs(network, seed) for seed in CALIBRATION], call)
    except Exception as error:
        save({**record, "converts": {"ok": False, "error": common.told(error)}})
        return
    record["converts"] = {"ok": True, "seconds": round(time.perf_counter() - started, 1), "how": how}
    save(record)
    try:
        with torch.no_grad(), disabled(quantized):
            record["identical"] = compared(expected, leaves(call(quantized, batch)))
    except Exception as error:
        record["identical"] = {"ok": False, "error": common.told(error)}
    save(record)
    try:
        found = count(quantized, lambda: call(quantized, batch), batch, quantizers(quantized))
        share = found.both / total if total else 1.0
        record["coverage"] = {"ok": share >= 0.995, "share": round(share, 6), "macs": found.total}
    except Exception as error:
        record["coverage"] = {"ok": False, "error": common.told(error)}
    save({**record, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})


def compared(expected: list[Any], found: list[Any]) -> dict[str, Any]:
    """Return whether outputs are identical; if not, also the largest difference relative to the largest output."""
    import torch

    found = [getattr(value, "value", value) for value in found]
    if [v.shape for v in expected] != [v.shape for v in found]:
        return {"ok": False, "why": "other outputs"}
    if all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
        return {"ok": True}
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    return {"ok": False, "relative": max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)}


def worker(tool: str, key: str, path: Path, memory: int) -> None:
    """Check one network by one tool in this process."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    check(tool, find(key), lambda record: path.write_text(json.dumps(record)))


def run_one(tool: str, network: Network, timeout: int, memory: int) -> dict[str, Any]:
    """Check one network by one tool in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [sys.executable, __file__, "--worker", tool, network.key, str(path), "--memory", str(memory)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BREVITAS_JIT": "0", "NNCF_EXTENSION_LOAD_TIMEOUT": "0"}
        try:
            done = subprocess.run(
                command, env=environment, timeout=timeout, capture_output=True, text=True, check=False
            )
            last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
            died = f"ended with {done.returncode}: {last}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            died = f"stopped after {timeout} s"
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            record = {"group": network.group, "tool": tool}
    if died:
        record.setdefault("converts", {"ok": False, "error": died})
        record["died"] = died
    return record


def cell(record: dict[str, Any], column: str) -> str:
    """Return one check as text."""
    found = record.get(column)
    if found is None:
        return "-"
    if "share" in found:
        return f"{int(found['share'] * 10000) / 100:.2f} %"
    if found.get("ok"):
        return "yes, layer by layer" if found.get("how", "").startswith("layerwise") else "yes"
    if "relative" in found:
        return f"no ({found['relative']:.1e})"
    return f"no: {found.get('error', found.get('why', ''))}".replace("|", "/")[:120]


def write(records: dict[str, Any]) -> None:
    """Write the records and the table."""
    command = " ".join(["python", "benchmarks/peers/run.py", *sys.argv[1:]])
    common.write(RESULT, {"command": command, "networks": records})
    tools = sorted({key.split(" ")[0] for key in records})
    columns = ("converts", "identical", "coverage")
    made = "Made by `python benchmarks/peers/run.py`; see `peers/README.md`."
    lines = ["# Brevitas and NNCF on the zoo", "", made, ""]
    lines += ["| | " + " | ".join(tools) + " |", "|" + "---|" * (len(tools) + 1)]
    for column in columns:
        counts = []
        for tool in tools:
            own = [r for key, r in records.items() if key.startswith(f"{tool} ")]
            counts.append(f"{sum(bool(r.get(column, {}).get('ok')) for r in own)} of {len(own)}")
        lines.append(f"| {column}{' >= 99.5 %' if column == 'coverage' else ''} | {' | '.join(counts)} |")
    heads = [f"{tool}: {column}" for tool in tools for column in columns]
    lines += ["", "| network | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    order = [n.key for n in networks()]
    for key in sorted({key.split(" ")[1] for key in records}, key=order.index):
        cells = [cell(records.get(f"{tool} {key}", {}), column) for tool in tools for column in columns]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    path = common.RESULTS / f"{RESULT}.md"
    temporary = path.with_suffix(".md.tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)


def main() -> None:
    """Check the networks that are still to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", nargs="*", choices=("brevitas", "nncf"), default=["brevitas", "nncf"])
    parser.add_argument("--group", choices=("timm", "torchvision"))
    parser.add_argument("--only", nargs="*", default=[], help="names or globs")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one network")
    parser.add_argument("--memory", type=int, default=8, help="GiB for one network")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        tool, key, path = args.worker
        worker(tool, key, Path(path), args.memory)
        return
    records: dict[str, Any] = common.read(RESULT).get("networks", {})
    for network in networks():
        if args.group not in (None, network.group):
            continue
        if args.only and not any(fnmatch.fnmatch(network.name, p) for p in args.only):
            continue
        for tool in args.tool:
            key = f"{tool} {network.key}"
            if key in records and not args.again:
                continue
            date = common.facts()["date"]
            records[key] = {"date": date, **run_one(tool, network, args.timeout, args.memory)}
            write(records)
            print(key, [cell(records[key], column) for column in ("converts", "identical", "coverage")], flush=True)


if __name__ == "__main__":
    main()
