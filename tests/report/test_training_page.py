"""The page of a training run: all of it, in one file, that loads nothing and hurts nobody."""

import html.parser
import math
import re
import sys

import pytest

from daqconvert.report.fits import Fitted
from daqconvert.report.layer_cards import (
    BARS,
    HEIGHT,
    MOST,
    OPEN,
    LayerReport,
    histogram,
    layer_cards,
    layer_table,
    lines,
)
from daqconvert.report.training_page import TrainingReport, training_page

VOID = {"meta", "path", "use", "br"}


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def layer(name, bits=(2, 4), epochs=3):
    measure = {"weight": [-3.0, 2.5], "weight_spread": [2.5, 2.5], "input": [0.0, 1.25], "scale": [0.1, 0.2, 0.4]}
    moments = [(epoch, measure) for epoch in range(epochs + 1)]
    counts = [4, 3, 2, 1] if bits[0] == 2 else [1] * 2 ** (bits[0] or 0)
    return LayerReport(name, "Conv2d", 9216, bits, moments, counts, counts[::-1], "std", 0.0123, 0.0, "default")


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


def test_bits_are_numbers_and_bars():
    table = layer_table([layer("a", (1, 8)), layer("b", (None, 4))])
    assert re.findall(r"width:([\d.]+)em", table) == ["0.55", "4.40", "2.20"]
    assert table.count("float") == 1


def test_bars_are_shares_of_the_weights():
    drawn = histogram([1, 3, 0, 4], [8, 0, 0, 0], "levels")
    heights = [float(h) for h in re.findall(r"v-([\d.]+)h", drawn)]
    assert heights == [HEIGHT * 0.125, HEIGHT * 0.375, HEIGHT * 0.5]  # against the fullest level, 8 of 8 at the start
    assert 'stroke="var(--c2)"' in drawn
    assert 'stroke="var(--c2)"' not in histogram([1, 3], [1, 1, 1], "other levels at the start")
    assert histogram([1] * 256, None, "many").count("v-") == BARS
    Reader(histogram([0, 0], [0, 0], "nothing"))


def test_lines_leave_gaps():
    drawn = lines([("--c1", [1.0, None, math.nan, 2.0, 3.0])], "upper")
    path = re.findall(r'd="([^"]*)" fill="none"', drawn)[0]
    assert (path.count("M"), path.count("L")) == (2, 1)
    assert lines([("--c1", [float(i) for i in range(5000)])], "long").count("L") <= 81
    Reader(lines([("--c1", [])], "nothing") + lines([("--c1", [2.0])], "a point"))


def test_a_layer_in_float_says_so():
    read = Reader(layer_cards([LayerReport("head", bits=(None, None))]))
    assert "weight float, input float" in read.text
    assert "input in float" in read.text
