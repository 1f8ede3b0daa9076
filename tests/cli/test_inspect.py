"""`daqconvert inspect`: runs, artifacts and models, and runs that did not finish."""

from __future__ import annotations

import json


def test_inspect(daq, finished, run):
    of_run = daq("inspect", finished, "--json").json
    assert of_run["kind"] == "run"
    assert of_run["files"]["model.onnx"] == (finished / "model.onnx").stat().st_size
    of_artifact = daq("inspect", finished / "artifact", "--json").json
    assert of_artifact["layers"]["layer1.0.conv1"] == ["4 channel integer", "4 unsigned"]
    of_model = daq("inspect", "test_resnet", "--json").json
    assert of_model["input_size"] == [3, 160, 160]
    assert [site["name"] for site in of_model["sites"] if site["first"]] == ["conv1.0"]
    assert "summary.json" in daq("inspect", finished).out
    progress = of_run["progress"]
    assert (progress["step"], progress["epochs_done"], progress["step_of_epoch"], progress["stop"]) == (4, 2, 0, None)
    assert progress["checkpoints"] == ["step-00000002.safetensors"]
    assert f"best epoch {progress['best_epoch']} (" in daq("inspect", finished).out
    (run / "summary.json").unlink()
    assert "not finished" in daq("inspect", run).out


def test_inspect_of_runs_that_stand_elsewhere(daq, run):
    warning = {"epoch": 2, "layer": "fc", "kind": "dead", "text": "fc: no gradient"}
    (run / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    assert "warnings: 1\n  epoch 2: fc: no gradient\n" in daq("inspect", run).out
    assert daq("inspect", run, "--json").json["warnings"] == [warning]
    last = run / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-9])
    assert "last.safetensors: damaged" in daq("inspect", run).out
    last.unlink()
    assert "not trained yet: it has no checkpoint" in daq("inspect", run).out
