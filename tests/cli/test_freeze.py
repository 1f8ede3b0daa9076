"""`daqconvert freeze`: runs and models; what was frozen from a model is exported."""

from __future__ import annotations

import pytest
import torch

import daqconvert as dq
from daqconvert.artifact import read_manifest
from daqconvert.deploy.onnx.runtime import OnnxModel


def test_freeze_of_a_run(daq, run, tmp_path):
    assert "artifact" in daq("freeze", run).fails()
    assert daq("freeze", run, "--overwrite", "--json").json["bits"] == "W4A4"
    found = daq("freeze", run, "--out", tmp_path / "other", "--json").json
    assert found["source"] == "timm:test_resnet"
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(dq.load(run / "artifact")(x), dq.load(tmp_path / "other")(x))


def test_freeze_and_export_of_a_model(daq, finished, folder, tmp_path):
    pytest.importorskip("onnxruntime")
    weights = ("test_resnet", "--checkpoint", finished / "float.safetensors", "--data", folder, "--w-bits", "8")
    assert "--out PATH" in daq("freeze", *weights).fails()
    assert (
        daq("freeze", *weights, "--out", tmp_path / "artifact", "--json").json["bits"] == "W8A4"
    )  # one option changes one of the two
    assert "an artifact already" in daq("freeze", tmp_path / "artifact").fails()
    found = daq("export", tmp_path / "artifact", "--out", tmp_path / "a.onnx", "--input-size", "32", "--json").json
    assert found["agrees"] is True
    assert daq("export", *weights, "--out", tmp_path / "b.onnx", "--json").json["samples"] == 9
    x = torch.rand(1, 3, 32, 32)
    first, second = (OnnxModel(tmp_path / name)(x) for name in ("a.onnx", "b.onnx"))
    assert torch.allclose(first, second, atol=1e-4)


def test_images_that_only_calibrate_give_an_artifact_no_class_names(daq, folder, tmp_path, monkeypatch):
    """A model of four outputs and a folder of two classes: nothing says that these are its first two."""
    (tmp_path / "four_outputs.py").write_text(
        "import timm\n\n\ndef build():\n    return timm.create_model('test_resnet', num_classes=4)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = ("freeze", "four_outputs:build", "--data", folder, "--out", tmp_path / "artifact")
    daq(*made, "--json")
    assert read_manifest(tmp_path / "artifact").classes is None
    measured = ("eval", tmp_path / "artifact", "--model", "four_outputs:build", "--data", folder)
    assert "nothing says which of them these are" in daq(*measured).fails()
    names = tmp_path / "names.txt"
    names.write_text("light\nother\ndark\nmore\n")
    daq(*made, "--classes", names, "--overwrite", "--json")
    assert list(read_manifest(tmp_path / "artifact").classes) == ["light", "other", "dark", "more"]
    assert "2 of the 4 classes" in daq(*measured, "--json").json["data"]
