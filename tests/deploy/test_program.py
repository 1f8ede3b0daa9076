"""A `.pt2` file: the reloaded program computes what the frozen model computes, every element."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.deploy import exporting
from daqconvert.errors import ExportError


def program(path):
    return torch.export.load(path).module()


@pytest.mark.parametrize("deploy", ["float", "integer"])
def test_reloaded_it_is_the_model(frozen, chain, images, tmp_path, deploy):
    model = frozen(chain, images, deploy=deploy)
    report = dq.export(model, tmp_path / "model.pt2", images[:1])
    assert report.agrees and report.samples == 2 and report.to_dict()["agrees"] and "identical" in str(report)
    again = program(tmp_path / "model.pt2")
    assert torch.equal(again(images), model(images)) and torch.equal(again(images[:3]), model(images[:3]))
    assert report.file_bytes == (tmp_path / "model.pt2").stat().st_size


def test_a_fixed_batch(frozen, chain, images, tmp_path):
    model = frozen(chain, images)
    dq.export(model, tmp_path / "model.pt2", images, dynamic_batch=False)
    again = program(tmp_path / "model.pt2")
    assert torch.equal(again(images), model(images))
    with pytest.raises(Exception, match=r"8"):
        again(images[:3])


def test_dtype_is_kept(frozen, chain, images, tmp_path):
    model = frozen(chain, images).to(torch.bfloat16)
    assert dq.export(model, tmp_path / "model.pt2", images.to(torch.bfloat16)).agrees


def test_what_cannot_be_followed_leaves_no_file(frozen, images, tmp_path):
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) if float(x.sum()) > 1e9 else self.conv(-x)

    model = frozen(Deciding(), images)
    with pytest.raises(ExportError, match="torch.export cannot follow Deciding"):
        dq.export(model, tmp_path / "model.pt2", images)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(frozen, chain, images, tmp_path):
    (tmp_path / "model.pt2").write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        dq.export(frozen(chain, images), tmp_path / "model.pt2", images)
    assert (tmp_path / "model.pt2").read_text() == "mine"


def test_notes_name_transposed_convolutions(frozen, images, tmp_path):
    model = frozen(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1)), images)
    report = dq.export(model, tmp_path / "model.onnx", images)
    assert any("1 transposed convolution (0): packed" in note for note in report.notes)


@pytest.mark.parametrize(
    ("deploy", "w_bits", "a_bits", "layers"),
    [
        ("float", 8, 8, 1),  # convolutions compute in float there
        ("float", 7, 8, 0),  # 2 * 255 * 63
        ("integer", 8, 8, 3),
        ("integer", 7, 8, 2),  # two convolutions, whose weights are stored times 127 // 63
        ("integer", 2, 8, 2),
        ("integer", 8, 7, 0),  # 2 * 127 * 127
        ("integer", 4, 4, 0),
    ],
)
def test_sums_that_saturate_without_vnni_are_told(
    deploy, w_bits, a_bits, layers, frozen, chain, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("daqconvert.deploy.exporting.exact_int8", lambda: False)
    model = frozen(chain, images, w_bits=w_bits, a_bits=a_bits, deploy=deploy)
    report = dq.export(model, tmp_path / "model.onnx", images)
    told = [note for note in report.notes if "VNNI" in note]
    assert [int(note.split()[0]) for note in told] == ([layers] if layers else [])
    assert all("a_bits = 7" in note for note in told)


class Odd(nn.Module):
    """An output whose elements are NaN and infinite, beside a plain one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return y, y * float("nan"), y / 0.0 * 0.5


def test_equal_nans_and_infinities_are_identical_and_others_are_not(frozen, images, tmp_path, monkeypatch):
    model = frozen(Odd(), images)
    assert dq.export(model, tmp_path / "model.pt2", images).agrees

    class Without(nn.Module):
        def forward(self, x):
            y, nan, infinite = model(x)
            return y, torch.zeros_like(nan), infinite

    monkeypatch.setattr(exporting, "_loaded", lambda *_: Without())
    with pytest.warns(UserWarning, match=r"model\.pt2 does not agree with the model: an output differs by inf"):
        report = dq.export(model, tmp_path / "model.pt2", images, overwrite=True)
    assert not report.agrees and "DOES NOT AGREE" in str(report)
    assert report.to_dict()["largest_difference"] is None


def test_check_batches_are_compared_too(frozen, chain, images, tmp_path):
    report = dq.export(frozen(chain, images), tmp_path / "model.pt2", images[:1], check_batches=[images, images[:3]])
    assert (report.samples, report.agrees) == (2 + 8 + 3, True)


def test_a_tensor_that_a_forward_keeps_is_told_because_no_program_does(frozen, images, tmp_path):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            self.kept = self.conv(x)
            return self.kept

    model = frozen(Keeping(), images)
    with pytest.warns(UserWarning, match=r"tensor attribute.*kept.*assigned during export"):
        dq.export(model, tmp_path / "model.pt2", images)
    dq.export(model, tmp_path / "model.onnx", images)  # of a copy: without a warning
