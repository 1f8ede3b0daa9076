"""Attention products, weights computed from the input, and sites that take one scale only."""

import pytest

from daqconvert.errors import PolicyError
from daqconvert.policy import from_toml
from daqconvert.policy.arguments import build
from daqconvert.policy.resolve import COMPUTED_NOTE, ONE_BIT_NOTE, SUM_NOTE, largest_sum
from daqconvert.spec import Call, Policy, Rule, Settings, Site
from daqconvert.spec.row import ONE_BIT_COMPUTED, ONE_BIT_PRODUCT, PRODUCT_OFF

SITES = (
    Site("qkv", "Linear", (24, 8), 24, 8, 192, first=True),
    Site("attn.qk", "matmul", call=Call("matmul", ("attn",), "attn.qk"), reduction=8, macs=100, first=True),
    Site("attn.av", "matmul", call=Call("matmul", ("attn",), "attn.av"), reduction=8, nonnegative=True, last=True),
    Site("cond", "CondConv2d", (8, 4), 8, 36, 32, call=Call("conv2d", ("cond",), "cond", ("cond.weight",), True)),
    Site("fixed", "Linear", (8, 4), 8, 4, 32, call=Call("linear", ("m",), "fixed", ("fixed.weight",))),
    Site("sum", "Linear", (8, 4), 8, 4, 32, one_scale="its rows are added up"),
)


@pytest.fixture
def rows(planned):
    def resolve(policy):
        return planned(policy, SITES)

    return resolve


@pytest.mark.parametrize("value", [None, False, 32], ids=str)
def test_products_are_off(value, rows):
    plan = rows(Policy(Settings(4, 4, attention=value)))
    for name in ("attn.qk", "attn.av"):
        assert (plan[name].settings, plan[name].reason, plan[name].rule) == (None, PRODUCT_OFF, "default")
    assert PRODUCT_OFF == "attention product: off; attention = 8 turns it on"


def test_one_word_turns_them_on_and_nothing_else(rows):
    plan = rows(Policy(Settings(3, 2, attention=6, grid="midrise", rounding="ste", share_inputs=True), first=None))
    expected = Settings(6, 6, "tensor", "integer", False, "ste", attention=6)
    assert [plan[name].settings for name in ("attn.qk", "attn.av")] == [expected, expected]
    assert (plan["attn.qk"].rule, plan["attn.qk"].signed, plan["attn.av"].signed) == ("default", None, False)
    assert plan["qkv"].reason == "first layer (first = None)"
    assert plan["sum"].settings.attention is None
    assert rows(Policy(Settings(None, None, attention=8)))["attn.qk"].converted


@pytest.mark.parametrize(
    ("rules", "bits", "label"),
    [
        pytest.param((Rule({"attention": 4}, match="attn.*"),), (4, 4), 'rule 1: "attn.*"', id="pattern"),
        pytest.param((Rule({"attention": 4}, type="matmul"),), (4, 4), 'rule 1: type "matmul"', id="type"),
        pytest.param((Rule({"attention": None}, match="attn.qk"),), None, 'rule 1: "attn.qk"', id="off by name"),
        pytest.param((Rule({"w_bits": 2}, match="*"),), (8, 8), "default", id="bits of layers do not count"),
        pytest.param((Rule({"w_bits": 2, "attention": 4}, match="*"),), (4, 4), 'rule 1: "*"', id="both"),
    ],
)
def test_rules_for_products(rules, bits, label, rows):
    row = rows(Policy(Settings(4, 4, attention=8), rules=rules))["attn.qk"]
    assert (row.settings and row.bits) == bits
    assert row.rule == label


def test_exclude_and_include_hold_for_products(rows):
    plan = rows(Policy(Settings(attention=8), exclude=("attn.qk",), include=("attn.*", "sum")))
    assert [row.name for row in plan.converted] == ["attn.av", "sum"]
    assert (plan["attn.qk"].reason, plan["qkv"].reason) == ("excluded", "not included")


