"""`daqconvert bench`: what it times, and what it says."""

import json
import shutil

import pytest

KEYS = ["torch", "float_onnx", "frozen", "onnx"]
QUICK = ("--rounds", "2", "--repeats", "2", "--threads", "1")


def test_table_and_json(daq, finished):
    found = daq("bench", finished, *QUICK, "--batch", "2", "--json").json
    assert [found[key] for key in ("model", "bits", "batch", "input", "threads")] == [
        "timm:test_resnet", "W4A4", 2, [3, 32, 32], 1
    ]  # fmt: skip
    models = found["models"]
    assert list(models) == KEYS
    summary = json.loads((finished / "summary.json").read_text())["bytes"]
    sizes = {"torch": "float", "float_onnx": "float_onnx", "frozen": "artifact", "onnx": "onnx"}
    assert {key: row["bytes"] for key, row in models.items()} == {key: summary[name] for key, name in sizes.items()}
    for key, base in {"torch": "torch", "frozen": "torch", "onnx": "float_onnx"}.items():
        row = models[key]
        assert row["time_of_float"] == row["median_s"] / models[base]["median_s"]
        assert row["bytes_of_float"] == row["bytes"] / models[base]["bytes"]
        assert len(row["rounds_s"]) == 2 and 0 < min(row["rounds_s"]) <= row["median_s"] <= row["p95_s"] * 2
    assert models["onnx"]["bytes_of_float"] < 0.5


def test_files_that_are_not_there(daq, run):
    (run / "model.onnx").unlink()
    (run / "float.onnx").unlink()
    found = daq("bench", run, *QUICK)
    assert "| W4A4, frozen | PyTorch | artifact" in found.out
    assert "ONNX Runtime" not in found.out
    assert found.out.splitlines()[0].endswith("timm:test_resnet, 1x3x32x32 a call, 1 threads, 2 rounds of 2")
    assert f"{run} has no float.onnx: not timed.\n" in found.err
    assert f"{run} has no model.onnx: not timed. daqconvert export {run} makes it." in found.err


@pytest.mark.parametrize("option", ["--batch", "--threads", "--rounds", "--repeats"])
def test_numbers_below_one(daq, finished, option):
    assert daq("bench", finished, option, "0").fails() == f"{option} 0: expected 1 or more."


def test_sources_that_are_no_run(daq, finished, tmp_path):
    assert "expected a run directory" in daq("bench", finished / "artifact").fails()
    assert "expected a run directory" in daq("bench", "test_resnet").fails()
    assert "neither a run directory" in daq("bench", tmp_path).fails()


def test_a_file_that_cannot_be_timed(daq, run):
    (run / "model.onnx").write_bytes(b"no model")
    shutil.rmtree(run / "artifact")
    (run / "float.onnx").unlink()
    assert "onnx: " in daq("bench", run, *QUICK).fails()


def test_own_code_is_built_only_when_typed(daq, own_model, folder, tmp_path):
    path = tmp_path / "own"
    arguments = ("--data", folder, "--float-epochs", "1", "--epochs", "1", "--batch-size", "6", "--input-size", "16")
    arguments += ("--no-onnx",)
    made = daq("finetune", own_model, *arguments, "--out", path)
    assert made.code == 0, made.err
    assert f"add --model {own_model}" in daq("bench", path, *QUICK).fails()
    assert list(daq("bench", path, *QUICK, "--model", own_model, "--json").json["models"]) == ["torch", "frozen"]
