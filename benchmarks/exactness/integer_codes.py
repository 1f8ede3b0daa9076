r"""Integer deployment: do the frozen model, the int32 reference and ONNX Runtime agree in every code of every layer?

`tf_efficientnet_lite0` with published weights on 500 ImageNet images, and ResNet-20 on 2,000 held-out CIFAR-10 images,
calibrated on 64 of them, not trained. Each program computes on its own from the image; compared are the codes of every
layer's input and of every output quantizer. Also measured is the accuracy after each step: quantizing, quantizing the
outputs too, freezing; and with `--static` that of ONNX Runtime's own static int8, from the same calibration images.

    python benchmarks/exactness/integer_codes.py --imagenet imagenet_sample500.parquet --cifar cifar10_train.parquet \
        --weights resnet20_cifar10.safetensors [--static]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there

import daqconvert as dq
from benchmarks import common
from benchmarks.accuracy.imagenet_lite0 import images, network
from benchmarks.cifar_data import cifar10
from benchmarks.networks.resnet20 import resnet20
from daqconvert.deploy.comparing.probes import ModuleProbe, OnnxProbe
from daqconvert.functional.integer import int32_reference

WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W2A2": (2, 2), "W1A1": (1, 1)}
CHOSEN = {"tf_efficientnet_lite0": ("W8A8", "W4A8", "W4A4"), "resnet20": tuple(WIDTHS)}


@torch.no_grad()
def logits(model: Any, x: Tensor) -> Tensor:
    """Return the outputs of a model, in evaluation mode."""
    return torch.cat([model(batch) for batch in x.split(50)])


def differing(frozen: nn.Module, file: Path, x: Tensor) -> dict[str, Any]:
    """Count the codes that differ between the frozen model, the int32 reference and the file."""
    module, onnx = ModuleProbe(frozen), OnnxProbe(file, ["codes"])
    watch = {name for name, tensors in onnx.tensors.items() if tensors["codes"]}
    counts = {"reference": 0, "onnxruntime": 0}
    elements, layers, outputs = 0, dict.fromkeys(watch, 0), 0.0
    for batch in x.split(50):
        own = module.run((batch,), {}, watch)
        with int32_reference():
            reference = module.run((batch,), {}, watch)
        theirs = onnx.run((batch,), {}, watch)
        outputs = max(outputs, float((own.results[0] - theirs.results[0]).abs().max()))
        for name in watch:
            for a, b, c in zip(own.codes[name], reference.codes[name], theirs.codes[name], strict=True):
                elements += a.numel()
                counts["reference"] += int((a != b).sum())
                found = int((a != c).sum())
                counts["onnxruntime"] += found
                layers[name] += found
    worst = {name: count for name, count in layers.items() if count}
    return {"codes": elements, "layers": len(watch), "differ": counts, "where": worst, "largest_output": outputs}


def static_int8(model: nn.Module, chosen: Tensor, x: Tensor, folder: Path) -> Tensor:
    """Return the outputs of the float model in ONNX Runtime's own static int8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from daqconvert.deploy.onnx.runtime import OnnxModel

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(chosen.split(8))

        def get_next(self) -> Any:
            batch = next(self.rest, None)
            return None if batch is None else {"x": batch.numpy()}

    batch = torch.export.Dim("batch")
    torch.onnx.export(
        model, (chosen[:2],), folder / "float.onnx", input_names=["x"], dynamic_shapes={"x": {0: batch}},
        dynamo=True, verbose=False, external_data=False,
    )  # fmt: skip
    quant_pre_process(folder / "float.onnx", folder / "pre.onnx", skip_symbolic_shape=True)
    quantize_static(
        folder / "pre.onnx", folder / "int8.onnx", Reader(), per_channel=True, weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )  # fmt: skip
    return logits(OnnxModel(folder / "int8.onnx"), x)


def run(model: nn.Module, x: Tensor, labels: Tensor, widths: tuple[str, ...], static: bool) -> dict[str, Any]:
    """Calibrate on 64 images, freeze, export, and compare on all images."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    chosen = x[order[:64]]
    top1 = lambda y: round((y.argmax(1) == labels).float().mean().item() * 100, 2)  # noqa: E731
    rows: dict[str, Any] = {"images": len(x), "float": {"top1": top1(logits(model, x))}}
    with tempfile.TemporaryDirectory() as folder:
        if static:
            rows["static int8"] = {"top1": top1(static_int8(model, chosen, x, Path(folder)))}
            print("static int8", rows["static int8"], flush=True)
        for name in widths:
            w, a = WIDTHS[name]
            rows[name] = row = {}
            for deploy in ("float", "integer"):
                qmodel = dq.quantize(model, w_bits=w, a_bits=a, deploy=deploy)
                dq.calibrate(qmodel, chosen.split(16))
                qmodel.eval()
                row[f"top1 {deploy}"] = top1(logits(qmodel, x))
            frozen = dq.freeze(qmodel)
            y = logits(frozen, x)
            row["top1 frozen"] = top1(y)
            file = Path(folder) / f"{name}.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = dq.export(frozen, file, x[:4])
            row |= {"exported agrees": report.agrees, **differing(frozen, file, x)}
            print(name, row, flush=True)
    return rows


def main() -> None:
    """Run both networks; the results of each are written when it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", type=Path, help="parquet file of the 500 images")
    parser.add_argument("--cifar", type=Path, help="parquet file of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="state dict of ResNet-20")
    parser.add_argument("--images", type=int, default=2000, help="of CIFAR-10")
    parser.add_argument("--static", action="store_true", help="ONNX Runtime's own static int8 besides")
    args = parser.parse_args()
    result = common.read("integer_codes")
    result = {key: result[key] for key in CHOSEN if key in result}
    if args.cifar is not None:
        _, held_out = cifar10(args.cifar, args.images)
        x, labels = next(iter(held_out))
        result["resnet20"] = run(resnet20(args.weights).eval(), x, labels, CHOSEN["resnet20"], args.static)
        common.write("integer_codes", result)
    if args.imagenet is not None:
        model = network()
        x, labels = images(args.imagenet, model)
        name = "tf_efficientnet_lite0"
        result[name] = run(model, x, labels, CHOSEN[name], args.static)
        common.write("integer_codes", result)


if __name__ == "__main__":
    main()
