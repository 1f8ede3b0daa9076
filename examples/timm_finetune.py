"""A timm model, your weights, your folder of images: quantized, trained, saved, and loaded again by name.

    python timm_finetune.py --model resnet18 --checkpoint my.safetensors --data imagenet/ --epochs 10 --out runs/a

`--data` has a folder of images for each class, or `train/` and `val/` with such folders. Without `--data` the example
uses scikit-learn's digits and a small network, which is trained in float first, because there are no weights for it.
"""

import argparse
import tempfile
from pathlib import Path

import timm
import torch

import daqconvert as dq
from daqconvert.data import Loaders, create_loaders, open_splits


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="test_resnet", help="a timm name")
    parser.add_argument("--checkpoint", help="your weights, as timm reads them; .safetensors or torch")
    parser.add_argument("--pretrained", action="store_true", help="timm's own weights, which it may download")
    parser.add_argument("--data", help="folder of images; without it the digits")
    parser.add_argument("--w-bits", type=int, default=4)
    parser.add_argument("--a-bits", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, help="run directory; by default a temporary one")
    return parser.parse_args()


def train_in_float(model: torch.nn.Module, data: Loaders, epochs: int = 4) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, labels in data.train:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()


def main() -> None:
    args = arguments()
    out = args.out or Path(tempfile.mkdtemp(prefix="daqconvert-"))
    torch.manual_seed(0)

    splits = open_splits(args.data) if args.data else None  # first, because it knows the number of classes
    shape = {"num_classes": splits.num_classes} if splits else {"num_classes": 10, "in_chans": 1}
    model = timm.create_model(args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint or "", **shape)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = create_loaders(splits, model, args.batch_size, num_workers=args.workers)  # at its own size
    print(f"{args.model} on {data.description}")
    if not (args.checkpoint or args.pretrained):
        train_in_float(model, data)
    print("float     ", dq.evaluate(model, data.val))

    qmodel = dq.quantize(model, w_bits=args.w_bits, a_bits=args.a_bits)
    print("calibrated", dq.calibrate(qmodel, data.calibration).batches, "batches,", dq.evaluate(qmodel, data.val))
    dq.finetune(
        qmodel,
        data.train,
        data.val,
        epochs=args.epochs,
        out_dir=out / "training",  # log, last and best checkpoint; resume=True goes on after an interruption
        on_epoch=lambda row: print(f"epoch {row['epoch']}    top-1 {row['val_top1']:.2%}, loss {row['val_loss']:.4f}"),
    )

    dq.save(dq.freeze(qmodel), out / "artifact", source=f"timm:{args.model}", source_kwargs=shape)
    again = dq.load(out / "artifact")  # built from the name in it; no download, no pickle
    size = sum(file.stat().st_size for file in (out / "artifact").iterdir())
    print("loaded    ", dq.evaluate(again, data.val))
    print(f"{out / 'artifact'}: {size / 1000:.0f} kB instead of {dq.plan(qmodel).float_bytes / 1000:.0f} kB")


if __name__ == "__main__":
    main()
