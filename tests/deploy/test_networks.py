"""Real architectures with random weights: chains, residual adds, depthwise blocks, attention."""

import pytest
import timm
import torch
import torchvision

import daqconvert as dq

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
