"""Two models in words and as a picture: the layer where they part, and what identical looks like."""

import json
import math

import pytest

from daqconvert.deploy.comparing.verify_report import LayerComparison, VerifyReport, plot_reports
from daqconvert.errors import ExportError


def report(*rows, sqnr=20.0, largest=1.0, agreement=None):
    return VerifyReport("float Net", "frozen Net", 4, agreement, sqnr, largest, rows)


SAME = LayerComparison("a", math.inf, 0.0, codes=100)
CODES = LayerComparison("b", 35.0, 0.1, codes=200, differing=3, largest=2)
OUTPUT = LayerComparison("c", 35.0, 0.1)
LOW = LayerComparison("d", 12.0, 0.1)
UNSEEN = LayerComparison("e", None, None, codes=100, differing=1, largest=1)
EXACT = {"sqnr": math.inf, "largest": 0.0}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (report(SAME, CODES), "codes first differ at b: 3 of 200, by up to 2 levels"),
        (report(SAME, UNSEEN), "codes first differ at e: 1 of 100, by up to 1 level"),
        (report(SAME, **EXACT), "no code differs"),
        (report(SAME), "no code differs, the output does: rounding after the last"),
        (report(OUTPUT, LOW), "outputs first differ at c, 35.0 dB; below 30 dB first d, 12.0 dB"),
        (report(OUTPUT), "outputs first differ at c, 35.0 dB"),
        (report(), "only the output differs"),
        (report(**EXACT), "identical"),
        (report(LayerComparison("", 35.0, 0.1, 10, 1, 1)), "codes first differ at (root): 1 of 10, by up to 1 level"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_where(found, words):
    assert found.where() == words
    assert words in str(found)


def test_codes_over_all_layers():
    found = report(SAME, CODES, OUTPUT)
    assert (found.codes, found.code_agreement) == (300, 0.99)
    assert [row.code_agreement for row in found.layers] == [1.0, 0.985, None]
    assert [row.identical for row in found.layers] == [True, False, False]
    assert report(OUTPUT).code_agreement is None
    assert "codes: the same for 99.00% of 300" in str(found)


def test_one_code_of_many_is_never_rounded_to_all():
    assert "more than 99.99%" in str(report(LayerComparison("a", 90.0, 0.1, 10**6, 1, 1)))


def test_a_layer_whose_output_was_not_recorded():
    found = report(SAME, UNSEEN)
    assert found.first_below(30) is None
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [(row["sqnr"], row["identical"]) for row in data["layers"]] == [(None, True), (None, False)]
    assert str(found).splitlines()[3].split() == ["e", "-", "-", "100", "1", "1"]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_picture(tmp_path, kind):
    path = tmp_path / "new" / f"depth.{kind}"
    report(SAME, CODES, LOW).plot(path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind]
    assert path.read_bytes().startswith(start)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_picture_of_several(tmp_path):
    path = tmp_path / "depth.svg"
    plot_reports([report(SAME, CODES), report(OUTPUT, UNSEEN, agreement=0.5)], path, "a $title_")
    text = path.read_text()
    for words in (
        "frozen Net against float Net",
        "codes first differ at b (ringed)",
        "codes first differ at e<",
        "identical",
    ):
        assert words.replace("<", "") in text, words
    assert "e (ringed)" not in text  # its output was not recorded


@pytest.mark.parametrize("name", ["depth", "depth.jpg", "depth.onnx"])
def test_pictures_of_other_kinds(tmp_path, name):
    with pytest.raises(ExportError, match=r"expected a name that ends in \.png, \.svg, \.pdf"):
        report(SAME).plot(tmp_path / name)


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ExportError, match="no layer's output could be read in both"):
        report(UNSEEN).plot(tmp_path / "a.png")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'daqconvert\[plot\]'"):
        report(SAME).plot(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_first_below_takes_nan_for_below():
    rows = (LayerComparison("a", 40.0, 0.1), LayerComparison("b", math.nan, math.nan), LayerComparison("c", 10.0, 1.0))
    found = VerifyReport("x", "y", 1, None, 20.0, 1.0, rows)
    assert found.first_below(30) == "b"
    assert found.to_dict()["layers"][1]["sqnr"] is None
