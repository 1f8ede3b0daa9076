"""Is there a gap between training and deployment? ResNet-20: training forward against the frozen model.

The training forward runs with soft rounding and gradients, batch norm in evaluation mode; the frozen model runs on
integer codes. For every policy, the largest difference of the network's outputs and of the outputs of every layer is
measured, on held-out images:

    python benchmarks/exactness/gap.py --data cifar10_train.parquet --weights resnet20_cifar10.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from benchmarks.cifar_data import cifar10
from benchmarks.networks.resnet20 import resnet20

POLICIES: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in ("paper-w1a1", "paper-w2a2", "paper-w3a3", "paper-w4a4", "paper-w1a32")},
    **{f"default w{b}a{b}": {"w_bits": b, "a_bits": b} for b in (1, 2, 3, 4, 6, 8)},
}


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output of every convolution and linear, and of the model."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, i, y, name=name: seen.__setitem__(name, y.detach()))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    seen["output"] = model(x).detach()
    for handle in handles:
        handle.remove()
    return seen


def main() -> None:
    """Compare every policy and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    args = parser.parse_args()
    _, held_out = cifar10(args.data, 256)
    x = next(iter(held_out))[0][: args.images]
    results = {}
    for name, settings in POLICIES.items():
        qmodel = dq.quantize(resnet20(args.weights), **settings)
        dq.calibrate(qmodel, [x])
        qmodel.train()
        for module in qmodel.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        trained, frozen = outputs(qmodel, x), outputs(dq.freeze(qmodel), x)
        differing = sum(int((trained[key] != frozen[key]).sum()) for key in trained)
        elements = sum(value.numel() for value in trained.values())
        results[name] = {"layers": len(trained) - 1, "elements": elements, "differing": differing}
        print(f"{name}: {differing} of {elements} elements differ", flush=True)
    common.write("gap_resnet20", {"images": len(x), "results": results})


if __name__ == "__main__":
    main()
