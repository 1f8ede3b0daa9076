"""Gradients of rounding in short training: ResNet-20 on CIFAR-10, the published recipe cut to a few epochs.

The variants are: for each bit-width the paper's settings with DAQ's gradient and with those of the baselines, all else
equal; daqconvert's default settings; and the best recipe that we know for so few epochs (`BEST`), with DAQ, with STE,
and with one part of it left out. Accuracy is that of the frozen model on the file's last 5,000 rows, which no run
trains on (the float network was trained on them too, so only comparisons count). Runs can be resumed; each result and
the table of all results are written when a run ends:

    python benchmarks/accuracy/cifar10.py --data cifar10_train.parquet \
        --weights resnet20_cifar10.safetensors --epochs 10
    python benchmarks/accuracy/cifar10.py ... --only w1a1-daq w1a1-ste --seeds 0 1
    python benchmarks/accuracy/cifar10.py ... --device cuda --jobs 16
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from benchmarks.cifar_data import cifar10
from benchmarks.networks.resnet20 import resnet20

SHOWN = ("epoch", "train_loss", "val_top1", "seconds")
WIDTHS = ("w1a1", "w1a32", "w2a2", "w4a4")
VARIANTS: dict[str, dict[str, Any]] = {
    f"{width}-{rounding}": {"preset": f"paper-{width}", "rounding": rounding}
    for width in WIDTHS
    for rounding in ("daq", "ste")
}
VARIANTS |= {f"w2a2-{rounding}": {"preset": "paper-w2a2", "rounding": rounding} for rounding in ("ewgs", "dsq", "lsq")}
VARIANTS |= {f"w{bits}a{bits}-default": {"w_bits": bits, "a_bits": bits} for bits in (1, 2)}
BEST: dict[str, Any] = {"distill": 0.5, "temperature": 2.0, "final_a_sigma": 2.0, "final_sigma_bits": 2}
TAUGHT = {**BEST, "lr": 0.05, "features": ("auto",), "feature_weight": 1.0}  # every block is taught, at half the lr
REBUILT = {**TAUGHT, "lr": 0.03, "reconstruct": 100, "reconstruct_batches": 16}  # and is reconstructed before
RECIPES: dict[str, dict[str, Any]] = {  # what each changes of `paper-cifar10`
    "best": BEST,
    "best-ste": BEST,
    "best-flat": {**BEST, "final_a_sigma": 0.0},
    "best-undistilled": {**BEST, "distill": 0.0},
    "taught": TAUGHT,
    "taught-ste": TAUGHT,
    "rebuilt": REBUILT,
    "rebuilt-ste": REBUILT,
    "rebuilt-flat": {**REBUILT, "final_a_sigma": 0.0},
}
for base in ("best", "rebuilt"):  # shapes of DAQ's slope: how far it sharpens, or how peaked it is from the start
    RECIPES |= {f"{base}-to{sigma}": {**RECIPES[base], "final_a_sigma": float(sigma)} for sigma in (1, 4)}
    RECIPES |= {f"{base}-a{sigma}": {**RECIPES[base], "final_a_sigma": 0.0} for sigma in (1, 2)}
    RECIPES[f"{base}-both"] = {**RECIPES[base], "final_w_sigma": 2.0}  # weights sharpen too
    RECIPES[f"{base}-weights"] = {**RECIPES[base], "final_w_sigma": 2.0, "final_a_sigma": 0.0}  # weights alone sharpen
SETTINGS: dict[str, dict[str, Any]] = {"ste": {"rounding": "ste"}, "a1": {"a_sigma": 1.0}, "a2": {"a_sigma": 2.0}}
VARIANTS |= {
    f"w{bits}a{bits}-{kind}": {"w_bits": bits, "a_bits": bits} | SETTINGS.get(kind.rpartition("-")[2], {})
    for bits in (1, 2)
    for kind in RECIPES
}
TWICE = [f"{width}-{kind}" for width in ("w1a1", "w2a2") for kind in ("daq", "ste", "best", "best-ste")]


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one variant and return its result."""
    torch.set_num_threads(args.threads)
    logging.getLogger("torch").setLevel(logging.ERROR)
    settings = VARIANTS[name]
    train, held_out = cifar10(args.data, 256, args.device, args.images)
    qmodel = dq.quantize(resnet20(args.weights).to(args.device), **settings)
    paper = "preset" in settings
    torch.manual_seed(seed)
    dq.calibrate(qmodel, train, method="std" if paper else "mse", max_batches=1 if paper else 8)
    if args.device == "cpu":
        qmodel.compile()
    changes = RECIPES.get(name.partition("-")[2], {})
    result = dq.finetune(
        qmodel, train, held_out, recipe="paper-cifar10", **changes, epochs=args.epochs, seed=seed, resume=True,
        out_dir=args.work / f"{name}-{budget(args)}-s{seed}", checkpoint_steps=50,
        on_epoch=lambda row: print(name, seed, {k: row[k] for k in SHOWN}, flush=True),
    )  # fmt: skip
    return {
        "name": name,
        "settings": settings,
        "recipe": changes,
        "seed": seed,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "commit": common.facts()["commit"],
        "top1": dq.evaluate(dq.freeze(qmodel), held_out).top1,  # the result is that of the frozen model
        "top1_by_epoch": [row["val_top1"] for row in result.history],
        "train_loss": [row["train_loss"] for row in result.history],
        "val_loss": result.history[-1]["val_loss"],
        "seconds": sum(row["seconds"] for row in result.history),
    }