def test_one_bit_where_nothing_is_negative(rows):
    plan = rows(Policy(Settings(1, 1, attention=1)))
    assert (plan["attn.qk"].settings, plan["attn.qk"].reason) == (None, ONE_BIT_PRODUCT)
    assert (plan["attn.av"].bits, plan["attn.av"].settings.grid, plan["attn.av"].notes) == ((1, 1), "integer", ())
    assert (plan["cond"].settings, plan["cond"].reason) == (None, ONE_BIT_COMPUTED)
    assert ONE_BIT_NOTE in plan["sum"].notes


def test_a_weight_computed_from_the_input(rows):
    plan = rows(Policy(Settings(2, 4, granularity="channel", grid="midrise", normalize=True)))
    assert plan["cond"].settings == Settings(2, 4, "tensor", "integer", False)
    assert plan["cond"].notes == (COMPUTED_NOTE,)
    assert COMPUTED_NOTE == "its weight is computed from the input: quantized per tensor as it comes"
    assert (plan["cond"].weight_text, plan["fixed"].weight_text) == (
        "2 tensor computed",
        "2 channel midrise normalized",
    )
    assert plan["fixed"].settings == plan["sum"].settings.replace(granularity="channel")


def test_a_site_that_takes_one_scale_says_why(rows):
    plan = rows(Policy(Settings(4, 4, granularity="channel")))
    assert (plan["sum"].settings.granularity, plan["sum"].notes) == ("tensor", ("its rows are added up",))
    assert plan["fixed"].settings.granularity == "channel"


def test_sums_of_computed_operands_reach_further(rows):
    settings = Settings(8, 8, grid="integer")
    assert largest_sum(SITES[3], settings) == 36 * 255 * 255
    assert largest_sum(SITES[4], settings) == 4 * 255 * 127
    wide = Site("p", "matmul", call=SITES[1].call, reduction=300, nonnegative=True)
    assert largest_sum(wide, settings) > 2**24 > 300 * 255 * 127
    assert SITES[1].is_product


def test_sums_of_products_are_noted(planned):
    wide = Site("p", "matmul", call=SITES[1].call, reduction=300, nonnegative=True)
    assert planned(Policy(Settings(attention=8)), (wide,))["p"].notes == (SUM_NOTE,)


@pytest.mark.parametrize("value", [0, 9, True, "on", 2.5, -1], ids=repr)
def test_what_attention_cannot_be(value):
    told = rf"arguments: attention: expected the bits of both operands.*found {value!r}\. Write attention = 8\."
    with pytest.raises(PolicyError, match=told):
        build(attention=value)


@pytest.mark.parametrize(
    ("text", "found"), [("attention = 8", 8), ("attention = false", None), ("attention = 32", None)], ids=str
)
def test_attention_in_a_file(text, found):
    assert from_toml(f"[default]\n{text}").default.attention == found


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        pytest.param(
            Rule({"w_bits": 4}, match="attn.qk"),
            'arguments rule 1: "attn.qk" sets w_bits of an attention product (attn.qk), whose bits are one setting. '
            "Write attention = 8.",
            id="w_bits of a product",
        ),
        pytest.param(
            Rule({"attention": 4}, type="Linear"),
            'arguments rule 1: type "Linear" sets attention, which qkv (Linear) does not take. '
            "Remove the rule or set optional = true.",
            id="attention of layers",
        ),
        pytest.param(
            Rule({"granularity": "channel"}, match="sum"),
            'arguments rule 1: "sum" sets granularity, which sum (Linear) does not take. '
            "Remove the rule or set optional = true.",
            id="granularity where one scale is possible",
        ),
    ],
)
def test_rules_without_effect(rule, message, rows):
    with pytest.raises(PolicyError) as caught:
        rows(Policy(rules=(rule,)))
    assert str(caught.value) == message
    rows(Policy(rules=(Rule(rule.changes, rule.match, rule.type, optional=True),)))
