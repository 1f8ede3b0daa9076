"""How fast is a quantized network in ONNX Runtime, beside float and beside ONNX Runtime's own static int8?

ResNet-18, MobileNetV2, EfficientNet-Lite0, DeiT-tiny; random weights; batch 1, 224 px, 2 threads. Each contender has a
process of its own, and they take turns. Ratios are of medians over rounds, of the median times within a round.

    PYTHONPATH=src python benchmarks/inference/inference.py [--networks resnet18 ...] [--rounds 15]
    ... benchmarks/inference/inference.py --table              # results/inference.md again, from the records

The record of a network is written when it is done; it is measured again only with `--again`. Files and their checks:
`inference_files.py`; integer kernels: `inference_graph.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

from benchmarks import common
from benchmarks.inference import inference_report
from benchmarks.inference.inference_files import FLOAT, NETWORKS, STATIC, Made, image, make
from benchmarks.inference.inference_graph import count
from daqconvert.deploy.comparing.timing import Timing, onnx_opener, time_in_turns
from daqconvert.report.progress import progress

RESULT = "inference"


def measure(key: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return everything about one network: checks, kernels, times."""
    with tempfile.TemporaryDirectory() as folder:
        made, failed = make(NETWORKS[key], Path(folder), args.deploy)
        records = {name: _described(one, args.threads) for name, one in made.items()}
        with progress(len(made) * (args.rounds + 1), key) as bar:
            times = time_in_turns(
                {name: onnx_opener(one.path, image()) for name, one in made.items()},
                args.threads, args.rounds, args.repeats, args.warmup, lambda name: bar.advance(1, of=name),
            )  # fmt: skip
    for name, timing in times.items():
        records[name] |= _figures(timing, times)
    records |= {name: {"failed": why} for name, why in failed.items()}
    settings = {"deploy": args.deploy, "threads": args.threads, "rounds": args.rounds, "repeats": args.repeats}
    return {"source": NETWORKS[key].source, **settings, "contenders": records, "facts": common.facts()}


def _described(made: Made, threads: int) -> dict[str, Any]:
    return {
        "ours": made.ours, "bytes": made.path.stat().st_size, "check": made.check, "kernels": count(made.path, threads)
    }  # fmt: skip


def _figures(timing: Timing, times: dict[str, Timing]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ms": round(timing.median * 1e3, 3),
        "p95_ms": round(timing.p95 * 1e3, 3),
        "ms_rounds": [round(value * 1e3, 3) for value in timing.rounds],
    }
    for key, base in (("of_float", FLOAT), ("of_static", STATIC)):
        if base in times:
            by_round = [own / other for own, other in zip(timing.rounds, times[base].rounds, strict=True)]
            found[key] = round(timing.median / times[base].median, 4)
            found[f"{key}_quartiles"] = [round(value, 4) for value in _quartiles(by_round)]
    return found


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return [quarters[0], quarters[2]]


def store(records: dict[str, Any]) -> None:
    """Write records and table, in the order of the networks."""
    ordered = {key: records[key] for key in NETWORKS if key in records}
    targets = [list(row) for row in inference_report.targets(ordered)]
    common.write(RESULT, {"targets": targets, "networks": ordered})
    inference_report.write(common.RESULTS / f"{RESULT}.md", ordered)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls in a turn")
    parser.add_argument("--warmup", type=int, default=5, help="calls before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--deploy", choices=("integer", "float"), default="integer", help="of ours")
    parser.add_argument("--again", action="store_true", help="also networks that are done already")
    parser.add_argument("--table", action="store_true", help="instead: write the table again")
    return parser.parse_args()


def main() -> None:
    """Measure what is still to do, and write records and table after each network."""
    args = arguments()
    torch.set_num_threads(args.threads)
    records = common.read(RESULT).get("networks", {})
    for key in [] if args.table else args.networks:
        if args.again or key not in records:
            records[key] = measure(key, args)
            store(records)
    if args.table:
        store(records)
    inference_report.show(records)


if __name__ == "__main__":
    main()
