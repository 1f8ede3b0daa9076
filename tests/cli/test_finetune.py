from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import daqconvert as dq
from daqconvert.cli.deployment import show_on_page
from daqconvert.cli.rundir import read_config

FILES = {
    "config.json", "recipe.toml", "log.csv", "last.safetensors", "best.safetensors", "teacher.safetensors",
    "float.safetensors", "float.onnx", "artifact", "model.onnx", "summary.json", "checkpoints", "report.html",
    "steps.csv", "snapshots.jsonl", "tensorboard",
}  # fmt: skip


def test_run_directory_holds_everything(finished):
    assert {entry.name for entry in finished.iterdir()} == FILES
    assert [row["epoch"] for row in csv.DictReader((finished / "log.csv").read_text().splitlines())] == ["1", "2"]
    config = read_config(finished)
    assert (str(config.job.source), config.recipe.epochs, config.float_epochs) == ("timm:test_resnet", 2, 2)
    assert config.plan["layer1.0.conv1"].settings.w_bits == 4


def test_the_page_answers_the_question_first(finished, run):
    """Accuracies, sizes and times stand above all else; what was typed is the title; a finished run does not go on."""
    document = json.loads((finished / "summary.json").read_text())
    page = (finished / "report.html").read_text()
    result = page.split("<h2>Result</h2>")[1].split("<!-- result -->")[0]
    assert page.index("<h2>Result</h2>") < page.index("best top-1")
    for key in ("float", "quantized", "frozen", "onnx"):
        assert f"{100 * document['top1'][key]:.2f} %" in result
    assert document["top1"]["frozen"] == document["top1"]["onnx"] == document["top1"]["quantized"]
    for said in ("x smaller", "x as fast", "model.onnx", "artifact/", document["data"]):
        assert said in result, said
    assert "<h1>test_resnet, W4A4 " in page
    assert "--resume" not in page
    assert str(read_config(finished).job.data) in page.split("</h1>")[1].split("</p>")[0]
    daq_document = {**document, "top1": {"float": 0.5, "quantized": 0.25}}  # as an earlier version wrote it
    show_on_page(run, daq_document)
    again = (run / "report.html").read_text()
    assert again.count("<h2>Result</h2>") == 1
    assert "<b>25.00 %</b><span>quantized, top-1</span>" in again


def test_json_is_the_summary_and_nothing_else(finished):
    document = json.loads((finished.parent / "stdout.json").read_text())
    assert document == json.loads((finished / "summary.json").read_text())
    assert document["bits"] == "W4A4"
    assert document["onnx_class_agreement"] == 1.0
    assert document["onnx_images_checked"] == 8
    assert set(document["seconds_per_image"]) == {"torch", "float_onnx", "onnx"}
    assert all(0 < value < 5 for value in document["seconds_per_image"].values())
    assert document["bytes"]["artifact"] < document["bytes"]["float"] / 4
    assert document["bytes"]["onnx"] < document["bytes"]["float_onnx"] / 3
    assert str(finished) not in (finished / "summary.json").read_text()


def test_artifact_is_the_best_epoch(finished):
    """What the summary says of the quantized model is true of what `load` gives, without naming the model."""
    document = json.loads((finished / "summary.json").read_text())
    frozen = dq.load(finished / "artifact")
    config = read_config(finished)
    from daqconvert.data import create_loaders
    from daqconvert.training import evaluate

    loaders = create_loaders(config.job.data, frozen, 8)
    assert evaluate(frozen, loaders.val).top1 == document["top1"]["quantized"]


