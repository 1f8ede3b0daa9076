"""`daqconvert export` of a run, to an ONNX file and to a program; a run whose export fails loses nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from daqconvert.cli import deployment
from daqconvert.errors import ExportError


def test_export_of_a_run(daq, run):
    pytest.importorskip("onnxruntime")
    assert "model.onnx" in daq("export", run).fails()
    assert daq("export", run, "--overwrite", "--json").json["class_agreement"] == 1.0
    assert "agrees" in daq("export", run, "--out", run / "again.onnx").out


def test_export_to_a_program(daq, run):
    pytest.importorskip("onnxruntime")
    done = daq("export", run, "--out", run / "model.pt2")
    assert (done.code, "identical" in done.out) == (0, True), done.err
    assert torch.export.load(run / "model.pt2").module()(torch.randn(3, 3, 32, 32)).shape == (3, 2)
    assert daq("export", run, "--out", run / "model.pt2", "--overwrite", "--json").json["agrees"] is True
    assert "exists" in daq("export", run, "--out", run / "model.pt2").fails()
    found = daq("verify", run / "model.pt2", run / "model.onnx", "--images", "8", "--json")
    assert found.json["comparisons"][0]["agreement"] == 1.0


def test_an_export_that_fails_costs_a_run_nothing_else(daq, tiny, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")

    def refuse(*_, **__):
        raise ExportError("export: torch.onnx cannot write Net: no such operator.")

    monkeypatch.setattr(deployment, "export", refuse)
    done = daq("finetune", *tiny, "--out", tmp_path / "run", "--json")
    assert done.code == 2
    assert "torch.onnx cannot write Net" in done.err and "Traceback" not in done.err
    document = json.loads(done.out)
    assert document == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert document["failed"] == ["model.onnx: export: torch.onnx cannot write Net: no such operator."]
    assert (document["onnx"], document["onnx_class_agreement"]) == (None, None)
    assert set(document["bytes"]) == {"float", "artifact", "float_onnx"}
    assert set(document["seconds_per_image"]) == {"torch", "float_onnx"}
    there = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert {"artifact", "summary.json", "report.html", "float.onnx", "best.safetensors"} <= there
    assert "model.onnx" not in there
    monkeypatch.undo()
    assert "agrees" in daq("export", tmp_path / "run").out  # what is to be done next works
