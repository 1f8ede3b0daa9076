"""Where a report draws the line between agreeing and not."""

import math

import pytest

from daqconvert.deploy.comparing.export_report import ExportReport, LayerAgreement


def report(layers=(), sqnr_same=math.inf, classes=1.0, samples=1000):
    return ExportReport("m.onnx", 10, tuple(layers), samples, 0.0, 90.0, sqnr_same, classes)


@pytest.mark.parametrize(
    ("elements", "differing", "largest", "agrees"),
    [(50_000, 5, 1, True), (50_000, 6, 1, False), (100, 1, 1, True), (100, 2, 1, False), (10**6, 1, 2, False)],
)
def test_codes_for_the_same_input_codes(elements, differing, largest, agrees):
    layer = LayerAgreement("a", elements, 10**6, 9, differing, largest)  # what happens end to end is only reported
    assert layer.agrees is agrees
    assert report([layer]).agrees is agrees
    if not agrees:
        assert f"a: {differing} of {elements} codes differ" in report([layer]).problems()[0]


@pytest.mark.parametrize(
    ("classes", "samples", "agrees"),
    [(1.0, 10, True), (0.9, 10, True), (0.8, 10, False), (0.999, 1000, True), (0.9975, 4000, False), (None, 10, True)],
)
def test_classes(classes, samples, agrees):
    assert report(classes=classes, samples=samples).agrees is agrees


@pytest.mark.parametrize(
    ("sqnr", "agrees"), [(60.0, True), (59.9, False), (math.nan, False), (-math.inf, False), (math.inf, True)]
)
def test_output_for_the_same_codes(sqnr, agrees):
    assert report(sqnr_same=sqnr).agrees is agrees


def test_text_shows_the_layers_that_differ():
    text = str(report([LayerAgreement("a", 20_000, 30, 2, 1, 1), LayerAgreement("b", 500, 0, 0, 0, 0)]))
    assert text.splitlines() == [
        "m.onnx: 10 bytes",
        "layer  codes    differing  by levels  for the same input codes  by levels",
        "a      20000  30 (0.0015)          2                 1 (5e-05)          1",
        "codes: identical in 1 of 2 layers",
        "output: largest difference 0, SQNR 90.0 dB",
        "class: the same for 100.00% of 1000 samples",
        "ONNX Runtime, 1000 samples: agrees",
    ]
