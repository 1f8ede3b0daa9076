"""Exported for integer deployment: every code of every layer in ONNX Runtime is the frozen model's."""

import json

import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import nn

import daqconvert as dq
from daqconvert.deploy.onnx.expansion import LAYERS_KEY
from helpers.integer_networks import NETWORKS, quantized

FLOAT_KERNELS = {"Conv", "FusedConv", "ConvInteger"}


def exported(qmodel, x, path, **settings):
    """Export; return the report, and the kinds of nodes that ONNX Runtime runs."""
    report = dq.export(dq.freeze(qmodel), path, x, **settings)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return report, [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def identical(report):
    return all(layer.differing == layer.differing_same == 0 for layer in report.layers)


WIDTHS = [(1, 2), (2, 2), (3, 3), (4, 4), (5, 7), (8, 8)]
FAST = [("joined", bits) for bits in WIDTHS] + [(name, (4, 4)) for name in NETWORKS if name != "joined"]
REST = [(name, bits) for name in NETWORKS for bits in WIDTHS if (name, bits) not in FAST]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(pytest.param(*one, id=f"{one[0]}-W{one[1][0]}A{one[1][1]}") for one in FAST),
        *(pytest.param(*one, id=f"{one[0]}-W{one[1][0]}A{one[1][1]}", marks=pytest.mark.slow) for one in REST),
    ],
)
def test_codes_are_identical_and_kernels_integer(tmp_path, name, bits):
    qmodel, x = quantized(name, *bits)
    report, kinds = exported(qmodel, x, tmp_path / "model.onnx", check_batches=[torch.randn_like(x) * 2])
    assert report.agrees and report.layers and identical(report)
    convolutions = sum(isinstance(m, nn.modules.conv._ConvNd) for m in qmodel.modules())
    assert kinds.count("QLinearConv") == convolutions and not FLOAT_KERNELS & set(kinds)
    assert not {"Gemm", "MatMul"} & set(kinds)


def test_outputs_are_the_same_floats(tmp_path):
    qmodel, x = quantized("residual")
    report, _ = exported(qmodel, x, tmp_path / "model.onnx")
    assert report.largest_difference == 0.0


def test_one_file_for_every_batch_size(tmp_path):
    qmodel, x = quantized("joined")
    report, _ = exported(qmodel, x[:1], tmp_path / "model.onnx", check_batches=[x[:1], x[:5]])
    assert identical(report)


def test_tensors_say_whose_they_are(tmp_path):
    qmodel, x = quantized("residual")
    exported(qmodel, x, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    layers = json.loads(next(p.value for p in model.metadata_props if p.key == LAYERS_KEY))
    assert layers["block.conv2"]["codes"] == layers["block.conv1"]["outputs"] == ["block.conv1.output_codes"]
    scale, zero_point = layers["block.conv1"]["grids"]["block.conv1.output_codes"]
    assert scale == pytest.approx(qmodel.block.conv2.input_quantizer.scale().item()) and zero_point == 0


def test_verify_sees_outputs_behind_what_was_folded(tmp_path):
    qmodel, x = quantized("residual", 8, 8)
    frozen = dq.freeze(qmodel)
    dq.export(frozen, tmp_path / "model.onnx", x)
    assert dq.verify(frozen, tmp_path / "model.onnx", [x]).identical
    report = dq.verify(qmodel, frozen, [x])
    rows = {row.name: row for row in report.layers}
    assert rows["block.conv1"].sqnr > 25 and rows["stem.0"].sqnr > 25


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torchvision.models.resnet18(num_classes=10), id="resnet18"),
        pytest.param(lambda: torchvision.models.mobilenet_v2(num_classes=10), id="mobilenet_v2"),
        pytest.param(lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10), id="tf_efficientnet_lite0"),
        pytest.param(lambda: timm.create_model("resnetblur18", num_classes=10), id="resnetblur18"),
        pytest.param(lambda: torchvision.models.densenet121(num_classes=10), id="densenet121", marks=pytest.mark.slow),
        pytest.param(lambda: timm.create_model("efficientnet_b0"), id="efficientnet_b0", marks=pytest.mark.slow),
        pytest.param(lambda: timm.create_model("regnety_002"), id="regnety_002", marks=pytest.mark.slow),
    ],
)
def test_networks_of_timm_and_torchvision(make, tmp_path):
    model, x = make(), torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        model.train()(x)
    qmodel = dq.quantize(model.eval(), w_bits=4, a_bits=4, deploy="integer")
    dq.calibrate(qmodel, [x])
    report, kinds = exported(qmodel, x, tmp_path / "model.onnx")
    assert identical(report) and report.agrees
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert kinds.count("QLinearConv") == convolutions


@pytest.mark.parametrize("seed", [0, 1])
def test_resnet18_at_8_bits(seed, tmp_path):
    # sums whose scale `freeze` moves, each read by two convolutions that share a quantizer
    torch.manual_seed(seed)
    model, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(2, 3, 112, 112)
    qmodel = dq.quantize(model, w_bits=8, a_bits=8, deploy="integer")
    dq.calibrate(qmodel, [x])
    report, kinds = exported(qmodel, x, tmp_path / "model.onnx")
    assert report.agrees and identical(report) and report.largest_difference == 0.0, str(report)
    assert kinds.count("QLinearConv") == 20 and kinds.count("QuantizeLinear") == 2  # of the image, and behind the mean
