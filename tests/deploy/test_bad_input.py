"""What cannot be exported is refused by name, and leaves nothing behind."""

import errno
import importlib.util
import os
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.deploy import exporting as module
from daqconvert.deploy.exporting import export_float
from daqconvert.errors import DataError, ExportError


@pytest.fixture
def small(frozen):
    """A frozen linear and its input."""
    x = torch.randn(4, 6)
    return frozen(nn.Linear(6, 3), x), x


class Deciding(nn.Module):
    """Control flow that depends on values."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.a(-x)


def test_float_model():
    with pytest.raises(ExportError, match=r"Linear has no frozen layer.*daqconvert\.freeze\(qmodel\)"):
        dq.export(nn.Linear(6, 3), "model.onnx", torch.randn(4, 6))


def test_quantized_model():
    qmodel = dq.quantize(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(ExportError, match=r"0 is quantized but not frozen.*daqconvert\.freeze\(model\)"):
        dq.export(qmodel, "model.onnx", torch.randn(4, 6))


def test_float_export_of_a_frozen_model(small, tmp_path):
    with pytest.raises(ExportError, match="expected the original float model"):
        export_float(small[0], tmp_path / "model.onnx", small[1])


@pytest.mark.parametrize("given", ["image.png", None, (), {"x": 3}], ids=repr)
def test_example_inputs_of_another_kind(given, small, tmp_path):
    with pytest.raises(ExportError, match="example_inputs: expected a tensor, a tuple"):
        dq.export(small[0], tmp_path / "model.onnx", given)


def test_example_inputs_of_another_shape(small, tmp_path):
    with pytest.raises(ExportError, match="Linear cannot run on example_inputs: RuntimeError"):
        dq.export(small[0], tmp_path / "model.onnx", torch.randn(4, 7))
    assert not list(tmp_path.iterdir())


def test_model_that_torch_cannot_follow(frozen, tmp_path, capfd):
    x = torch.rand(4, 6)
    with pytest.raises(ExportError, match=r"torch\.export cannot follow Deciding.*pass dynamic_batch=False"):
        dq.export(frozen(Deciding(), x), tmp_path / "new" / "model.onnx", x)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")  # torch prints its graph; the error is enough


def test_existing_file(small, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"model\.onnx exists\. Pass overwrite=True"):
        dq.export(small[0], path, small[1])
    assert path.read_bytes() == b"mine"


def test_directory(small, tmp_path):
    with pytest.raises(ExportError, match="is a directory; expected the name of a file"):
        dq.export(small[0], tmp_path, small[1], overwrite=True)


def test_parent_directories_are_made(small, tmp_path):
    assert dq.export(small[0], tmp_path / "a" / "b" / "model.onnx", small[1]).agrees
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["model.onnx"]


def test_full_disk(small, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match=r"model\.onnx: could not be written \(No space left"):
        dq.export(small[0], path, small[1], overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"mine"


def test_parent_that_is_a_file(small, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match="file is a file, not a directory"):
        dq.export(small[0], tmp_path / "file" / "new" / "model.onnx", small[1])


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package(package, small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == package else find(name, *args)
    )
    with pytest.raises(ExportError, match=rf"needs {package}, which is not installed.*'daqconvert\[export\]'"):
        dq.export(small[0], tmp_path / "model.onnx", small[1])


def test_a_model_over_two_gigabytes(small, tmp_path):
    """Its tensor is never touched, so it takes no memory: it has to be refused before anything is copied."""
    model, x = small
    model.register_buffer("table", torch.empty(600_000_000))
    with pytest.raises(ExportError, match=r"Linear has 2\.40 GB of .* ends at 2 GB\. Export it to a name .*\.pt2"):
        dq.export(model, tmp_path / "new" / "model.onnx", x)
    with pytest.raises(ExportError, match=r"Linear has 2\.40 GB"):
        module.export_float(nn.Linear(24_500, 24_500, device="meta"), tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())


def test_codes_count_with_their_bits_towards_the_two_gigabytes(small, tmp_path, monkeypatch):
    model, x = small
    floats = 4 * sum(t.numel() for name, t in model.state_dict().items() if name != "weight_codes" and t.dim())
    monkeypatch.setattr(module, "LARGEST", floats + model.weight_codes.numel())  # 3 bits each, not 8
    assert model.settings.w_bits == 3
    module._check_size(model)
    monkeypatch.setattr(module, "LARGEST", floats)
    with pytest.raises(ExportError, match="ends at 2 GB"):
        dq.export(model, tmp_path / "model.onnx", x)


def test_a_file_that_became_too_large_is_told_so(small, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("This protobuf of onnx model is too large (>2GiB).")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    monkeypatch.setattr(module, "_check_size", lambda _: None)
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(ExportError, match="not valid ONNX: an ONNX file ends at 2 GB"):
        dq.export(small[0], tmp_path / "model.onnx", small[1])
    assert not list(tmp_path.iterdir())


def test_batch_of_another_kind(small, tmp_path):
    with pytest.raises(DataError, match="expected a tensor"):
        dq.export(small[0], tmp_path / "model.onnx", small[1], check_batches=["no batch"])
    assert not list(tmp_path.iterdir())


def test_file_that_does_not_agree_is_said_so(small, tmp_path, monkeypatch):
    """Every scale of the file doubled: the report, and a warning, must name what is wrong."""
    expand = module.expand

    def doubled(proto, names):
        proto = expand(proto, names)
        for tensor in proto.graph.initializer:
            if tensor.name == "scale":
                tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), tensor.name))
        return proto

    monkeypatch.setattr(module, "expand", doubled)
    with pytest.warns(UserWarning, match=r"model\.onnx does not agree with the model: for the same codes the output"):
        report = dq.export(small[0], tmp_path / "model.onnx", small[1])
    assert not report.agrees
    assert "DOES NOT AGREE" in str(report)
    assert Path(report.path).is_file()
