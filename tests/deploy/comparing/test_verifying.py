"""Two models side by side: what is equal, what differs, and the layer where it starts."""

import json
import math

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.deploy.exporting import export_float
from daqconvert.errors import DataError, ExportError


@pytest.fixture
def pair(chain, images):
    """A float model with its quantized form, both in training mode."""
    for _ in range(2):
        chain(images)
    qmodel = dq.quantize(chain.eval(), w_bits=4, a_bits=4)
    dq.calibrate(qmodel, [images])
    return chain.train(), qmodel.train()


def test_quantized_and_frozen_are_identical(pair, images):
    report = dq.verify(pair[1], dq.freeze(pair[1]), [images, images[:3]])
    assert report.identical
    assert (report.samples, report.agreement, report.sqnr, report.first_difference) == (11, 1.0, math.inf, None)
    assert [(row.name, row.differing) for row in report.layers] == [("0", 0), ("3", 0), ("8", 0)]
    assert report.layers[0].codes == images.numel() + images[:3].numel()


def test_float_and_quantized(pair, images):
    report = dq.verify(*pair, [images])
    assert not report.identical
    assert [row.codes for row in report.layers] == [0, 0, 0]
    sqnr = [row.sqnr for row in report.layers]
    assert sqnr[0] > 30 > sqnr[1]  # 8 bits, then 4
    assert (report.first_below(30), report.first_below(-10)) == ("3", None)
    assert report.first_difference is None


def test_sqnr_is_that_of_the_outputs(pair, images):
    model, qmodel = (m.eval() for m in pair)
    with torch.no_grad():
        wanted, found = model(images).double(), qmodel(images).double()
    expected = 10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum())
    report = dq.verify(model, qmodel, [images[:5], images[5:]])
    assert report.sqnr == pytest.approx(expected.item(), rel=1e-5)  # float32 sums, in two batches
    assert report.largest_difference == pytest.approx((wanted - found).abs().max().item())
    assert report.agreement == (wanted.argmax(1) == found.argmax(1)).double().mean().item()


def test_first_layer_whose_codes_differ_is_named(pair, images):
    frozen = dq.freeze(pair[1])
    other = dq.freeze(pair[1])
    other[3].input_scale.mul_(1.5)
    report = dq.verify(frozen, other, [images])
    assert report.first_difference == "3"
    assert "codes first differ at 3: " in str(report)
    by_name = {row.name: row for row in report.layers}
    assert by_name["0"].differing == 0
    assert by_name["3"].differing > 0
    assert by_name["3"].largest >= 1


def test_files(pair, images, tmp_path):
    model, frozen = pair[0], dq.freeze(pair[1])
    dq.export(frozen, tmp_path / "small.onnx", images)
    assert export_float(model, tmp_path / "float.onnx", images).agrees
    report = dq.verify(frozen, str(tmp_path / "small.onnx"), [images])
    assert (report.agreement, report.first_difference, report.candidate) == (1.0, None, "small.onnx")
    assert [(row.name, row.codes > 0) for row in report.layers] == [("0", True), ("3", True), ("8", True)]
    mixed = dq.verify(tmp_path / "float.onnx", tmp_path / "small.onnx", [images])
    assert mixed.layers == ()  # a float file does not say which tensor belongs to which layer
    assert mixed.sqnr == pytest.approx(dq.verify(model, frozen, [images]).sqnr, abs=0.1)


def test_models_are_left_as_they_were(pair, images):
    dq.verify(*pair, [images])
    assert all(module.training for model in pair for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in pair for m in model.modules())


def test_hooks_are_removed_when_a_batch_fails(pair):
    with pytest.raises(RuntimeError):
        dq.verify(*pair, [torch.randn(1, 5, 4, 4)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in pair for m in model.modules())


def test_max_batches_reads_no_further(pair, images):
    def batches():
        yield images
        yield images[:2], torch.zeros(2)
        raise AssertionError("read too far")

    assert dq.verify(*pair, batches(), max_batches=2).samples == 10


def test_as_json(pair, images):
    data = json.loads(json.dumps(dq.verify(pair[1], pair[1], [images]).to_dict(), allow_nan=False))
    assert data["sqnr"] is None  # identical
    assert (data["agreement"], data["first_difference"]) == (1.0, None)


def test_no_batch(pair):
    with pytest.raises(DataError, match="verify: expected at least one batch"):
        dq.verify(*pair, [])


@pytest.mark.parametrize("bad", [3, None], ids=repr)
def test_neither_model_nor_file(bad, pair):
    with pytest.raises(ExportError, match="expected a torch model or the path of an ONNX file"):
        dq.verify(pair[0], bad, [])


def test_missing_file(pair, tmp_path):
    with pytest.raises(ExportError, match=r"none\.onnx: no such file"):
        dq.verify(pair[0], tmp_path / "none.onnx", [])


def test_file_that_is_no_model(pair, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"bad\.onnx: ONNX Runtime cannot load it"):
        dq.verify(pair[0], tmp_path / "bad.onnx", [])


def test_outputs_of_other_shapes(pair, images):
    with pytest.raises(ExportError, match=r"expected tensors of shapes \[\(8, 5\)\], found \[\(8, 6\)\]"):
        dq.verify(nn.Sequential(*pair[0], nn.Identity()), nn.Sequential(*pair[0], nn.Linear(5, 6)), [images])
