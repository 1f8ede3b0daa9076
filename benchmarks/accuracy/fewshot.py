"""How much of a real ImageNet checkpoint's accuracy do a few hundred unlabelled images bring back at low bits?

The network is tf_efficientnet_lite0, the recipe `fewshot`. One half of 500 ImageNet images, without labels, is used to
distil the float model; the other half, with labels, evaluates the frozen model. Then the halves are swapped, and the
results averaged. Each run can be resumed, and its result is written when it ends:

    python benchmarks/accuracy/fewshot.py --data imagenet_sample500.parquet [--only W4A8 W4A4]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from benchmarks.accuracy.imagenet_lite0 import WIDTHS, compare, images, logits, mean, network
from daqconvert.data.parquet import ParquetImages


class Unlabelled(Dataset[tuple[Tensor]]):
    """Training images without their labels: random crop and flip, as the float network was trained.

    Args:
        path: Parquet file.
        rows: Rows of the file that are used.
        model: The network, which determines size and normalization.
    """

    def __init__(self, path: Path, rows: Tensor, model: nn.Module) -> None:
        config = timm.data.resolve_data_config({}, model=model)
        config = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
        self.transform = timm.data.create_transform(**config, is_training=True, scale=(0.35, 1.0), color_jitter=0.0)
        self.images, self.rows = ParquetImages(path, lambda image: image.convert("RGB")), rows.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self.transform(self.images[self.rows[index]][0]),)


def run(name: str, half: int, args: argparse.Namespace, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Train on one half; evaluate the frozen model, and the model before the first step, on the other."""
    model = network().to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    halves = order[: len(x) // 2], order[len(x) // 2 :]
    train, held_out = halves if half == 0 else halves[::-1]
    reference = logits(model, x[held_out])
    w_bits, a_bits = WIDTHS[name]
    qmodel = dq.quantize(model, w_bits=w_bits, a_bits=a_bits)
    loader = DataLoader(Unlabelled(args.data, train, model), batch_size=25, shuffle=True, drop_last=True)
    dq.calibrate(qmodel, x[train].split(25), max_batches=6)
    untrained = compare(logits(qmodel, x[held_out]), reference, labels[held_out])
    started = time.perf_counter()
    dq.finetune(
        qmodel, loader, recipe="fewshot", epochs=args.epochs, gptq=args.gptq, resume=True, checkpoint_steps=20,
        out_dir=args.work / f"{name.lower()}-half{half}-e{args.epochs}{'-gptq' if args.gptq else ''}",
        on_epoch=lambda row: print(name, half, row["epoch"], row["train_loss"], row["seconds"], flush=True),
    )  # fmt: skip
    trained = time.perf_counter() - started
    found = compare(logits(dq.freeze(qmodel), x[held_out]), reference, labels[held_out])
    minutes = round(trained / 60, 2)  # reconstruction, epochs and evaluation in the last call
    return {**found, "untrained_top1": untrained["top1"], "minutes": minutes}


def main() -> None:
    """Do the runs that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of the 500 images")
    parser.add_argument("--work", type=Path, default=Path("runs/fewshot"), help="where checkpoints go")
    parser.add_argument("--epochs", type=int, default=dq.training.recipe("fewshot").epochs)
    parser.add_argument("--gptq", type=int, default=0, help="batches for GPTQ; a result of its own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(WIDTHS), default=["W4A8", "W4A4"])
    parser.add_argument("--halves", type=int, nargs="*", choices=(0, 1), default=[0, 1], help="those that train")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, labels = images(args.data, network())
    result = "fewshot_gptq" if args.gptq else "fewshot"
    for name in args.only:
        for half in args.halves:
            key = f"{name}-half{half}"
            if key not in common.read(result).get("runs", {}):
                found = run(name, half, args, x, labels)
                known = {**common.read(result).get("runs", {}), key: found}  # another process may have added its own
                common.write(result, {**_kept(result), "epochs": args.epochs, "runs": known})
                print(key, found, flush=True)
        runs = common.read(result)["runs"]
        both = [runs[key] for key in (f"{name}-half0", f"{name}-half1") if key in runs]
        if len(both) == 2:
            means = {**common.read(result).get("means", {}), name: mean(both)}
            common.write(result, {**_kept(result), "epochs": args.epochs, "means": means})
            print(name, means[name], flush=True)


def _kept(result: str) -> dict[str, Any]:
    return {key: value for key, value in common.read(result).items() if key in ("runs", "means")}


if __name__ == "__main__":
    main()
