"""A plan as a policy file: the same model gets the same plan from it, and a person can edit it."""

import dataclasses

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import daqconvert as dq
from daqconvert.errors import PolicyError
from daqconvert.policy import from_toml
from daqconvert.policy.resolve import resolve
from daqconvert.spec import Call, Plan, PlanRow, Policy, Rule, Settings, Site
from daqconvert.spec.reproduce import exact_pattern
from helpers.cases import CASES

PRODUCT, CONDITIONAL = Call("matmul", ("attn",), "attn.qk"), Call("conv2d", ("cond",), "cond", ("cond.w",), True)
SITES = (
    Site("stem", "Conv2d", (8, 3, 3, 3), 8, 27, 216, first=True),
    Site("other", "Conv2d", (8, 3, 3, 3), 8, 27, 216, first=True),
    Site("a.q", "Linear", (8, 8), 8, 8, 72, reads="a.q"),
    Site("a.k", "Linear", (8, 8), 8, 8, 72, reads="a.q"),
    Site("a.qk", "matmul", call=PRODUCT, first=True),
    Site("a.pv", "matmul", call=PRODUCT, nonnegative=True),
    Site("cond", "CondConv2d", (8, 8), 8, 8, 64, call=CONDITIONAL),
    Site("one", "Linear", (8, 8), 8, 8, 64, one_scale="its columns are sums"),
    Site("lstm", "LSTM", params=99, reason="recurrent layer"),
    Site("b*", "Linear", (8, 8), 8, 8, 72),
    Site("b2", "Linear", (8, 8), 8, 8, 72),
    Site("re:c", "Linear", (8, 8), 8, 8, 72, nonnegative=True),
    Site("only", "Linear", (8, 8), 8, 8, 72, first=True, last=True),
    Site("head", "Linear", (8, 8), 8, 8, 72, last=True),
    Site("", "Linear", (8, 8), 8, 8, 72, last=True),
)


def resolved(policy, sites):
    return resolve(policy, sites, model="Net", order="fx", other_params=0, input_size=None)


def decisions(plan):
    return [(row.name, row.settings, row.reason, row.signed, row.notes) for row in plan]


def assert_reproduced(plan):
    again = resolved(from_toml(plan.to_toml()), tuple(row.site for row in plan))
    assert decisions(again) == decisions(plan)


POLICIES = {
    "default": {},
    "w4a4": {"w_bits": 4, "a_bits": 4},
    "two-bits": {"w_bits": 2, "a_bits": 2},
    "floats-at-the-ends": {"w_bits": 4, "first": None, "last": None},
    "like-the-rest": {"w_bits": 3, "first": {}, "last": {}},
    "ends-differ": {"w_bits": 4, "first": (2, None), "last": {"w_bits": 6, "granularity": "tensor"}},
    "types": {"rules": [{"type": "Linear", "w_bits": 3, "rounding": "ste", "optional": True}], "share_inputs": True},
    "lsq": {"w_bits": 3, "a_bits": 3, "rounding": "lsq", "granularity": "channel"},
    "odd": {"w_bits": 3, "grid": "midrise", "normalize": False, "granularity": "tensor", "slope": "paper"},
    "inputs-only": {"w_bits": None, "a_bits": 5},
    "nothing": {"w_bits": None, "a_bits": None, "first": None, "last": None},
    "attention": {"w_bits": 4, "attention": 6},
}


