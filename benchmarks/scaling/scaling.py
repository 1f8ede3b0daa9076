"""Are time and memory of conversion, calibration and training linear in the size of the model, with one copy of it?

    PYTHONPATH=src OMP_NUM_THREADS=2 python benchmarks/scaling/scaling.py [--parts quantize calibrate depth ...]
    ... benchmarks/scaling/scaling.py --parts depth --rounds 3        # a short trial
    ... benchmarks/scaling/scaling.py --table                         # the plot and the summary again, from the record

`quantize`: a ViT-L (300 million parameters, random weights) at W4A4, default policy, in fresh processes. Measured are
seconds, the largest growth of resident memory, and the most that torch's allocator gave out, both over the bytes of
the state dict: 1 is the copy that `quantize` returns. `calibrate`: the whole of `calibrate` over four batches,
compared with the same four forward passes of the float network, in turns. `depth`, `width`, `batch`:
`scaling_steps.py`. The record of each part is written when it is done. Every network is checked before it is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from benchmarks.qat import qat_memory
from benchmarks.scaling import scaling_plot, scaling_steps
from daqconvert.report.progress import progress

RESULT = "scaling"
PARTS = ("quantize", "calibrate", *scaling_plot.PARTS)
LARGE = "vit_large_patch16_224"
PROCESSES = 3  # fresh processes that quantize the large network
BATCHES = 4  # of calibration
TARGETS = {"quantize": 10.0, "calibrate": 1.5}
"""Most seconds of `quantize`, most times the forward passes of `calibrate`."""
common.PACKAGES = ("torch", "torchvision", "timm", "numpy")

# ---------------------------------------------------------------------------------------------------------- quantize


def quantize_worker(network: str, tensors: bool) -> dict[str, Any]:
    """Quantize a network in this process.

    Args:
        network: A timm name.
        tensors: Measure bytes in tensors, which takes the profiler and more time, instead of time and RSS.

    Raises:
        SystemExit: If the result is not what it should be.
    """
    import timm

    torch.manual_seed(0)
    model = timm.create_model(network, pretrained=False).eval()
    dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), w_bits=4, a_bits=4)  # imports are not counted
    state = model.state_dict()
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": sum(t.numel() * t.element_size() for t in state.values()),
    }
    gc.collect()
    if tensors:
        found: list[nn.Module] = []
        peak = qat_memory.peak_of_last_step(lambda: lambda: found.append(_quantize(model)), steps=1)
        record["tensor_bytes"] = peak["peak_bytes"] - peak["base_bytes"]
        return record
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, cpu, start = _status("VmRSS"), time.process_time(), time.perf_counter()
    qmodel = _quantize(model)
    record |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    record |= {"rss_growth_bytes": _status("VmHWM") - before, "sites": len(dq.plan(qmodel).converted)}
    if record["sites"] < 90 or any(not torch.equal(qmodel.state_dict()[key], value) for key, value in state.items()):
        raise SystemExit(f"quantize: expected 90 sites or more and the weights as they were; found {record['sites']}")
    return record


def _quantize(model: nn.Module) -> nn.Module:
    return dq.quantize(model, w_bits=4, a_bits=4)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def quantize(args: argparse.Namespace, tick: Callable[[str], None]) -> dict[str, Any]:
    """Quantize the large network in several fresh processes."""
    records = []
    for i in range(PROCESSES + 1):
        command = [sys.executable, __file__, "--worker", args.network, *(["--tensors"] if i == PROCESSES else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
        if done.returncode:
            raise SystemExit(f"quantize: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        records.append(json.loads(done.stdout.splitlines()[-1]))
        tick(args.network)
    *timed, counted = records
    size = counted["state_bytes"]
    return {
        "network": args.network, "parameters": counted["parameters"], "state_bytes": size, "sites": timed[0]["sites"],
        "seconds": round(statistics.median(r["seconds"] for r in timed), 3),
        "all_seconds": [round(r["seconds"], 3) for r in timed],
        "cpu_seconds": [round(r["cpu_seconds"], 3) for r in timed],
        "rss_growth_over_state": round(max(r["rss_growth_bytes"] for r in timed) / size, 4),
        "tensor_peak_over_state": round(counted["tensor_bytes"] / size, 4),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- calibrate


@dataclass(frozen=True)
class Network:
    """A network to calibrate, and its batch."""

    make: Callable[[], nn.Module]
    batch: int


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return make


NETWORKS = {
    "resnet18": Network(_torchvision("resnet18"), 32),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2"), 16),
    "deit_tiny": Network(_timm("deit_tiny_patch16_224"), 8),
}


def calibrate(args: argparse.Namespace, tick: Callable[[str], None]) -> dict[str, Any]:
    """Calibrate each network, in turns with the forward passes of the float network."""
    return {name: _calibrate(name, network, args.rounds, tick) for name, network in NETWORKS.items()}


def _calibrate(name: str, network: Network, rounds: int, tick: Callable[[str], None]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = network.make().eval()
    batches = [torch.randn(network.batch, 3, 224, 224) for _ in range(BATCHES)]
    qmodel = _quantize(model)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    _check(name, model, qmodel, batches)
    plain()
    times: dict[str, list[tuple[float, float]]] = {"forward": [], "calibrate": []}
    for i in range(rounds):
        turns = {"forward": plain, "calibrate": lambda: dq.calibrate(qmodel, batches)}
        for key in list(turns)[:: 1 if i % 2 else -1]:
            times[key].append(_timed(turns[key]))
        tick(name)
    wall, cpu = ({key: [t[i] for t in found] for key, found in times.items()} for i in (0, 1))
    return {
        "batch": network.batch, "batches": BATCHES,
        "ratio": round(statistics.median(_ratios(wall)), 4), "ratios": [round(r, 3) for r in _ratios(wall)],
        "cpu_ratio": round(statistics.median(_ratios(cpu)), 4),
        **{f"{key}_seconds": round(statistics.median(found), 4) for key, found in wall.items()},
    }  # fmt: skip


def _check(name: str, model: nn.Module, qmodel: nn.Module, batches: list[torch.Tensor]) -> None:
    report = dq.calibrate(qmodel, batches)
    with torch.no_grad(), dq.disabled(qmodel):
        same = torch.equal(qmodel.eval()(batches[0]), model(batches[0]))
    ordered = all(row.lower <= 0.0 < row.upper and row.upper <= max(row.maximum, 0.0) for row in report.inputs)
    if report.unseen or not ordered or not same or report.batches != BATCHES:
        raise SystemExit(f"calibrate, {name}: not what it should be: {report}")


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return wall-clock seconds and processor seconds."""
    gc.collect()
    used, start = _used(), time.perf_counter()
    run()
    return time.perf_counter() - start, _used() - used


