"""The page of a training run: all of it, in one file, that loads nothing and hurts nobody."""

import math
import re
import sys

import pytest

from daqconvert.report.fits import Fitted
from daqconvert.report.layer_cards import MOST, OPEN
from daqconvert.report.training_page import TrainingReport, training_page
from helpers.training_pages import Reader, layer


def rows(epochs):
    return [
        {"epoch": e, "step": 10 * e, "lr": 0.1 / e, "quantizer_lr": 0.001 / e, "train_loss": 1.0 / e,
         "train_top1": 1 - 0.5 / e, "val_loss": 1.1 / e, "val_top1": 0.9 - 0.5 / e, "images_per_second": 100.0,
         "seconds": 50.0, "oscillating": 0.01 * e, "warnings": 0}
        for e in range(1, epochs + 1)
    ]  # fmt: skip


def report(epochs=4, layers=3, **changes):
    values = {
        "title": "ResNet, W2A4",
        "epochs": 5,
        "rows": rows(epochs),
        "best_epoch": epochs,
        "layers": layers if isinstance(layers, list) else [layer(f"layer{i}.conv") for i in range(layers)],
        "steps": [(0.1 * i, 1.0 / (1 + i)) for i in range(10 * epochs)],
        "warnings": [{"epoch": 2, "layer": "layer1.conv", "kind": "dead scale", "text": "layer1.conv: has fallen"}],
        "tables": {"Recipe": {"lr": 0.1, "schedule": "cosine"}, "Environment": {"torch": "2.9"}},
        "commands": {"Go on": "daqconvert finetune --out runs/a --resume"},
    }
    return TrainingReport(**values | changes)


def test_everything_is_on_the_page():
    read = Reader(training_page(report()))
    for said in (
        "ResNet, W2A4", "epoch 4 of 5", "77.50 %", "best top-1 (epoch 4)", "3 min", "4.00 %", "layer2.conv",
        "9.22k", "layer1.conv: has fallen", "epoch 2, dead scale", "schedule", "cosine", "0.2 (0.1 to 0.4)",
        "4 levels, up to 40.0 %", "-3 to 2.5 std", "input 0 to 1.25", "daqconvert finetune --out runs/a --resume",
        "images per second", "Loss", "Top-1 accuracy", "Learning rate at the end of the epoch",
    ):  # fmt: skip
        assert said in read.text, said
    assert "finished" not in read.text
    assert "finished" in Reader(training_page(report(finished=True))).text


def test_it_loads_nothing_and_runs_nothing():
    page = training_page(report())
    read = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(read.tags)
    links = [value for key, value in read.attributes if key in ("href", "xlink:href", "src", "srcset", "action")]
    assert all(value.startswith("#") for value in links)
    assert not [key for key, _ in read.attributes if key.startswith("on")]
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{value}" for key, value in read.attributes if key == "id"}
    assert "default-src 'none'" in page


def test_names_are_text():
    hostile = "<script>alert(1)</script>&\"'\x07\ud800"
    page = training_page(
        report(
            title=hostile,
            subtitle=hostile,
            layers=[layer(hostile)],
            tables={hostile: {hostile: hostile}},
            warnings=[{"epoch": 1, "layer": hostile, "kind": hostile, "text": hostile}],
            fitted={hostile: [Fitted(hostile, 1.0, 0.5), Fitted(hostile, left_alone=hostile)]},
            commands={hostile: hostile},
        )
    )
    read = Reader(page)
    assert "script" not in read.tags
    assert "<script>alert(1)</script>&\"'\\x07\\ud800" in read.text
    page.encode("utf-8")


def test_the_same_data_give_the_same_page():
    assert training_page(report()) == training_page(report())
    assert "<dc:date>" not in training_page(report())


def test_colours_are_the_pages_own():
    charts = training_page(report()).split("<h2>Curves</h2>")[1].split("</section>")[0]
    assert "var(--c1)" in charts
    assert not re.findall(r"#[0-9a-f]{6}", charts)
    assert not re.findall(r'width="[0-9.]+pt"', charts)
    assert charts.count("<desc>") == charts.count("<svg ") == 4


def test_without_matplotlib_the_numbers_stay(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    read = Reader(training_page(report()))
    assert "pip install 'daqconvert[plot]'" in read.text
    assert "77.50 %" in read.text
    assert read.tags.count("svg") == 9  # three small ones a layer need no library


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="no epoch"),
        pytest.param(rows(1), id="one epoch"),
        pytest.param([{**rows(1)[0], "val_loss": None, "val_top1": None, "train_top1": None}], id="no labels"),
        pytest.param([{**r, "lr": 0.0, "quantizer_lr": 0.0} for r in rows(3)], id="no learning rate"),
        pytest.param([*rows(2), {**rows(3)[2], "val_loss": math.nan, "train_loss": math.inf}], id="not finite"),
        pytest.param([{"epoch": 1}], id="bare"),
    ],
)
def test_histories_that_lack_something(rows):
    Reader(training_page(report(rows=rows, best_epoch=None, steps=())))


def test_a_large_network_stays_readable():
    layers = [layer(f"b.{i}", ((2, 4, 8, 1)[i % 4], 8), 300) for i in range(450)]
    many = TrainingReport(**{**vars(report(epochs=300)), "layers": layers})
    page = training_page(many)
    assert len(page) < 5_000_000
    read = Reader(page)
    assert page.count('<div class="layer">') == MOST
    assert f"{450 - OPEN} more layers" in read.text
    assert f"{450 - MOST} more layers have no card here" in read.text
    assert "300 epochs, the best in bold" in read.text
    assert "b.449" in read.text


def test_what_was_fitted_before_training_has_its_errors():
    blocks = [Fitted("layer1", 0.4, 0.1), Fitted("layer2", left_alone="a forward calls it 2 times")]
    page = training_page(
        report(fitted={"reconstruct": blocks, "gptq": [Fitted(f"c{i}", 0.0, 0.0) for i in range(50)]})
    )
    read = Reader(page)
    section = page.split("Fitted before training</h2>")[1].split("</section>")[0]
    assert re.findall(r"width:([\d.]+)em", section)[:3] == [
        "10.00",
        "2.50",
        "0.00",
    ]  # nothing divided by an error of 0
    for said in ("Blocks reconstructed", "0.4", "left as it is: a forward calls it 2 times", "GPTQ", "10 more", "c49"):
        assert said in read.text, said
    assert "Fitted before training" not in training_page(report())
