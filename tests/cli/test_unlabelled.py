"""Finetuning on images without labels."""

from __future__ import annotations

import json
import shutil

import pytest

QUICK = ("--recipe", "fewshot", "--with", "reconstruct=3", "--epochs", "1", "--batch-size", "6", "--no-onnx")


@pytest.fixture(scope="module")
def photos(folder, tmp_path_factory):
    """The training images of both classes in one folder."""
    root = tmp_path_factory.mktemp("unlabelled") / "photos"
    root.mkdir()
    for path in folder.glob("train/*/*.jpg"):
        shutil.copy(path, root / f"{path.parent.name}{path.name}")
    return root


@pytest.fixture(scope="module")
def weights(finished):
    return ("test_resnet", "--checkpoint", finished / "float.safetensors")


def test_measured_against_the_float_model(daq, weights, photos, tmp_path):
    run = tmp_path / "run"
    options = ("--model-arg", "num_classes=2", "--data", photos, "--holdout", "4")
    found = daq("finetune", *weights, *options, *QUICK, "--out", run)
    assert found.code == 0, found.err
    assert "8 images without labels for training, 4 held out" in found.out
    assert (
        "no labels to measure by: top-1 is the share of images of which a model has the float model's class"
        in found.err
    )
    assert "| as float" in found.out
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["measured_by"], summary["top1"]["float"]) == ("the float model's answers", 1.0)
    again = daq("eval", run, "--json").json
    assert again["results"]["W4A4, frozen"]["top1"] == summary["top1"]["quantized"]
    assert again["results"]["float"]["top1"] == 1.0
    assert "no labels to measure an artifact by" in daq("eval", run / "artifact", "--data", photos).fails()


def test_labelled_images_to_measure_by(daq, weights, photos, folder, tmp_path):
    run = tmp_path / "run"
    found = daq("finetune", *weights, "--data", photos, "--val", folder / "val", *QUICK, "--out", run, "--json").json
    assert found["data"] == (
        "photos: 12 images without labels for training, 8 in val; numbered in the order of their names, for "
        "timm:test_resnet keeps none, at 32 x 32"
    )
    assert found["measured_by"] == "labels"
    assert "has val" in daq("finetune", "test_resnet", "--out", run, "--resume", "--val", photos).fails()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--recipe", "quick"),
            "have no labels, and recipe quick learns from labels (distill = 0.5). Add --recipe fewshot",
        ),
        (("--recipe", "fewshot", "--float-epochs", "1"), "have no labels to train a float model with"),
        (("--recipe", "fewshot", "--val", "FOLDER"), "it has train/. Name the folder whose images are meant"),
    ],
    ids=["labels needed", "float training", "val of two splits"],
)
def test_mistakes(daq, weights, photos, folder, tmp_path, options, message):
    given = [option.replace("FOLDER", str(folder)) for option in options]
    arguments = (*weights, "--model-arg", "num_classes=2", "--data", photos, "--out", tmp_path / "run")
    assert message in daq("finetune", *arguments, *given).fails()
    assert not (tmp_path / "run").exists()


def test_a_new_head_that_nothing_would_train(daq, folder, tmp_path):
    """Class folders beside a model of other classes: with distillation alone the head would stay random."""
    arguments = ("test_resnet", "--float-epochs", "1", "--model-arg", "num_classes=5", "--data", folder)
    message = daq("finetune", *arguments, "--recipe", "fewshot", "--out", tmp_path / "run").fails()
    assert "timm:test_resnet has 5 classes, the folders 2." in message
