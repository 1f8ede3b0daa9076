"""ONNX of frozen models whose products are calls: the file agrees, site by site, at other batch sizes too."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import ExportError
from daqconvert.layers import FrozenSite
from helpers import awkward_call_models as awkward_calls
from helpers.converted_networks import batch, float_network, quantized


def frozen(model, x, **settings):
    """Quantize with 4 bits everywhere, calibrate and freeze."""
    qmodel = dq.quantize(model.eval(), **{"w_bits": 4, "a_bits": 4, "first": (4, 4), "last": (4, 4)} | settings)
    dq.calibrate(qmodel, [x])
    return dq.freeze(qmodel)


def check(model, x, path, other=None, **options):
    """Export, and compare at a batch size that torch did not see; return the report."""
    report = dq.export(model, path, x, **options)
    assert report.agrees, str(report)
    assert sum(layer.differing_same for layer in report.layers) == 0, str(report)
    compared = dq.verify(model, path, [torch.cat([x, x, x]) if other is None else other])
    assert compared.first_difference is None
    assert compared.sqnr > 100  # float32 rounding alone: the codes are the same
    assert len(compared.layers) == sum(isinstance(m, FrozenSite) for m in model.modules())
    return report


@pytest.mark.parametrize(
    "name", ["bare", *(pytest.param(n, marks=pytest.mark.slow) for n in ("beit", "swin", "nfnet"))]
)
def test_networks(name, tmp_path):
    check(dq.freeze(quantized(name)), batch(name), tmp_path / "model.onnx")


def test_a_layer_with_its_own_forward_goes_by_its_name_everywhere(tmp_path):
    from timm.layers import ScaledStdConv2d

    x = torch.randn(2, 3, 8, 8)
    qmodel = dq.quantize(nn.Sequential(ScaledStdConv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval())
    dq.calibrate(qmodel, [x])
    model = dq.freeze(qmodel)
    report = check(model, x, tmp_path / "model.onnx")
    assert [layer.name for layer in report.layers] == ["0", "2"]
    for reference, candidate in ((qmodel, model), (qmodel, tmp_path / "model.onnx")):
        rows = dq.verify(reference, candidate, [x]).layers
        assert [(row.name, row.codes) for row in rows] == [("0", x.numel()), ("2", 2 * 4 * 8 * 8)]


@pytest.mark.parametrize("settings", [{}, {"attention": 3}], ids=["off", "3 bits"])
def test_attention_block(settings, tmp_path):
    x = torch.randn(2, 3, 8)
    model = frozen(awkward_calls.between(awkward_calls.SelfAttention, 8, 8), x, **settings)
    report = check(model, x, tmp_path / "model.onnx")
    products = {layer.name: layer.elements for layer in report.layers if "attention" in layer.name}
    queries, keys = 2 * 2 * 3 * 4, 2 * 2 * 3 * 4  # samples * heads * tokens * head size
    expected = {"scores": queries + keys, "values": 2 * 2 * 3 * 3 + keys} if settings else {}
    assert products == {f"inner.attn.attention_{key}_site": count for key, count in expected.items()}


def test_products_in_a_forward(tmp_path):
    x = batch("beit")
    model = frozen(float_network("beit"), x, attention=8)
    check(model, x, tmp_path / "model.onnx")
    names = {tensor.name for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    keys = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "scale")
    assert {f"attn.attention_values_site.{key}" for key in keys} <= names


def test_weights_mixed_for_every_sample_need_a_fixed_batch(tmp_path):
    x = torch.randn(2, 3, 9, 9)
    model = frozen(awkward_calls.Cond(), x)
    with pytest.raises(ExportError, match=r"torch\.onnx cannot write Cond: .*pass dynamic_batch=False"):
        dq.export(model, tmp_path / "model.onnx", x)
    check(model, x, tmp_path / "model.onnx", torch.randn(2, 3, 9, 9), dynamic_batch=False)
