"""SQNR by depth: where the points stand, and what the axis says."""

import math
import re

import pytest

from daqconvert.report import plots
from daqconvert.report.plots import Curve, Line, curve, draw_depth


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw, and return the axes."""
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: seen.append(figure))

    def draw(*curves, title=""):
        draw_depth(tmp_path / "x.png", "png", curves, title)
        return seen[-1].axes[0]

    return draw


def labels(panel):
    return [label.get_text() for label in panel.get_yticklabels()]


def test_identical_stands_above_everything(drawn):
    panel = drawn(Curve("a", {"one": math.inf, "two": 25.0, "three": math.nan, "four": -math.inf}))
    x, y = panel.lines[0].get_data()
    assert list(x) == [0, 1, 2, 3]
    top = panel.get_yticks()[-1]
    assert labels(panel)[-1] == "identical"
    assert y[0] == top > 30 and y[1] == 25.0
    assert math.isnan(y[2]) and math.isnan(y[3])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["one", "two", "three", "four"]


def test_layers_of_all_curves_share_the_axis(drawn):
    panel = drawn(Curve("a", {"one": 10.0, "three": 12.0}), Curve("b", {"one": 20.0, "two": 5.0}, first="two"))
    assert [list(line.get_xdata()) for line in panel.lines[:3]] == [[0, 1], [0, 2], [2]]  # the last one is the ring
    assert panel.get_figure().legends[0].get_texts()[1].get_text() == "b\ncodes first differ at two (ringed)"


def test_heights_are_undone():
    for value in (-20.0, 0.0, 59.0, 60.0, 61.0, 140.0):
        assert plots._stretched(plots._squeezed(value)) == pytest.approx(value)
    assert plots._squeezed(100.0) == 70.0


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([math.inf], ["0", "10"]),
        ([5.0, 33.0], ["0", "10", "20", "30", "40"]),
        ([-12.0, 8.0], ["-20", "-10", "0", "10"]),
        ([10.0, 141.0], ["0", "10", "20", "30", "40", "50", "60", "100", "140"]),
        ([120.0, 125.0], ["0", "10", "20", "30", "40", "50", "60", "100"]),
    ],
    ids=str,
)
def test_ticks(drawn, values, ticks):
    panel = drawn(Curve("a", {str(i): value for i, value in enumerate(values)}))
    assert labels(panel) == [*ticks, "identical"]
    low, high = panel.get_ylim()
    assert all(low <= tick <= high for tick in panel.get_yticks())


def test_many_layers_are_named_every_so_often(drawn):
    panel = drawn(Curve("a", {f"layer{i}": 10.0 for i in range(150)}))
    assert len(panel.get_xticks()) == 50
    assert "one name in 3 shown" in panel.get_xlabel()


def numbers(drawn):
    """Return the numbers at the ticks of a chart."""
    return [float(found) for found in re.findall(r">([\d.]+)</text>", drawn)]


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_epochs_are_whole_numbers(epochs):
    drawn = curve("t", [Line("a", list(range(1, epochs + 1)), [0.5] * epochs)])
    assert [x for x in numbers(drawn) if x >= 1] == [x for x in numbers(drawn) if 1 <= x <= epochs and x == int(x)]
    assert any(x >= 1 for x in numbers(drawn))


def test_a_few_outliers_in_the_background_do_not_flatten_the_curve():
    steps = [i / 20 for i in range(100)]
    spiky = [50.0 if i < 3 else 0.5 - 0.004 * i for i in range(100)]
    epochs = Line("training", [1, 2, 3, 4, 5], [0.4, 0.3, 0.25, 0.2, 0.15])
    assert max(numbers(curve("t", [Line("", steps, spiky, faint=True), epochs]))) == 5  # the last epoch
    assert max(numbers(curve("t", [Line("training", steps, spiky), epochs]))) > 5  # a curve itself is shown whole
