"""Real architectures with random weights: chains, residual adds, depthwise blocks, attention."""

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision
from torch import nn

import daqconvert as dq
from daqconvert.deploy.onnx.expansion import expand

NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 32, {"w_bits": 4, "a_bits": 4}),
    "efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0", num_classes=10), 64, {"w_bits": 4}),
    "resnet10t, paper": (lambda: timm.create_model("resnet10t", num_classes=10), 32, {"preset": "paper-w1a2"}),
    "vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=10), 32, {"a_bits": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, frozen, tmp_path):
    make, side, settings = NETWORKS[name]
    x = torch.randn(8, 3, side, side)
    model = make()
    if "preset" in settings:
        qmodel = dq.quantize(model.eval(), **settings)
        dq.calibrate(qmodel, [x])
        model = dq.freeze(qmodel)
    else:
        model = frozen(model, x, first=(8, 8), last=(8, 8), **settings)
    report = dq.export(model, tmp_path / "model.onnx", x[:2], check_batches=[x])
    # What a last-bit difference of batch norm does at a tie: at most 1 code of 10,000 for the same input codes ...
    assert report.agrees, str(report)
    # ... and nothing at all in the sums of products: with every layer's codes given, float rounding alone remains.
    assert report.sqnr_same_codes > 100
    assert {layer.name for layer in report.layers} == {
        row.name for row in dq.plan(model).converted if row.settings.a_bits is not None
    }


@pytest.mark.slow
@pytest.mark.parametrize("deploy", ["float", "integer"])
@pytest.mark.parametrize("name", ["resnet50_gn", "poolformer_s12"])
def test_networks_with_group_norms(name, deploy, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 96, 96)
    qmodel = dq.quantize(timm.create_model(name, num_classes=20).eval(), w_bits=8, a_bits=8, deploy=deploy)
    dq.calibrate(qmodel, [x])
    report = dq.export(dq.freeze(qmodel), tmp_path / "model.onnx", x, check_batches=[torch.randn(3, 3, 96, 96)])
    assert report.agrees, str(report)
    assert report.sqnr_same_codes > 100


@pytest.mark.parametrize("deploy", ["float", "integer"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_group_norm(affine, deploy, frozen, tmp_path):
    norm = nn.GroupNorm(2, 8, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(2), nn.GroupNorm(8, 8))
    model.append(nn.Linear(64, 5))
    nn.init.constant_(model[0].bias, 3.0)  # the mean is no small number beside the deviation
    x = torch.randn(4, 3, 12, 12)
    model = frozen(model, x, w_bits=8, a_bits=8, deploy=deploy)
    report = dq.export(model, tmp_path / "model.onnx", x)
    assert report.agrees, str(report)
    assert report.sqnr_same_codes > 100


def test_shapes_that_onnx_does_not_infer_are_kept():
    """Operators of other domains and functions: the types and shapes that torch's exporter knows stay in the file."""
    node = onnx.helper.make_node
    nodes = [
        node("Own", ["x"], ["own"], domain="somebody"),
        node("GroupNormalization", ["own", "s", "b"], ["norm"], num_groups=2),
        node("Relu", ["norm"], ["relu"]),
        node("NoSuchOperator", ["relu"], ["output"]),
    ]
    value = onnx.helper.make_tensor_value_info
    x = [value(name, onnx.TensorProto.FLOAT, ["s0", 4, 5]) for name in ("x", "output")]
    known = [value(name, onnx.TensorProto.FLOAT, ["s0", 4, 5]) for name in ("own", "norm", "relu")]
    ones = [onnx.numpy_helper.from_array(np.ones(4, np.float32), name) for name in ("s", "b")]
    graph = onnx.helper.make_graph(nodes, "g", x[:1], x[1:], ones, value_info=known)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 21), ("somebody", 1))]
    found = expand(onnx.helper.make_model(graph, opset_imports=opsets), ["output"]).graph.value_info
    assert [v.name for v in found] == ["own", "norm"]
    assert [found[0].type.tensor_type.shape.dim[i].dim_value for i in (1, 2)] == [4, 5]
    assert found[0].type.tensor_type.shape.dim[0].dim_param == "batch"
