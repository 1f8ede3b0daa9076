"""`daqconvert export` of a run."""

from __future__ import annotations

import pytest


def test_export_of_a_run(daq, run):
    pytest.importorskip("onnxruntime")
    assert "model.onnx" in daq("export", run).fails()
    assert daq("export", run, "--overwrite", "--json").json["class_agreement"] == 1.0
    assert "agrees" in daq("export", run, "--out", run / "again.onnx").out
