"""`daqconvert eval`: runs, artifacts and models, on their own data and on others."""

from __future__ import annotations

import json
import shutil

import pytest

FROZEN = "W4A4, frozen"


@pytest.fixture(scope="module")
def halves(folder, tmp_path_factory):
    """A folder for each class alone, with both splits, and one with a class that no run here knows."""
    root = tmp_path_factory.mktemp("halves")
    for split in ("train", "val"):
        for name in ("dark", "light"):
            shutil.copytree(folder / split / name, root / f"only {name}" / split / name)
        shutil.copytree(folder / split / "light", root / "unknown" / split / "bright")
    return root


@pytest.mark.parametrize("what", [".", "artifact"], ids=["run", "artifact"])
def test_classes_of_other_data_are_mapped_by_name(daq, finished, folder, halves, what):
    path = finished / what
    whole = daq("eval", path, "--data", folder, "--json").json["results"][FROZEN]
    dark, light = (daq("eval", path, "--data", halves / f"only {name}", "--json").json for name in ("dark", "light"))
    assert "1 of the 2 classes of" in light["data"]
    dark, light = dark["results"][FROZEN], light["results"][FROZEN]
    assert dark["top1"] + light["top1"] == 2 * whole["top1"]
    assert dark["loss"] + light["loss"] == pytest.approx(2 * whole["loss"], rel=1e-6)
    assert abs(dark["loss"] - light["loss"]) > 1e-3  # so a class that is numbered anew would be noticed
    message = daq("eval", path, "--data", halves / "unknown").fails()
    assert "does not know the class 'bright'" in message
    assert "It knows 2: dark, light" in message


def test_runs_that_kept_no_names_take_them_from_their_own_data(daq, run, finished, halves, tmp_path):
    config = json.loads((run / "config.json").read_text())
    assert config.pop("known") == {
        "model_args": {"num_classes": 2}, "num_classes": 2, "class_names": ["dark", "light"]
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(config))
    data = ("--data", halves / "only light")
    known = daq("eval", finished, *data, "--json").json["results"]
    assert daq("eval", run, *data, "--json").json["results"] == known
    config["job"]["data"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    message = daq("eval", run, *data).fails()
    assert "--classes FILE" in message or "does not fit" in message


def test_names_from_a_file(daq, finished, halves, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("dark\nbright\n")
    data = ("--data", halves / "unknown", "--classes", names)
    light = daq("eval", finished, "--data", halves / "only light", "--json").json["results"]
    assert daq("eval", finished, *data, "--json").json["results"] == light
    names.write_text("dark\nbright\nother\n")
    assert "names 3 classes, the model has 2" in daq("eval", finished, *data).fails()


def test_a_run_goes_on_with_its_own_numbers(daq, run, folder, tmp_path):
    """A class that its data got since has no output in the model."""
    config = json.loads((run / "config.json").read_text())
    config["job"]["data"] = str(shutil.copytree(folder, tmp_path / "grown"))
    (run / "config.json").write_text(json.dumps(config))
    for split in ("train", "val"):
        shutil.copytree(folder / split / "dark", tmp_path / "grown" / split / "black")
    message = daq("finetune", "--out", run, "--resume").fails()
    assert "does not know the class 'black'" in message


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
