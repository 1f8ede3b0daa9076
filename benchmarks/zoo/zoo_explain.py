"""Which sites make a network's SQNR fall below 20 dB, and the SQNR of the same network in ONNX Runtime's own W8A8.

Each site in turn is left in floating point, and the SQNR is measured again. The site that gains most is named; then
further sites are left in floating point, the best first, until 20 dB are reached. For comparison, ONNX Runtime's
`quantize_static` (QDQ, per-channel int8 weights, uint8 inputs, MinMax, else its defaults) quantizes the ONNX export of
the float network, calibrated and evaluated on the same batches.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import daqconvert as dq
from benchmarks import common
from benchmarks.zoo.zoo_checks import CALIBRATION, EVALUATION, decibel
from benchmarks.zoo.zoo_models import Network, floating, inputs
from benchmarks.zoo.zoo_prepare import prepared
from benchmarks.zoo.zoo_records import RESULT, short_facts, write
from daqconvert.models import quantized_sites
from daqconvert.report.progress import track

SHOWN = 8
GOAL = 20.0


def sqnr(reference: list[list[Tensor]], outputs: list[list[Tensor]]) -> float:
    """Return the SQNR over all batches and outputs, in dB."""
    pairs = [(a, b) for left, right in zip(reference, outputs, strict=True) for a, b in zip(left, right, strict=True)]
    signal = sum(float(a.double().square().sum()) for a, _ in pairs)
    return round(decibel(signal, sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)), 2)


@torch.no_grad()
def explain(network: Network, threads: int) -> None:
    """Write what was found into the network's record of `zoo.json` under `explained`."""
    torch.set_num_threads(threads)
    model = prepared(network)
    batches = [inputs(network, seed) for seed in EVALUATION]
    reference = [floating(model, batch) for batch in batches]
    qmodel = dq.quantize(model).eval()
    dq.calibrate(qmodel, (inputs(network, seed) for seed in CALIBRATION))

    def measure() -> float:
        return sqnr(reference, [floating(qmodel, batch) for batch in batches])

    found: dict[str, Any] = {**short_facts(), "db": measure(), **losers(qmodel, measure)}
    try:
        found["onnxruntime"] = {"db": onnxruntime_sqnr(network, model, reference)}
    except Exception as error:
        found["onnxruntime"] = {"error": common.told(error, 400)}
    records = common.read(RESULT).get("networks", {})
    records.setdefault(network.key, {"group": network.group})["explained"] = found
    write(records)
    print(network.key, {key: found[key] for key in ("db", "site", "without", "alone", "left_out", "onnxruntime")})


def losers(qmodel: nn.Module, measure: Any) -> dict[str, Any]:
    """Leave each site in floating point in turn, then several; return the SQNR that this gives."""
    sites = quantized_sites(qmodel)
    without = {}
    for name, site in track(sites.items(), "sites", len(sites)):
        site.enabled = False
        without[name] = measure()
        site.enabled = True
    order = sorted(without, key=lambda name: -without[name])
    left_out, reached = [], measure()
    for name in order[:SHOWN]:
        sites[name].enabled = False
        left_out.append([name, measure()])
        reached = left_out[-1][1]
        if reached >= GOAL:
            break
    for name, _ in left_out:
        sites[name].enabled = True
    best = order[0]
    return {"site": f"{best} ({type(sites[best]).__name__})", "without": without[best],
            "alone": [[name, without[name]] for name in order[:SHOWN]], "left_out": left_out}  # fmt: skip


class Floats(nn.Module):
    """A network that takes tensors and returns a flat tuple of its floating outputs, so that it can be exported."""

    def __init__(self, model: nn.Module, spec: Any) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the floating outputs."""
        return tuple(floating(self.model, tree_unflatten(list(tensors), self.spec)))


def onnxruntime_sqnr(network: Network, model: nn.Module, reference: list[list[Tensor]]) -> float:
    """Return the SQNR of ONNX Runtime's static W8A8 of the float network."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    spec = tree_flatten(inputs(network, 0))[1]

    def feed(seed: int) -> dict[str, Any]:
        return {f"in{i}": t.numpy() for i, t in enumerate(tree_flatten(inputs(network, seed))[0])}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([feed(seed) for seed in CALIBRATION])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("float.onnx", "prepared.onnx", "quantized.onnx")]
        names = list(feed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(Floats(model, spec).eval(), tuple(tree_flatten(inputs(network, 0))[0]), str(paths[0]),
                              input_names=names, dynamo=True, verbose=False, external_data=False)  # fmt: skip
        quant_pre_process(str(paths[0]), str(paths[1]), skip_symbolic_shape=True)
        quantize_static(str(paths[1]), str(paths[2]), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
        session = ort.InferenceSession(str(paths[2]), providers=["CPUExecutionProvider"])
        outputs = [[torch.from_numpy(y) for y in session.run(None, feed(seed))] for seed in EVALUATION]
    return sqnr(reference, outputs)