def _used() -> float:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def _ratios(times: dict[str, list[float]]) -> list[float]:
    return [mine / other for mine, other in zip(times["calibrate"], times["forward"], strict=True)]


# -------------------------------------------------------------------------------------------------------------- main


def measure(part: str, args: argparse.Namespace, tick: Callable[[str], None]) -> dict[str, Any]:
    """Measure one part."""
    if part == "quantize":
        return quantize(args, tick)
    if part == "calibrate":
        return calibrate(args, tick)
    return scaling_steps.measure(part, args.rounds, args.seed, tick)


def weight(part: str, args: argparse.Namespace) -> int:
    """Return how often a part ticks."""
    if part == "quantize":
        return PROCESSES + 1
    return args.rounds * len(NETWORKS) if part == "calibrate" else scaling_steps.pieces(args.rounds)


def store(parts: dict[str, Any]) -> None:
    """Write record and plot."""
    common.write(RESULT, {"targets": TARGETS, "parts": {part: parts[part] for part in PARTS if part in parts}})
    scaling_plot.draw(parts, common.RESULTS / f"{RESULT}.png")


def summary(parts: dict[str, Any]) -> str:
    """Return the record in a few lines."""
    lines = []
    if found := parts.get("quantize"):
        lines.append(
            f"quantize {found['network']}: {found['seconds']} s (target {TARGETS['quantize']:g}), memory over the "
            f"state dict: RSS {found['rss_growth_over_state']}, tensors {found['tensor_peak_over_state']}"
        )
    for name, row in parts.get("calibrate", {}).items():
        lines.append(f"calibrate {name}: {row['ratio']} of its forward passes (target {TARGETS['calibrate']:g})")
    for part in scaling_plot.PARTS:
        for quantity, ratios in parts.get(part, {}).get("ratios", {}).items():
            fits = {name: parts[part]["lines"][name][quantity]["r2"] for name in scaling_steps.CONTENDERS}
            lines.append(f"{part}, {quantity}: R^2 {fits}, to float {ratios}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0, help="of the order in each round")
    parser.add_argument("--network", default=LARGE, help="timm name of the network to quantize")
    parser.add_argument("--table", action="store_true", help="instead: write the plot again")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--tensors", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the parts that are asked for, and write record and plot after each."""
    args = arguments()
    if args.worker:
        print(json.dumps(quantize_worker(args.worker, args.tensors)))
        return
    asked = [] if args.table else args.parts
    with progress(sum(weight(part, args) for part in asked), "scaling") as bar:
        for part in asked:
            record = measure(part, args, lambda word, part=part: bar.advance(1, at=f"{part}: {word}"))
            store({**common.read(RESULT).get("parts", {}), part: record})
    parts = common.read(RESULT).get("parts", {})
    if args.table:
        store(parts)
    print(summary(parts))


if __name__ == "__main__":
    main()
