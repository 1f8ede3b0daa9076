"""What does a training step at W4A4 cost in time and memory, relative to float, in daqconvert and in other tools?

ResNet-20 (32 px, batch 128), ResNet-18 (64 px, batch 32), MobileNetV2 (64 px, batch 32), DeiT-tiny (224 px, batch 8);
random weights, one fixed batch, SGD with momentum. All contenders quantize the same layers: every convolution and
linear layer but the first and the last. In the environment of `peers/README.md`:

    PYTHONPATH=src venv-peers/bin/python benchmarks/qat/qat_step.py [--networks resnet20 ...] [--contenders lsq ...]
    ... benchmarks/qat/qat_step.py --profile             # where the time of ours goes, operator by operator
    ... benchmarks/qat/qat_step.py --table               # results/qat_step.md again, from the records
    ... benchmarks/qat/qat_step.py --part losses --contenders daqconvert daqconvert-paper     # no times

The record of each piece (times of a network and a mode; memory of one contender) is written when it is done; it is
measured again only with `--again`. Times: `qat_timing.py`; memory: `qat_memory.py`; contenders: `qat_contenders.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

from benchmarks import common
from benchmarks.qat import qat_memory, qat_profile, qat_report, qat_timing
from benchmarks.qat.qat_contenders import CONTENDERS
from benchmarks.qat.qat_networks import NETWORKS
from daqconvert.report.progress import Bar, progress

RESULT = "qat_step"
common.PACKAGES = ("torch", "torchvision", "timm", "brevitas", "torchao", "numpy")


def facts() -> dict[str, str]:
    """Return the facts about machine and run in a few words; every piece keeps them."""
    found = common.facts()
    machine = found["machine"]
    return {
        "date": found["date"],
        "commit": found["commit"],
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "command": found["command"],
    }


def merge(network: str, mode: str, part: str, record: dict[str, Any], contender: str = "") -> None:
    """Put one finished piece into the records and write them, and the table."""
    records = common.read(RESULT).get("networks", {})
    place = records.setdefault(network, {}).setdefault(mode, {})
    if contender:
        place.setdefault(part, {})[contender] = {**record, "facts": facts()}
    else:
        place[part] = {**record, "facts": facts()}
    store(records)


def renew_losses(network: str, mode: str, contender: str) -> None:
    """Put the losses of a contender that was timed before into its record; its times stay as they were measured."""
    records = common.read(RESULT).get("networks", {})
    timed = records[network][mode]["time"]
    found = qat_timing.losses(network, mode, contender)
    timed["contenders"][contender]["loss"] = found
    timed.setdefault("losses", {})[contender] = facts()
    store(records)


def store(records: dict[str, Any]) -> None:
    """Write records and table, in the order of the networks."""
    ordered = {key: records[key] for key in NETWORKS if key in records}
    common.write(RESULT, {"targets": [list(row) for row in qat_report.targets(ordered)], "networks": ordered})
    qat_report.write(common.RESULTS / f"{RESULT}.md", ordered)


def pieces(args: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Return (part, network, mode, contender) of the pieces that are still to do; those of times have no contender."""
    records = common.read(RESULT).get("networks", {})
    todo = []
    for network in args.networks:
        for mode in args.modes:
            done = {} if args.again and args.part != "losses" else records.get(network, {}).get(mode, {})
            timed = done.get("time", {}).get("contenders", {})
            if args.part in ("time", "all") and not set(args.contenders) <= set(timed):
                todo.append(("time", network, mode, ""))
            if args.part == "losses":
                todo += [("losses", network, mode, name) for name in args.contenders if name in timed]
            if args.part in ("memory", "all"):
                known = done.get("memory", {})
                todo += [("memory", network, mode, name) for name in args.contenders if name not in known]
    return todo


def do(piece: tuple[str, str, str, str], args: argparse.Namespace, bar: Bar) -> None:
    """Measure one piece and write it."""
    part, network, mode, contender = piece
    at = f"{network}, {mode}"
    if part == "time":
        record = qat_timing.measure(
            network, mode, args.contenders, args.rounds, args.steps, args.seed,
            lambda word: bar.advance(1, at=f"{at}: {word}"),
        )  # fmt: skip
        merge(network, mode, "time", record)
    elif part == "losses":
        renew_losses(network, mode, contender)
        bar.advance(1, at=f"{at}: losses of {contender}")
    else:
        merge(network, mode, "memory", qat_memory.run(network, mode, contender, args.timeout), contender)
        bar.advance(1, at=f"{at}: memory of {contender}")


def weight(piece: tuple[str, str, str, str], args: argparse.Namespace) -> int:
    """Return how often a piece advances the bar."""
    return len(args.contenders) + args.rounds + 1 if piece[0] == "time" else 1


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the peers' warnings; one of ours must be seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="daqconvert")
        yield


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--modes", nargs="+", choices=qat_report.MODES, default=list(qat_report.MODES))
    parser.add_argument("--part", choices=("time", "memory", "losses", "all"), default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="steps of one contender in one round")
    parser.add_argument("--seed", type=int, default=0, help="of the order in each round")
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one process that measures memory")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--profile", action="store_true", help="instead: profile ours and float, operator by operator")
    parser.add_argument("--table", action="store_true", help="instead: write the table again")
    parser.add_argument("--json", action="store_true", help="print the records of these networks at the end")
    args = parser.parse_args()
    # in the order of the table, and always with float, which every ratio needs
    args.contenders = [name for name in CONTENDERS if name == "float" or name in args.contenders]
    return args


def main() -> None:
    """Measure what is still to do, and write records and table after each piece."""
    args = arguments()
    if args.table:
        store(common.read(RESULT).get("networks", {}))
    elif args.profile:
        for network in args.networks:
            for mode in args.modes:
                merge(network, mode, "profile", qat_profile.compare(network, qat_report.OURS, mode))
    else:
        todo = pieces(args)
        with quiet(), progress(sum(weight(piece, args) for piece in todo), "qat step") as bar:
            for piece in todo:
                do(piece, args, bar)
    records = common.read(RESULT).get("networks", {})
    if args.json:
        print(json.dumps({key: value for key, value in records.items() if key in args.networks}, indent=1))
    else:
        qat_report.show(records)


if __name__ == "__main__":
    main()
