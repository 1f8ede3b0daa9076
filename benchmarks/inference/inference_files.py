"""The ONNX files that `inference.py` times: float, ONNX Runtime's own static int8, and ours; each is checked first.

Weights are random, batch-norm statistics come from two passes, and all contenders calibrate on the same few random
images. All files are made by `torch.onnx` with an open batch. The static int8 file has the settings with which ONNX
Runtime's own tool is fastest on x86: `quant_pre_process`, then QDQ, per channel, activations uint8 and weights int8
(int8 activations are slower).
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import daqconvert as dq
from daqconvert.deploy.exporting import export_float
from daqconvert.deploy.onnx.runtime import OnnxModel

FLOAT, STATIC = "float", "static int8"
PIXELS = 224
BATCHES, BATCH = 4, 4
"""Random images for calibration and for batch-norm statistics."""


@dataclass(frozen=True)
class Network:
    """A network, and the targets for our file of it.

    Attributes:
        source: Where the network comes from.
        bits: Bits of weights and inputs in our file.
        targets: Largest allowed ratio of our time to that of the float file, and to that of the static file.
    """

    source: str
    bits: tuple[tuple[int, int], ...]
    targets: tuple[float, float]


NETWORKS = {
    "resnet18": Network("torchvision:resnet18", ((4, 4),), (0.36, 1.10)),
    "mobilenet_v2": Network("torchvision:mobilenet_v2", ((4, 4),), (0.55, 1.15)),
    "tf_efficientnet_lite0": Network("timm:tf_efficientnet_lite0", ((4, 4),), (0.55, 1.15)),
    "deit_tiny_patch16_224": Network("timm:deit_tiny_patch16_224", ((8, 8), (4, 8)), (0.75, 1.10)),
}


@dataclass
class Made:
    """One contender's file.

    Attributes:
        path: The file.
        ours: Whether it is our file.
        check: Results of the check before it is timed.
    """

    path: Path
    ours: bool = False
    check: dict[str, Any] = field(default_factory=dict)


class Failed(Exception):
    """A contender that is not timed; the message says why."""


def build(network: Network) -> nn.Module:
    """Return the network in evaluation mode, with random weights and batch-norm statistics of random images."""
    from daqconvert.sources import build_model

    torch.manual_seed(0)
    model = build_model(network.source).train()
    with torch.no_grad():
        for images in calibration()[:2]:
            model(images)
    return model.eval()


def calibration() -> list[Tensor]:
    """Return the random batches that all contenders calibrate on."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, 3, PIXELS, PIXELS, generator=generator) for _ in range(BATCHES)]


def image() -> Tensor:
    """Return the one image that is timed."""
    return torch.randn(1, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(2))


def make(network: Network, folder: Path, deploy: str) -> tuple[dict[str, Made], dict[str, str]]:
    """Write every contender's file; return those that passed their check, and the reasons why others did not.

    Args:
        network: The network.
        folder: Where files go.
        deploy: `"integer"` or `"float"`: the policy's `deploy` for our file.
    """
    model, made, failed = build(network), {}, {}
    made[FLOAT] = Made(folder / "float.onnx")
    report = export_float(model, made[FLOAT].path, image(), overwrite=True)
    made[FLOAT].check = {"largest_difference_to_torch": report.largest_difference} | _runs(made[FLOAT].path, image())
    with torch.no_grad():
        reference = model(image())
    try:
        made[STATIC] = Made(folder / "static.onnx")
        static_int8(made[FLOAT].path, made[STATIC].path)
        made[STATIC].check = _runs(made[STATIC].path, image(), reference)
    except Exception as error:
        failed[STATIC] = told(error)
        del made[STATIC]
    for w_bits, a_bits in network.bits:
        name = f"ours W{w_bits}A{a_bits}" + (" integer" if deploy == "integer" else "")
        try:
            path = folder / f"w{w_bits}a{a_bits}.onnx"
            made[name] = Made(path, True, ours(model, path, w_bits, a_bits, deploy))
            made[name].check |= _runs(path, image(), reference)
        except Exception as error:
            failed[name] = told(error)
            made.pop(name, None)
    return made, failed


def ours(model: nn.Module, path: Path, w_bits: int, a_bits: int, deploy: str) -> dict[str, Any]:
    """Convert, calibrate, freeze and export; return what `export` found.

    Raises:
        Failed: If the file does not agree with the frozen model.
    """
    word = {"deploy": deploy} if deploy != "float" else {}
    qmodel = dq.quantize(model, w_bits=w_bits, a_bits=a_bits, example_inputs=image(), **word)
    dq.calibrate(qmodel, calibration())
    frozen = dq.freeze(qmodel)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not agree with the model.*")
        report = dq.export(frozen, path, image(), check_batches=calibration()[:1], overwrite=True)
    if not report.agrees:
        raise Failed(f"it does not agree with the frozen model: {'; '.join(report.problems())}")
    different = sum(layer.differing for layer in report.layers)
    return {"agrees": True, "codes": sum(layer.elements for layer in report.layers), "codes_differing": different}


def static_int8(source: Path, target: Path) -> None:
    """Write ONNX Runtime's own static int8 form of a float file."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = OnnxModel(source).input_names[0]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration())

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: batch.numpy()}

    prepared = source.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


def _runs(path: Path, x: Tensor, reference: Tensor | None = None) -> dict[str, Any]:
    """Load and run a file; return its SQNR relative to the float model, which for random weights means little.

    Raises:
        Failed: If an output is not finite.
    """
    output = OnnxModel(path, threads=1)(x)
    if not bool(output.isfinite().all()):
        raise Failed("its output is not finite")
    if reference is None:
        return {"finite": True}
    noise = float((output - reference).square().sum())
    sqnr = 10 * math.log10(float(reference.square().sum()) / noise) if noise else None
    return {"finite": True, "sqnr_to_float_db": None if sqnr is None else round(sqnr, 1)}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tool's log and warnings off the terminal."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def told(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, Failed) else f"{type(error).__name__}: {text}"
