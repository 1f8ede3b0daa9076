from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import daqconvert as dq
from daqconvert.deploy.onnx.runtime import OnnxModel


def test_plan_of_a_model(daq):
    found = daq("plan", "test_resnet", "--w-bits", "2", "--a-bits", "float", "--first", "float", "--json").json
    rows = {row["site"]["name"]: row for row in found["rows"]}
    assert rows["conv1.0"]["settings"] is None
    assert (rows["layer1.0.conv1"]["settings"]["w_bits"], rows["layer1.0.conv1"]["settings"]["a_bits"]) == (2, None)
    assert found["macs"] > 10**8
    assert found["bytes"] < found["float_bytes"] / 4
    text = daq("plan", "test_resnet").out
    assert "layer4.0.conv2" in text
    assert "4 channel integer" in text


def test_plan_options_that_name_layers(daq):
    names = ("--include", "layer1.*", "--include", "layer4.*", "--exclude", "*.conv2")
    bits = ("--bits", "layer4.*=2/float", "--bits", "layer1.0.conv1=3", "--attention", "6", "--share-inputs")
    found = daq("plan", "test_resnet", *names, *bits, "--json").json
    rows = {row["site"]["name"]: row for row in found["rows"]}
    told = {name: row["settings"] for name, row in rows.items() if row["settings"]}
    assert all(name.startswith(("layer1.", "layer4.")) and "conv2" not in name for name in told)
    assert [told["layer4.0.conv1"][key] for key in ("w_bits", "a_bits", "share_inputs")] == [2, None, True]
    assert (told["layer1.0.conv1"]["w_bits"], told["layer1.0.conv1"]["a_bits"]) == (3, 3)
    assert (rows["conv1.0"]["reason"], rows["layer1.0.conv2"]["reason"]) == ("not included", "excluded")
    row = rows["layer1.0.conv1"]
    assert (row["bops"], row["float_bops"]) == (row["site"]["macs"] * 9, row["site"]["macs"] * 1024)
    assert row["weight_bytes"] < row["float_bytes"] / 10 and row["scale_bytes"] == 4 * row["site"]["out_channels"] + 5
    assert found["bops"] == sum(row["bops"] for row in rows.values()) and found["input_groups"] == {}
    assert found["params"] == found["float_bytes"] // 4


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--bits", "fc"), "--bits 'fc': expected LAYER=W/A"),
        (("--bits", "fc=1/2/3"), "--bits 'fc=1/2/3': expected LAYER=W/A"),
        (("--bits", "fc=x"), "--bits fc= 'x': expected 1 to 8, or float."),
        (("--bits", "fcc=2"), 'bits: "fcc" matches no layer. Nearest: fc'),
        (("--include", "fcc"), 'include: "fcc" matches no layer. Nearest: fc'),
        (("--attention", "9"), "attention: expected the bits of both operands"),
        (("--attention", "yes"), "--attention 'yes': expected 1 to 8, or float."),
        (("--toml", "-", "--diff", "b.toml"), "--toml - and --diff would both print"),
        (("--diff", "missing.toml"), "missing.toml does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_plan_options_refused(daq, option, told):
    assert told in daq("plan", "test_resnet", *option).fails()


def test_plan_as_a_policy_file(daq, tmp_path):
    asked = ("plan", "test_resnet", "--w-bits", "3", "--bits", "layer4.*=2", "--last", "float")
    path = tmp_path / "plans" / "a.toml"
    rows = daq(*asked, "--toml", path, "--json").json["rows"]
    again = daq("plan", "test_resnet", "--policy", path, "--json").json["rows"]
    assert [(row["settings"], row["reason"]) for row in again] == [(row["settings"], row["reason"]) for row in rows]
    assert daq(*asked, "--toml", "-").out == path.read_text()
    assert "exists. Pass --overwrite" in daq(*asked, "--toml", path).fails()
    assert "layer4.0.conv2" in daq(*asked, "--toml", path, "--overwrite").out


def test_plan_and_another(daq, tmp_path, finished):
    one, two = tmp_path / "a.toml", tmp_path / "b.toml"
    one.write_text("[default]\nw_bits = 4\na_bits = 4\n")
    two.write_text('[default]\nw_bits = 4\na_bits = 4\n[bits]\n"layer4.0.conv1" = [3, 4]\n')
    asked = ("plan", "test_resnet", "--policy", one)
    text = daq(*asked, "--diff", two).out
    assert text.startswith("layer4.0.conv1: w_bits 4 -> 3\n1 of 16 layers changed; bops ")
    found = daq(*asked, "--diff", two, "--json").json["diff"]
    assert found["changed"] == [{"name": "layer4.0.conv1", "what": {"w_bits": [4, 3]}}]
    assert found["before"]["bytes"] > found["after"]["bytes"]
    assert daq(*asked, "--diff", one).out == "no difference\n"
    assert daq("plan", finished, "--diff", finished / "artifact").out == "no difference\n"
    assert "a run or artifact is compared with another one" in daq("plan", finished, "--diff", two).fails()


def test_plan_of_a_run_and_of_an_artifact(daq, finished):
    of_run, of_artifact = (daq("plan", path, "--json").json for path in (finished, finished / "artifact"))
    assert of_run["rows"] == of_artifact["rows"]
    assert all(row["signed"] is not None for row in of_run["rows"])
    assert "--w-bits has no effect on a run" in daq("plan", finished, "--w-bits", "2").fails()
    for option in (("--include", "fc"), ("--bits", "fc=2"), ("--attention", "8"), ("--share-inputs",)):
        assert f"{option[0]} has no effect on a run" in daq("plan", finished, *option).fails()
    assert '[bits]\n"' not in daq("plan", finished, "--toml", "-").out  # all layers between the ends are alike


def test_policy_file(daq, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('[default]\nw_bits = 4\na_bits = 4\n[[rule]]\nmatch = "layer4.*"\nw_bits = 2\n')
    rows = {row["site"]["name"]: row for row in daq("plan", "test_resnet", "--policy", policy, "--json").json["rows"]}
    assert rows["layer4.0.conv1"]["settings"]["w_bits"] == 2
    policy.write_text('[[rule]]\nmatch = "layer5.*"\nw_bits = 2\n')
    assert "layer5.*" in daq("plan", "test_resnet", "--policy", policy).fails()


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
    assert daq("freeze", *weights, "--out", tmp_path / "artifact", "--json").json["bits"] == "W8A8"
    assert "an artifact already" in daq("freeze", tmp_path / "artifact").fails()
    found = daq("export", tmp_path / "artifact", "--out", tmp_path / "a.onnx", "--input-size", "32", "--json").json
    assert found["agrees"] is True
    assert daq("export", *weights, "--out", tmp_path / "b.onnx", "--json").json["samples"] == 9
    x = torch.rand(1, 3, 32, 32)
    first, second = (OnnxModel(tmp_path / name)(x) for name in ("a.onnx", "b.onnx"))
    assert torch.allclose(first, second, atol=1e-4)


def test_export_of_a_run(daq, run):
    pytest.importorskip("onnxruntime")
    assert "model.onnx" in daq("export", run).fails()
    assert daq("export", run, "--overwrite", "--json").json["class_agreement"] == 1.0
    assert "agrees" in daq("export", run, "--out", run / "again.onnx").out


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


@pytest.mark.parametrize("command", ["plan", "eval", "freeze", "export", "inspect"])
def test_sources_that_are_none(daq, tmp_path, command):
    assert "neither a run directory" in daq(command, tmp_path).fails()
    assert "timm has no model 'resnet1x'" in daq(command, "resnet1x", *out(command, tmp_path)).fails()


def out(command, tmp_path):
    weights = ("--checkpoint", tmp_path / "w.pt") if command in ("eval", "freeze", "export") else ()
    return (*weights, "--out", tmp_path / "x") if command in ("freeze", "export") else weights


@pytest.mark.parametrize("name", ["config.json", "best.safetensors", "float.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "edited"])
def test_damaged_runs(daq, run, name, damage):
    file = run / name
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.write_text('{"job": {"model": "os:system"}}')
    message = daq("freeze", run, "--overwrite").fails()
    assert name in message or damage == "gone"


def test_main_and_python_m(child_env):
    done = subprocess.run(
        [sys.executable, "-m", "daqconvert.cli", "inspect", "nothing-here", "--json"],
        capture_output=True,
        text=True,
        env=child_env,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "timm has no model 'nothing-here'" in done.stderr


def test_usage_errors(daq):
    assert "No such option" in daq("plan", "resnet18", "--wbits", "3").fails()
    assert daq().code == 2
    assert daq("plan").code == 2
