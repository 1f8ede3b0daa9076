"""Two models side by side: what is equal, what differs, and the layer where it starts."""

import json
import math

import onnx
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


class Residual(nn.Module):
    """Batch norms whose numbers change what a layer puts out, an activation, a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.after = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        for norm in (self.norm, self.after):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.after(self.conv(x)))
        return self.head(torch.relu(self.middle(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """One network in every form: float, and for both deployments quantized, frozen, artifact, ONNX file, program."""
    torch.manual_seed(0)
    folder, model, x = tmp_path_factory.mktemp("stages"), Residual(), torch.randn(8, 3, 12, 12) + 0.5
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(16, 3, 12, 12) + 0.5)
    model.eval()
    found = {"float": model}
    for deploy in ("float", "integer"):
        qmodel = dq.quantize(model, w_bits=8, a_bits=8, deploy=deploy)
        dq.calibrate(qmodel, [x])
        frozen = dq.freeze(qmodel)
        for suffix in ("onnx", "pt2"):
            found[deploy, suffix] = folder / f"{deploy}.{suffix}"
            dq.export(frozen, found[deploy, suffix], x)
        dq.save(frozen, folder / deploy)
        found |= {(deploy, "quantized"): qmodel, (deploy, "frozen"): frozen, (deploy, "artifact"): folder / deploy}
    return found, x


FORMS = [(deploy, kind) for deploy in ("float", "integer") for kind in ("quantized", "frozen", "artifact", "onnx")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_every_form_against_float_compares_equal_quantities(form, stages):
    models, x = stages
    report = dq.verify(models["float"], models[form], [x])
    sqnr = {row.name: row.sqnr for row in report.layers}
    assert list(sqnr) == ["stem", "conv", "middle", "head"]  # the order of execution
    assert all(value > 30 for value in sqnr.values()), sqnr  # 8 bits; another quantity has some 0 dB
    turned = dq.verify(models[form], models["float"], [x])
    assert list(sqnr) == [row.name for row in turned.layers if not row.name.endswith("output_quantizer")]
    assert all(row.sqnr == pytest.approx(sqnr[row.name], abs=0.3) for row in turned.layers if row.name in sqnr)


@pytest.mark.parametrize("deploy", ["float", "integer"])
def test_every_form_against_the_frozen_model(deploy, stages):
    models, x = stages
    frozen = models[deploy, "frozen"]
    for kind in ("onnx", "pt2"):
        for pair in ((frozen, models[deploy, kind]), (models[deploy, kind], frozen)):
            report = dq.verify(*pair, [x])
            assert report.sqnr > 100 and report.first_difference is None, (kind, str(report))
            assert all(row.sqnr > 100 for row in report.layers)
            assert bool(report.layers) == (kind != "pt2")  # a program does not say which tensors are whose
    with torch.no_grad():
        wanted = {"stem": torch.relu(models["float"].norm(models["float"].stem(x)))}
    if deploy == "integer":
        row = dq.verify(models["float"], models[deploy, "onnx"], [x]).layers[0]
        assert row.largest_difference < 0.1 * wanted["stem"].abs().max()


def test_two_files_of_which_one_has_its_batch_norms_folded_in(stages):
    """Codes are compared; the outputs before and after a batch norm are two quantities, and are not."""
    models, x = stages
    report = dq.verify(models["float", "onnx"], models["integer", "onnx"], [x])
    assert [(row.name, row.sqnr is None, row.codes > 0) for row in report.layers] == [
        ("stem", True, True), ("conv", True, True), ("middle", True, True), ("head", False, True),
    ]  # fmt: skip
    assert report.layers[0].differing == 0


def test_a_file_of_an_earlier_version_does_not_say_what_it_folded(stages, tmp_path):
    models, x = stages
    proto = onnx.load(models["integer", "onnx"])
    (entry,) = [e for e in proto.metadata_props if e.key == "daqconvert.epilogues"]
    proto.metadata_props.remove(entry)
    onnx.save(proto, tmp_path / "earlier.onnx")
    rows = dq.verify(models["float"], tmp_path / "earlier.onnx", [x]).layers
    assert [row.name for row in rows] == ["head"]  # its output alone is that of the layer itself
    rows = dq.verify(models["integer", "quantized"], tmp_path / "earlier.onnx", [x]).layers  # its plan says it
    assert all(row.sqnr > 30 for row in rows)


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
