"""What changes from one plan to another."""

import dataclasses

import pytest

from daqconvert.policy.arguments import build
from daqconvert.spec import Plan, PlanRow, Settings, Site


@pytest.fixture
def diff(planned):
    def between(one, two):
        return planned(build(**one)).diff(planned(build(**two)))

    return between


def test_no_difference_is_false(diff):
    same = diff({"w_bits": 4}, {"w_bits": 4})
    assert not same
    assert str(same) == "no difference"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param({"bits": {"layer1.*": 4}}, {"rules": {"match": "layer1.*", "w_bits": 4, "a_bits": 4}}, id="rule"),
        pytest.param({"exclude": "conv1"}, {"first": None}, id="reason"),
        pytest.param({"granularity": "auto"}, {"granularity": "channel"}, id="auto"),
    ],
)
def test_who_decided_makes_no_difference(one, two, diff):
    assert not diff(one, two)


@pytest.mark.parametrize(
    ("one", "two", "line", "what"),
    [
        pytest.param(
            {"w_bits": 4},
            {"w_bits": 4, "bits": {"layer1.0.conv1": 3}},
            "layer1.0.conv1: w_bits 4 -> 3, a_bits 8 -> 3",
            {"w_bits": (4, 3), "a_bits": (8, 3)},
            id="bits",
        ),
        pytest.param(
            {},
            {"exclude": "layer1.0.conv1"},
            "layer1.0.conv1: bits W8A8 -> float",
            {"bits": ("W8A8", "float")},
            id="off",
        ),
        pytest.param(
            {"bits": {"layer1.0.conv1": (2, None)}},
            {"bits": {"layer1.0.conv1": (2, 3)}},
            "layer1.0.conv1: a_bits float -> 3",
            {"a_bits": (None, 3)},
            id="float input",
        ),
        pytest.param(
            {},
            {"rules": {"match": "layer1.0.conv1", "share_inputs": True}},
            "layer1.0.conv1: share_inputs False -> True",
            {"share_inputs": (False, True)},
            id="setting",
        ),
    ],
)
def test_one_layer(one, two, line, what, diff):
    found = diff(one, two)
    assert [change.name for change in found.changed] == ["layer1.0.conv1"]
    assert found.changed[0].what == what
    assert str(found).splitlines()[0] == line
    assert found and not found.added and not found.removed


def test_totals_before_and_after(planned):
    one, two = planned(build(w_bits=4)), planned(build(w_bits=4, bits={"layer1.0.conv1": (2, 8)}))
    found = one.diff(two)
    assert (found.before, found.after) == (one.totals, two.totals)
    last = str(found).splitlines()[-1]
    assert last == f"1 of 6 layers changed; bytes {one.bytes:,} -> {two.bytes:,}"
    assert one.bytes - two.bytes == 2304 * 2 // 8


def test_layers_that_come_and_go():
    def plan(*names):
        rows = (PlanRow(Site(name, "Linear", (2, 2), 2, 2, 4, macs=4), Settings(4, 4), "default") for name in names)
        return Plan(tuple(rows), "Net")

    found = plan("a", "b").diff(plan("b", "c"))
    assert ([row.name for row in found.added], [row.name for row in found.removed]) == (["c"], ["a"])
    assert str(found).splitlines() == [
        "+ c: Linear, W4A4",
        "- a: Linear, W4A4",
        "0 of 2 layers changed, 1 added, 1 removed",
    ]
    assert "macs 8 -> 12; bops 128 -> 192; bytes 8 -> 12" in str(plan("a", "b").diff(plan("a", "b", "c")))


def test_another_model_under_the_same_names(planned, sites):
    plan = planned(build())
    larger = dataclasses.replace(sites[1], weight_shape=(32, 16, 3, 3), params=4608)
    found = plan.diff(planned(build(), (sites[0], larger, *sites[2:])))
    assert str(found).splitlines()[0] == "layer1.0.conv1: weight_shape 16x16x3x3 -> 32x16x3x3, params 2,304 -> 4,608"


def test_signs_that_calibration_decides(planned):
    plan = planned(build())
    decided = tuple(dataclasses.replace(row, signed=True) if row.signed is None else row for row in plan)
    found = plan.diff(dataclasses.replace(plan, rows=decided))
    assert str(found).splitlines()[0] == "conv1: signed (calibrate decides) -> yes"
    assert len(found.changed) == 2  # the row that is left alone has no sign


def test_sizes_alone_are_a_difference(planned, sites):
    plan = planned(build())
    assert plan.diff(dataclasses.replace(plan, other_params=0))
    unsized = tuple(dataclasses.replace(site, macs=None) for site in sites)
    assert str(plan.diff(planned(build(), unsized))).startswith("0 of 6 layers changed; macs 442,368 -> -; bops ")
