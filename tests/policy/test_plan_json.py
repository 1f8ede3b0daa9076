"""A plan as JSON and back, and what a damaged or edited one is told."""

import copy
import dataclasses
import json
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daqconvert.errors import PolicyError
from daqconvert.policy.plan_json import LATER, plan_from_dict, plan_to_dict
from daqconvert.spec import Call, Plan, PlanRow, Policy, Rule, Settings, Site, SiteOutput
from daqconvert.spec.auto import resolve_auto, resolve_computed

COUNTS = st.integers(0, 2**70)
TEXTS = st.lists(st.text(), max_size=2).map(tuple)
CALLS = st.builds(Call, st.text(), TEXTS, st.text(), tensors=TEXTS, dynamic=st.booleans())
SITES = st.builds(
    Site,
    name=st.text(),
    kind=st.text(),
    weight_shape=st.lists(COUNTS, max_size=4).map(tuple),
    out_channels=COUNTS,
    reduction=COUNTS,
    params=COUNTS,
    first=st.booleans(),
    last=st.booleans(),
    nonnegative=st.booleans(),
    macs=st.none() | COUNTS,
    notes=st.lists(st.text(), max_size=2).map(tuple),
    call=st.none() | CALLS,
    one_scale=st.text(),
    reads=st.text(),
)
SETTINGS = st.builds(
    Settings,
    w_bits=st.integers(2, 8),
    a_bits=st.none() | st.integers(2, 8),
    granularity=st.sampled_from(("channel", "tensor")),
    w_gamma=st.floats(0.01, 100),
    rounding=st.sampled_from(("daq", "ste", "ewgs", "dsq", "lsq")),
).map(resolve_auto)
SIGNS = st.none() | st.booleans()
ROWS = st.builds(PlanRow, SITES, SETTINGS, rule=st.text(), signed=SIGNS, notes=st.lists(st.text()).map(tuple)).map(
    lambda row: dataclasses.replace(row, settings=resolve_computed(row.settings)) if row.site.is_computed else row
) | st.builds(PlanRow, SITES, st.none(), rule=st.text(), reason=st.text(min_size=1), signed=SIGNS)
PLANS = st.builds(
    Plan,
    rows=st.lists(ROWS, max_size=3, unique_by=lambda row: row.name).map(tuple),
    model=st.text(),
    order=st.sampled_from(("fx", "modules")),
    other_params=COUNTS,
    input_size=st.none() | st.lists(COUNTS).map(tuple),
    policy=st.text(),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(PLANS)
def test_there_and_back(plan):
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


@pytest.mark.parametrize("kind", [Call, SiteOutput, Site, PlanRow, Plan], ids=lambda kind: kind.__name__)
def test_every_field_is_written(kind):
    """A field that `spec` gains must be of a type that JSON can hold, or this module must learn it."""
    known = {str, bool, int, float, type(None), Call, SiteOutput, Settings, Site, PlanRow}

    def leaves(hint):
        arguments = [a for a in typing.get_args(hint) if a is not ...]
        return {leaf for a in arguments for leaf in leaves(a)} if arguments else {hint}

    hints = typing.get_type_hints(kind)
    assert {leaf for field in dataclasses.fields(kind) for leaf in leaves(hints[field.name])} <= known


@pytest.fixture
def data(planned):
    policy = Policy(Settings(4, 4), rules=(Rule({"w_bits": 2}, match="layer1.*"),), exclude=("layer2.0.conv1",))
    return json.loads(json.dumps(plan_to_dict(planned(policy))))


def test_a_real_plan(data, planned, sites):
    plan = plan_from_dict(data)
    assert plan["layer1.0.conv1"].rule == 'rule 1: "layer1.*"'
    assert tuple(row.site for row in plan) == sites


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param(("rows",), {}, "plan.rows: expected a list; found {}.", id="rows"),
        pytest.param(("rows", 0), 3, "plan.rows[0]: expected an object; found 3.", id="row"),
        pytest.param(("model",), None, "plan.model: expected a text; found None.", id="model"),
        pytest.param(("order",), "fy", "plan.order: expected one of fx, modules; found 'fy'.", id="order"),
        pytest.param(
            ("other_params",), "64", "plan.other_params: expected a count; found '64'.", id="text for a count"
        ),
        pytest.param(("other_params",), -1, "plan.other_params: expected a count; found -1.", id="negative"),
        pytest.param(
            ("other_params",), True, "plan.other_params: expected a count; found True.", id="true is no count"
        ),
        pytest.param(("other_params",), 1.0, "plan.other_params: expected a count; found 1.0.", id="float"),
        pytest.param(("input_size",), [1, "3"], "plan.input_size[1]: expected a count; found '3'.", id="input size"),
        pytest.param(("input_size",), 3, "plan.input_size: expected a list; found 3.", id="input size no list"),
        pytest.param(("extra",), 1, "plan: unknown field 'extra'.*", id="unknown"),
        pytest.param(("polcy",), 1, "plan: unknown field 'polcy'. Nearest: policy*", id="misspelt"),
        pytest.param(("rows", 1, "rule"), 1, "plan.rows[1].rule: expected a text; found 1.", id="rule"),
        pytest.param(("rows", 1, "signed"), 0, "plan.rows[1].signed: expected true or false; found 0.", id="signed"),
        pytest.param(("rows", 1, "notes"), "a", "plan.rows[1].notes: expected a list; found 'a'.", id="notes"),
        pytest.param(("rows", 1, "notes"), [None], "plan.rows[1].notes[0]: expected a text; found None.", id="a note"),
        pytest.param(("rows", 1, "site"), None, "plan.rows[1].site: expected an object; found None.", id="site"),
        pytest.param(
            ("rows", 1, "site", "weight_shape"),
            [16, -3],
            "plan.rows[1].site.weight_shape[1]: expected a count*",
            id="shape",
        ),
        pytest.param(("rows", 1, "site", "macs"), "many", "plan.rows[1].site.macs: expected a count*", id="macs"),
        pytest.param(("rows", 1, "site", "first"), 1, "plan.rows[1].site.first: expected true or false*", id="first"),
        pytest.param(
            ("rows", 1, "site", "name"),
            "conv1",
            "plan.rows[1].site.name: expected each name once; found 'conv1' *",
            id="name",
        ),
        pytest.param(
            ("rows", 1, "settings", "w_bits"), 9, "plan.rows[1].settings.w_bits: expected *found 9.", id="bits"
        ),
        pytest.param(
            ("rows", 1, "settings", "w_bits"),
            "2",
            "plan.rows[1].settings.w_bits: expected a count; found '2'.",
            id="bits text",
        ),
        pytest.param(
            ("rows", 1, "settings", "w_gamma"),
            float("nan"),
            "plan.rows[1].settings.w_gamma: expected a positive*",
            id="nan",
        ),
        pytest.param(
            ("rows", 1, "settings", "w_gamma"),
            10**400,
            "plan.rows[1].settings.w_gamma: expected a positive*",
            id="huge",
        ),
        pytest.param(
            ("rows", 1, "settings", "grid"), "hex", "plan.rows[1].settings.grid: expected one of*", id="grid"
        ),
        pytest.param(
            ("rows", 1, "settings", "grid"), "auto", 'plan.rows[1].settings: expected nothing on "auto"*', id="auto"
        ),
        pytest.param(
            ("rows", 1, "settings", "grid"),
            "integer",
            "plan.rows[1].settings: normalize = true needs *",
            id="contradiction",
        ),
        pytest.param(
            ("rows", 1, "settings", "exec"), "x", "plan.rows[1].settings: unknown field 'exec'.*", id="setting"
        ),
        pytest.param(
            ("rows", 1, "reason"), "no", "plan.rows[1]: expected either *'layer1.0.conv1'*found both.", id="both"
        ),
        pytest.param(("rows", 1, "settings"), None, "plan.rows[1]: expected either *found neither.", id="neither"),
        pytest.param(
            ("rows", 1, "site", "reason"),
            "tied",
            "plan.rows[1]: 'layer1.0.conv1' has settings but cannot *",
            id="reason",
        ),
    ],
)
def test_an_edited_plan_is_refused(path, value, message, data):
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PolicyError) as caught:
        plan_from_dict(data)
    start, _, end = message.partition("*")
    told = str(caught.value)
    assert told.startswith(start) and all(part in told for part in end.split("*"))
    assert "*" in message or told == message