def budget(args: argparse.Namespace) -> str:
    """Return epochs and, if not all are used, training images, for names of files: `e10`, `e3_n15000`."""
    return f"e{args.epochs}" + (f"_n{args.images}" if args.images else "")


def spread(values: list[float], digits: int) -> str:
    """Return the mean as text; with several values also the least and the largest."""
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{ends}"


def table(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """Return a Markdown table of means over seeds; with several seeds also the least and the largest value."""
    length = f"{args.epochs} epochs" + (f" of {args.images:,} images" if args.images else "")
    rows = [
        f"ResNet-20, CIFAR-10's held-out rows, {length}, top-1 of the frozen model: mean (least to largest).",
        "", "| | seeds | top-1 % | held-out loss | training loss |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in VARIANTS:
        found = [result for result in results.values() if result["name"] == name]
        if not found:
            continue
        top1 = spread([100 * result["top1"] for result in found], 2)
        known = all("val_loss" in result for result in found)  # the first runs did not keep it
        held_out = spread([result["val_loss"] for result in found], 3) if known else "-"
        loss = spread([result["train_loss"][-1] for result in found], 3)
        rows.append(f"| {name} | {len(found)} | {top1} | {held_out} | {loss} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run the variants that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of the 50,000 training images")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the float ResNet-20")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=0, help="train on the first so many only, for quick comparisons")
    parser.add_argument("--seeds", type=int, nargs="*", help="default: 0, and 1 for what is in TWICE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, default=2, help="of each run")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    title = f"cifar10_resnet20_{budget(args)}"
    known = common.read(title).get("results", {})
    wanted = [(n, s) for n in args.only for s in args.seeds or ((0, 1) if n in TWICE else (0,))]
    wanted = [(name, seed) for name, seed in wanted if f"{name}-s{seed}" not in known]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, name, seed, args) for name, seed in wanted]):
            result = future.result()
            key = f"{result['name']}-s{result['seed']}"
            results = {**common.read(title).get("results", {}), key: result}  # another process may have added its own
            path = common.write(title, {"epochs": args.epochs, "results": results})
            path.with_suffix(".md").write_text(table(results, args))
            print(key, result["top1"], flush=True)


if __name__ == "__main__":
    main()
