"""Layers on the page of a run: bits as bars, shares of the weights, lines with gaps."""

import math
import re

from daqconvert.report.layer_cards import BARS, HEIGHT, LayerReport, histogram, layer_cards, layer_table, lines
from helpers.training_pages import Reader, layer


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
