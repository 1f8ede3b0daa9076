"""`daqconvert eval`: runs, artifacts and models, on their own data and on others."""

from __future__ import annotations

import json


def test_eval_of_a_run(daq, finished):
    found = daq("eval", finished, "--json").json
    summary = json.loads((finished / "summary.json").read_text())
    results = found["results"]
    assert list(results) == ["float", "W4A4, quantized", "W4A4, frozen"]
    assert results["float"]["top1"] == summary["top1"]["float"]
    assert results["W4A4, quantized"] == results["W4A4, frozen"]
    assert results["W4A4, frozen"]["top1"] == summary["top1"]["quantized"]
    text = daq("eval", finished).out
    assert "W4A4, frozen" in text


def test_eval_of_an_artifact_and_of_other_data(daq, finished, folder, tmp_path):
    found = daq("eval", finished / "artifact", "--data", folder, "--json").json
    assert found["results"]["W4A4, frozen"] == daq("eval", finished, "--json").json["results"]["W4A4, frozen"]
    other = daq("eval", finished, "--data", folder / "train", "--holdout", "0.5", "--json").json
    assert other["results"]["float"]["images"] == 6


def test_eval_of_a_model(daq, finished, folder):
    weights = finished / "float.safetensors"
    arguments = ("eval", "test_resnet", "--checkpoint", weights, "--data", folder)
    found = daq(*arguments, "--w-bits", "8", "--a-bits", "8", "--json").json["results"]
    assert list(found) == ["float", "W8A8, calibrated"]
    assert found["float"]["top1"] == json.loads((finished / "summary.json").read_text())["top1"]["float"]
    assert list(daq(*arguments, "--json").json["results"]) == ["float"]
    assert "random weights" in daq("eval", "test_resnet", "--data", folder).fails()
    assert "does not fit ResNet" in daq("eval", "test_resnet", "--checkpoint", weights).fails()  # ten digits
