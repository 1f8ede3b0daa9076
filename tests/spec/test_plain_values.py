"""Dataclasses as plain values and back: every kind of field, and what an edited file is told."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from daqconvert.errors import ConversionError, PolicyError
from daqconvert.spec.plain_values import from_plain, to_plain


@dataclass(frozen=True)
class Inner:
    size: tuple[int, ...]
    later: float = 0.5

    def __post_init__(self):
        if 0 in self.size:
            raise PolicyError("size: expected no zero")
        if self.later < 0:
            raise PolicyError("A number of its own is wrong")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: tuple[Inner, ...]
    either: float | int | None = None
    entries: Mapping[str, bool] = field(default_factory=dict)


WHOLE = Outer("a", (Inner((1, 2)), Inner((), 2.0)), 3, {"x": True})


def plain(**changes):
    return json.loads(json.dumps(to_plain(WHOLE))) | changes


def test_there_and_back():
    assert from_plain(Outer, plain(), "file") == WHOLE
    assert from_plain(Outer, plain(either=None), "file").either is None
    assert type(from_plain(Outer, plain(), "file").either) is int  # as it was written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"nme": 1}, "file: unknown field 'nme'. Nearest: name, inner.", id="unknown"),
        pytest.param({"name": 1}, "file.name: expected a text; found 1.", id="text"),
        pytest.param({"either": "1"}, "file.either: expected a number; found '1'.", id="union"),
        pytest.param({"either": True}, "file.either: expected a number; found True.", id="a truth value is no number"),
        pytest.param({"entries": []}, "file.entries: expected an object; found [].", id="mapping"),
        pytest.param({"entries": {"x": 1}}, "file.entries.x: expected true or false; found 1.", id="entry"),
        pytest.param({"inner": {}}, "file.inner: expected a list; found {}.", id="list"),
        pytest.param({"inner": [1]}, "file.inner[0]: expected an object; found 1.", id="object"),
        pytest.param({"inner": [{"size": []}]}, "file.inner[0]: missing field 'later'.", id="missing"),
        pytest.param(
            {"inner": [{"size": [1, -1], "later": 1}]},
            "file.inner[0].size[1]: expected a count; found -1.",
            id="count",
        ),
        pytest.param(
            {"inner": [{"size": [0], "later": 1}]}, "file.inner[0].size: expected no zero", id="its own check"
        ),
        pytest.param(
            {"inner": [{"size": [1], "later": -1}]}, "file.inner[0]: A number of its own is wrong", id="of no field"
        ),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(PolicyError) as caught:
        from_plain(Outer, plain(**changes), "file")
    assert str(caught.value).startswith(message)


def test_fields_that_came_later_may_be_missing():
    found = from_plain(Outer, plain(inner=[{"size": [1]}]), "file", later=("later",))
    assert found.inner == (Inner((1,)),)


def test_the_error_is_of_the_class_that_was_asked_for():
    with pytest.raises(ConversionError, match=r"^file: expected an object; found None\.$"):
        from_plain(Outer, None, "file", error=ConversionError)
