"""Does the default hold in short training? ResNet-20 on CIFAR-10, the published recipe cut to a few epochs.

For each bit-width: the paper's settings with DAQ's gradient, the same with a straight-through estimator, and
daqconvert's default; same seed, same recipe, same number of epochs. Accuracy is on the last 5,000 rows of the file,
which no run trains on. Each run is resumable and its result is written as it ends:

    python benchmarks/cifar10.py --data cifar10_train.parquet --weights resnet20_cifar10.safetensors
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import common
import torch
from cifar_data import cifar10
from networks.resnet20 import resnet20

import daqconvert as dq

SHOWN = ("epoch", "train_loss", "val_top1", "seconds")
VARIANTS: dict[str, dict[str, Any]] = {
    "w1a1-paper-daq": {"preset": "paper-w1a1"},
    "w1a1-paper-ste": {"preset": "paper-w1a1", "rounding": "ste"},
    "w1a1-default": {"w_bits": 1, "a_bits": 1},
    "w2a2-paper-daq": {"preset": "paper-w2a2"},
    "w2a2-paper-ste": {"preset": "paper-w2a2", "rounding": "ste"},
    "w2a2-default": {"w_bits": 2, "a_bits": 2},
}


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one variant and return its result."""
    settings = VARIANTS[name]
    train, held_out = cifar10(args.data, 256)
    model = resnet20(args.weights)
    qmodel = dq.quantize(model, **settings)
    paper = "preset" in settings
    torch.manual_seed(args.seed)
    dq.calibrate(qmodel, train, method="std" if paper else "mse", max_batches=1 if paper else 8)
    qmodel.compile()
    result = dq.finetune(
        qmodel, train, held_out, recipe="paper-cifar10", epochs=args.epochs, seed=args.seed,
        out_dir=args.work / f"{name}-e{args.epochs}-s{args.seed}", resume=True,
        on_epoch=lambda row: print(name, {k: row[k] for k in SHOWN}, flush=True),
    )  # fmt: skip
    frozen = dq.freeze(qmodel)
    check = dq.evaluate(frozen, held_out).top1  # the reported figure is the frozen model's
    return {
        "settings": settings,
        "top1": check,
        "top1_by_epoch": [row["val_top1"] for row in result.history],
        "train_loss": [row["train_loss"] for row in result.history],
        "seconds": sum(row["seconds"] for row in result.history),
    }


def main() -> None:
    """Run the variants that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of the 50,000 training images")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of the float ResNet-20")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("torch").setLevel(logging.ERROR)
    title = f"cifar10_resnet20_e{args.epochs}_s{args.seed}"
    for name in args.only:
        if name in common.read(title).get("results", {}):
            continue
        result = run(name, args)
        results = {**common.read(title).get("results", {}), name: result}  # another process may have added its own
        common.write(title, {"epochs": args.epochs, "seed": args.seed, "results": results})
        print(name, result["top1"], flush=True)


if __name__ == "__main__":
    main()