def test_settings_that_quantize_nothing_are_refused(data):
    data["rows"][1]["settings"].update(w_bits=None, a_bits=32)
    with pytest.raises(PolicyError, match=r"plan\.rows\[1\]\.settings: expected w_bits or a_bits"):
        plan_from_dict(data)


def test_every_field_is_needed(data):
    for kind, place in (
        (Plan, lambda d: d),
        (PlanRow, lambda d: d["rows"][1]),
        (Site, lambda d: d["rows"][1]["site"]),
        (Settings, lambda d: d["rows"][1]["settings"]),
    ):
        added = {field.name for field in dataclasses.fields(kind) if field.name not in place(data)}
        assert added == {Plan: {"target"}, Settings: {"symmetric"}}.get(kind, set())
        for field in dataclasses.fields(kind):
            if field.name in added:
                continue
            damaged = copy.deepcopy(data)
            del place(damaged)[field.name]
            if field.name in LATER:
                assert plan_from_dict(damaged) == plan_from_dict(data)  # written before there was such a setting
                continue
            with pytest.raises(PolicyError, match=f"missing field '{field.name}'"):
                plan_from_dict(damaged)


@pytest.mark.parametrize("found", [None, [], "plan", 3, {1: 2}], ids=repr)
def test_what_is_no_plan(found):
    with pytest.raises(PolicyError, match=r"^plan: "):
        plan_from_dict(found)


def test_products_are_of_one_bit_or_refused(planned):
    product = Site("qk", "matmul", call=Call("matmul", ("",), "qk"), nonnegative=True)
    plan = planned(Policy(Settings(attention=1)), (product,))
    written = plan_to_dict(plan)
    assert plan_from_dict(json.loads(json.dumps(written))) == plan
    written["rows"][0]["settings"]["grid"] = "midrise"
    with pytest.raises(PolicyError, match=r"rows\[0\]\.settings: 'qk' is computed from the input: expected granul"):
        plan_from_dict(json.loads(json.dumps(written)))