@pytest.mark.parametrize("asked", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_case_with_every_policy(case, asked):
    assert_reproduced(dq.plan(case.make(), **asked))


@pytest.mark.parametrize("name", ["paper-w1a1", "paper-w3a32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_case_with_presets(case, name):
    plan = dq.plan(case.make(), preset=name)
    again = dq.plan(case.make(), policy=from_toml(plan.to_toml()))
    assert [row[:4] for row in decisions(again)] == [row[:4] for row in decisions(plan)]  # notes name the preset


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_case_with_each_layer_in_turn(case):
    for name in case.converted:
        assert_reproduced(dq.plan(case.make(), exclude=[name]))
        assert_reproduced(dq.plan(case.make(), include=[name]))
        assert_reproduced(dq.plan(case.make(), w_bits=4, bits={name: (2, 5)}))


BITS = st.none() | st.integers(1, 8)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "w_bits": BITS,
        "a_bits": BITS,
        "attention": BITS,
        "granularity": st.sampled_from(("auto", "channel", "tensor")),
        "grid": st.sampled_from(("auto", "midrise", "integer")),
        "normalize": st.sampled_from(("auto", True, False)),
        "rounding": st.sampled_from(("daq", "ewgs", "lsq")),
        "share_inputs": st.booleans(),
    },
)
NAMES = st.sampled_from([site.name for site in SITES] + ["*", "a.*", "re:[bo].*", "b*"])
RULES = st.builds(Rule, CHANGES.filter(bool), match=NAMES, optional=st.just(True)) | st.builds(
    Rule, CHANGES.filter(bool), type=st.sampled_from(("Linear", "matmul")), optional=st.just(True)
)
RANDOM = st.builds(
    Policy,
    default=CHANGES.map(lambda changes: Settings(**changes)),
    rules=st.lists(RULES, max_size=4).map(tuple),
    first=st.none() | CHANGES,
    last=st.none() | CHANGES,
    exclude=st.lists(NAMES, max_size=2).map(tuple),
    include=st.lists(NAMES, max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))  # many policies are impossible
@given(RANDOM, st.permutations(SITES))
def test_any_policy(policy, sites):
    try:
        plan = resolved(policy, sites)
    except PolicyError:
        assume(False)
    assert_reproduced(plan)


def test_it_reads_well(planned, golden_text):
    rules = (Rule({"w_bits": 2}, match="layer1.*"), Rule({"rounding": "ste"}, match="layer1.0.attn.qkv"))
    golden_text(planned(Policy(Settings(4, 4), rules, exclude=("layer2.*",), name="a.toml")).to_toml())


def test_comments_hold_no_line_breaks():
    plan = Plan((PlanRow(Site("a", "Linear"), Settings(4, 4), "x\n[default]"),), "Net\nw_bits = 1", policy="\x7f")
    assert from_toml(plan.to_toml()).default.w_bits == 4


def test_a_label_that_names_no_pattern_excludes_by_name():
    rows = (PlanRow(Site("a", "Linear"), None, "by hand", reason="excluded"), PlanRow(SITES[2], Settings(), "default"))
    assert from_toml(Plan(rows, "Net").to_toml()).exclude == ("a",)


def test_a_reason_of_another_kind_is_an_exclude():
    rows = (PlanRow(Site("a", "Linear"), None, "-", reason="out of fashion"),)
    assert from_toml(Plan(rows, "Net").to_toml()).exclude == ("a",)


def test_including_nothing_that_is_converted():
    plan = resolved(Policy(include=("stem",), exclude=("stem",)), SITES[:3])
    assert_reproduced(plan)
    alone = dataclasses.replace(plan, rows=plan.rows[1:])
    assert set(from_toml(alone.to_toml()).exclude) == {"other", "a.q"}


@pytest.mark.parametrize("name", ["a", "b*", "c[0]", "re:d", "e?", "", "re:*"])
def test_patterns_that_match_one_name(name):
    others = ("a", "b", "bb", "c0", "d", "ex", "re:x", "x")
    sites = [Site(other, "Linear") for other in {*others, name}]
    plan = resolved(Policy(include=(exact_pattern(name),)), sites)
    assert [row.name for row in plan.converted] == [name]


def test_attention_is_one_word_again():
    policy = from_toml(resolved(Policy(Settings(4, 4, attention=6)), SITES).to_toml())
    assert policy.default.attention == 6
    assert not [rule for rule in policy.rules if "attention" in rule.changes]
