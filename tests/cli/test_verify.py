"""`daqconvert verify`: the stages of a run, or any two models or files."""

import itertools
import shutil

import pytest

STAGES = ["float", "trained", "frozen", "exported"]


def pairs(found):
    return [(one["reference"], one["candidate"]) for one in found["comparisons"]]


def test_stages_of_a_run(daq, finished, tmp_path):
    picture = tmp_path / "depth.svg"
    found = daq("verify", finished, "--plot", picture, "--json").json
    assert pairs(found) == [*itertools.pairwise(STAGES), ("float", "exported")]
    assert {one["samples"] for one in found["comparisons"]} == {8}
    by_pair = dict(zip(pairs(found), found["comparisons"], strict=True))
    same = by_pair["trained", "frozen"]
    assert (same["identical"], same["code_agreement"], same["first_difference"]) == (True, 1.0, None)
    assert by_pair["frozen", "exported"]["code_agreement"] > 0.99
    assert by_pair["float", "trained"]["code_agreement"] is None
    assert [row["name"] for row in same["layers"]][:2] == ["conv1.0", "conv1.3"]
    drawn = picture.read_text()
    assert all(name in drawn for name in ("layer4.0.conv2", "frozen against trained"))


def test_text(daq, finished):
    text = daq("verify", finished, "--images", "5").out
    lines = text.splitlines()
    assert lines[0].startswith(f"{finished} on ")
    assert next(line for line in lines if line.startswith("| frozen / trained")).split("|")[2].strip() == "5"
    assert "frozen / trained: no code differs" in lines
    (row,) = [line for line in lines if line.startswith("| layer1.0.conv1 ")]
    assert "identical" in row
    assert any(line.startswith("trained / float: outputs first differ at conv1.0, ") for line in lines)


def test_a_run_without_its_file(daq, run):
    (run / "model.onnx").unlink()
    found = daq("verify", run, "--json")
    assert pairs(found.json) == [("float", "trained"), ("trained", "frozen"), ("float", "frozen")]
    assert "has no model.onnx" in found.err
    shutil.rmtree(run / "artifact")
    (run / "best.safetensors").unlink()
    assert "nothing to compare with its float model yet" in daq("verify", run).fails().split(": ", 1)[1]


def test_two_files_on_random_images(daq, finished):
    artifact, file = finished / "artifact", finished / "model.onnx"
    found = daq("verify", artifact, file, "--images", "20", "--json").json
    assert found["data"] == "random images of 3x32x32"
    (one,) = found["comparisons"]
    assert (one["reference"], one["candidate"], one["samples"]) == (str(artifact), str(file), 20)
    assert one["code_agreement"] > 0.99
    again = daq("verify", file, finished / "float.onnx", "--images", "3", "--json").json["comparisons"][0]
    assert (again["samples"], again["layers"]) == (3, [])  # a float file does not name its layers


def test_two_on_data(daq, finished, folder):
    artifact = finished / "artifact"
    found = daq("verify", artifact, finished / "model.onnx", "--data", folder, "--json").json
    assert found["comparisons"][0]["samples"] == 8
    weights = ("--checkpoint", finished / "float.safetensors", "--data", folder)
    named = daq("verify", "test_resnet", artifact, *weights, "--json").json["comparisons"][0]
    whole = daq("verify", finished, "--json").json["comparisons"][0]
    assert named["sqnr"] == whole["sqnr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN", "RUN/artifact"), "expected two different ones"),
        (("RUN/artifact", "RUN/artifact"), "expected two different ones"),
        (("test_resnet", "resnet18"), "expected two different ones"),
        (("RUN/artifact",), "is no run directory. Say what to compare it with"),
        (("RUN/model.onnx",), "is no run directory. Say what to compare it with"),
        (("RUN/model.onnx", "RUN/float.onnx", "--data", "RUN"), "two ONNX files do not say how images are normalized"),
        (("RUN/artifact", "RUN/gone.onnx"), "gone.onnx: no such file"),
        (("RUN", "--images", "0"), "--images and --batch-size: expected 1 or more"),
        (("RUN", "--pretrained"), "--pretrained has no effect on a run"),
        (("RUN/artifact", "RUN/model.onnx", "--pretrained"), "--pretrained has no effect on a pair of files"),
        (("RUN", "--plot", "RUN/depth.jpg"), "expected a name that ends in .png, .svg, .pdf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused(daq, finished, arguments, message):
    assert message in daq("verify", *(text.replace("RUN", str(finished)) for text in arguments)).fails()
    assert not list(finished.glob("depth*"))