def test_existing_directory_is_refused_and_unchanged(daq, run, tiny):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "Add --overwrite to replace it, --resume to go on" in daq("finetune", *tiny, "--out", run).fails()
    assert "give one of them" in daq("finetune", "--out", run, "--overwrite", "--resume").fails()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet1x",), "timm has no model 'resnet1x'. Nearest: resnet"),
        (("test_resnet", "--data", "nowhere"), "there is no such folder or file"),
        (("test_resnet", "--data", "{folder}"), "would start from random weights. Give --pretrained or --checkpoint"),
        (("test_resnet", "--data", "{folder}", "--checkpoint", "none.pt"), "none.pt: no such checkpoint file"),
        (("--w-bits", "9"), "--w-bits: expected an integer from 1 to 8, or float"),
        (("--w-bits", "2.5"), "--w-bits '2.5': expected 1 to 8, or float"),
        (("--first", "8"), "--first '8': expected W,A bits such as 8,8, or float"),
        (("--set", "granularty=tensor"), "granularity"),
        (("--set", "granularity"), "--set 'granularity': expected KEY=VALUE"),
        (("--preset", "paper-w9a9"), "paper-w"),
        (("--policy", "none.toml"), "none.toml"),
        (("--recipe", "paper-cifar"), "paper-cifar10"),
        (("--epochs", "0"), "--epochs: expected an integer of 1 or more; found 0."),
        (("--float-epochs", "-2"), "--float-epochs -2: expected 0 or more."),
        (("--bits", "layer9=2"), '"layer9" matches no layer. Nearest: '),
        (("--with", "epoch=3"), "--with 'epoch=3': 'epoch' is not a field of a recipe. Nearest: epochs"),
        (("--with", "epochs=some"), "--with 'epochs=some': epochs: expected an integer of 1 or more; found 'some'"),
        (("--with", "epochs"), "--with 'epochs': expected FIELD=VALUE"),
        (("--with", "epochs=3", "--epochs", "3"), "--epochs and --with epochs: give one of them."),
        (("--with", "color_jitter=0.4"), "--with color_jitter: has no effect on scikit-learn's digits"),
        (("--val", "{folder}"), "Name a model"),
        (("--exclude", "layer9.*"), "layer9.*"),
        (("--holdout", "0.5"), "The digits have their own split"),
        (("--pretrained",), "Name a model"),
        (("test_resnet", "--data", "{folder}", "--holdout", "-1"), "--holdout -1"),
        (("--model-arg", "x"), "--model-arg 'x': expected KEY=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_leave_an_old_run_as_it_was(daq, folder, tmp_path, arguments, message):
    """Everything is checked before the directory that --overwrite allows to replace is touched."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("old")
    given = [argument.format(folder=folder) for argument in arguments]
    assert message in daq("finetune", *given, "--out", run, "--overwrite").fails()
    assert (run / "config.json").read_text() == "old"


def test_overwrite_replaces_the_run_and_nothing_else(daq, run, tiny):
    (run / "notes.txt").write_text("mine")
    found = daq("finetune", *tiny, "--out", run, "--overwrite", "--preset", "paper-w2a2", "--no-onnx", "--json").json
    assert (found["bits"], found["onnx"]) == ("W2A2", None)
    assert {entry.name for entry in run.iterdir()} == FILES - {"float.onnx", "model.onnx"} | {"notes.txt"}
    assert dq.load(run / "artifact") is not None
    assert daq("finetune", "--out", run, "--resume", "--json").json["onnx"] is None  # the run remembers --no-onnx


def test_resume_after_an_interruption_gives_the_same_weights(daq, finished, run):
    """Taken back to before its second epoch, a run ends where the uninterrupted one did."""
    gone = (
        "artifact",
        "summary.json",
        "model.onnx",
        "float.onnx",
        "last.safetensors",
        "best.safetensors",
        "checkpoints",
    )
    for name in gone:
        entry = run / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    found = daq("finetune", "--out", run, "--resume", "--no-onnx", "--json")
    top1 = json.loads((finished / "summary.json").read_text())["top1"]
    assert found.json["top1"] == {**top1, "onnx": None}  # no ONNX file this time
    first, second = (load_file(path / "artifact" / "model.safetensors") for path in (finished, run))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18",), "has model 'test_resnet', found 'resnet18'"),
        (("--epochs", "3"), "has epochs 2, found 3. A run goes on with its own recipe"),
        (("--with", "mixup=0.2", "--lr", "0.02"), "has mixup 0.0, found 0.2."),
        (
            ("--recipe", "fewshot"),
            "has epochs 2, found 4; batch_size 6, found 25; optimizer 'sgd', found 'adam' (and ",
        ),
        (("--float-epochs", "5"), "2 float epochs, found 5"),
        (("--w-bits", "2"), "another policy"),
        (("--target", "litert"), "another policy"),
        (("--workers", "1", "--input-size", "64"), "has input_size None, found 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_resume_refuses_another_job(daq, run, arguments, message):
    assert message in daq("finetune", *arguments, "--out", run, "--resume", "--no-onnx").fails()


def test_a_run_for_a_target_keeps_it(daq, tiny, tmp_path):
    run = tmp_path / "run"
    arguments = (*tiny, "--target", "tensorrt", "--a-bits", "8", "--no-onnx")
    assert daq("finetune", *arguments, "--out", run).code == 0
    assert "target tensorrt" in daq("plan", run).out and "target tensorrt" in daq("plan", run / "artifact").out
    policy = tmp_path / "policy.toml"
    daq("plan", run, "--toml", policy)
    assert 'target = "tensorrt"' in policy.read_text()
    assert "no difference" in daq("plan", run, "--diff", run / "artifact").out
    zeros = {
        key: int(v) for key, v in load_file(run / "artifact" / "model.safetensors").items() if "zero_point" in key
    }
    assert zeros and set(zeros.values()) <= {0, 128}
    again = daq("finetune", *arguments, "--out", run, "--resume")
    assert again.code == 0, again.err
    assert "another policy" in daq("finetune", *arguments, "--target", "coreml", "--out", run, "--resume").fails()


def test_resume_needs_a_run(daq, tmp_path):
    assert "no run to resume" in daq("finetune", "--out", tmp_path, "--resume").fails()
    assert "is a file" in daq("finetune", "--out", __file__, "--overwrite").fails()


def test_own_model_is_a_skeleton_that_the_user_names_again(daq, own_model, folder, tmp_path):
    run = tmp_path / "run"
    arguments = ("--data", folder, "--epochs", "1", "--batch-size", "6", "--no-onnx", "--w-bits", "8")
    document = daq("finetune", own_model, *arguments, "--out", run, "--json").json
    assert document["model"] == own_model
    (tmp_path / "imported").unlink()
    for command in ("eval", "freeze", "export"):
        assert f"add --model {own_model}" in daq(command, run).fails()
    assert not (tmp_path / "imported").exists()
    assert daq("eval", run, "--model", own_model, "--json").json["results"]["W8A4, frozen"]["images"] == 8


def test_fewer_outputs_than_classes_and_unreadable_images_are_told_before_anything_is_done(daq, own_model, folder):
    data, out = shutil.copytree(folder, Path("data")), Path("run")
    for split in ("train", "val"):
        shutil.copytree(folder / split / "dark", data / split / "third")
    arguments = (own_model, "--data", data, "--out", out)
    message = daq("finetune", *arguments).fails()
    assert "has 2 classes, its data 3. Let it return a model with 3 outputs." in message
    for split in ("train", "val"):
        shutil.rmtree(data / split / "third")
        (data / split / "dark" / "0.jpg").write_bytes(b"")
    message = daq("finetune", *arguments).fails()
    assert "2 of 20 images cannot be read" in message
    assert message.count("0.jpg is no readable image") == 2
    assert not out.exists()
