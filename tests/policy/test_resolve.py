"""The precedence of rules as a table of cases, and what else a row of the plan says."""

import pytest

from daqconvert.errors import PolicyError
from daqconvert.policy.presets import preset
from daqconvert.policy.resolve import EXACT_SUM, ONE_BIT_NOTE, PAPER_NOTE, SUM_NOTE, largest_sum
from daqconvert.spec import Policy, Rule, Settings, Site

W4A4 = Settings(w_bits=4, a_bits=4)
EXACT = Rule({"w_bits": 1}, match="layer1.0.conv1")
GLOB = Rule({"w_bits": 2}, match="layer1.*")
REGEX = Rule({"w_bits": 3}, match="re:.*conv1")
TYPE = Rule({"w_bits": 5}, type="Conv2d")


@pytest.mark.parametrize(
    ("rules", "w_bits", "label"),
    [
        pytest.param((), 4, "default", id="default"),
        pytest.param((TYPE,), 5, 'rule 1: type "Conv2d"', id="type beats default"),
        pytest.param((GLOB, TYPE), 2, 'rule 1: "layer1.*"', id="pattern beats type, even earlier"),
        pytest.param((EXACT, GLOB, REGEX, TYPE), 1, 'rule 1: "layer1.0.conv1"', id="exact beats all, even earliest"),
        pytest.param((GLOB, REGEX), 3, 'rule 2: "re:.*conv1"', id="of patterns the later"),
        pytest.param((REGEX, GLOB), 2, 'rule 2: "layer1.*"', id="a regex is no stronger than a glob"),
        pytest.param(
            (EXACT, Rule({"w_bits": 6}, match="layer1.0.conv1")), 6, 'rule 2: "layer1.0.conv1"', id="of exacts"
        ),
        pytest.param((TYPE, Rule({"w_bits": 6}, type="Conv2d")), 6, 'rule 2: type "Conv2d"', id="of types"),
        pytest.param((Rule({"w_bits": 6}, match="head.fc"),), 4, "default", id="another layer's rule"),
    ],
)
def test_precedence_of_rules(rules, w_bits, label, planned):
    row = planned(Policy(W4A4, rules=rules))["layer1.0.conv1"]
    assert (row.settings.w_bits, row.settings.a_bits, row.rule) == (w_bits, 4, label)


def test_settings_merge_field_by_field(planned):
    rules = (
        Rule({"w_bits": 1, "rounding": "ste"}, match="layer1.0.conv1"),
        Rule({"w_bits": 2, "a_bits": 2, "slope": "paper"}, match="layer1.*"),
        Rule({"w_bits": 3, "a_bits": 3, "granularity": "tensor"}, type="Conv2d"),
    )
    row = planned(Policy(W4A4, rules=rules))["layer1.0.conv1"]
    assert row.settings == Settings(1, 2, "tensor", grid="midrise", normalize=True, rounding="ste", slope="paper")
    assert row.rule == 'rule 1: "layer1.0.conv1"'


POSITION = "first layer (first = None)"


@pytest.mark.parametrize(
    ("first", "rules", "bits", "label", "reason"),
    [
        pytest.param({"w_bits": 8, "a_bits": 8}, (), (8, 8), "first", "", id="position beats default"),
        pytest.param({"w_bits": 8}, (), (8, 4), "first", "", id="what it does not say is the default's"),
        pytest.param({}, (), (4, 4), "first", "", id="an empty table"),
        pytest.param({"w_bits": 8}, (TYPE,), (5, 4), 'rule 1: type "Conv2d"', "", id="type beats position"),
        pytest.param(None, (), None, "first", POSITION, id="float"),
        pytest.param(None, (TYPE,), (5, None), 'rule 1: type "Conv2d"', "", id="type that sets bits beats float"),
        pytest.param(
            None,
            (Rule({"w_bits": 2, "a_bits": 3}, match="conv1"),),
            (2, 3),
            'rule 1: "conv1"',
            "",
            id="so does a name",
        ),
        pytest.param(
            None, (Rule({"granularity": "tensor"}, match="conv1"),), None, "first", POSITION, id="no bits, still float"
        ),
        pytest.param(
            None,
            (Rule({"w_bits": None}, match="conv1"),),
            None,
            'rule 1: "conv1"',
            "w_bits and a_bits are None",
            id="a rule that says float too",
        ),
        pytest.param(
            {"w_bits": None, "a_bits": None},
            (),
            None,
            "first",
            "w_bits and a_bits are None",
            id="first = (None, None)",
        ),
        pytest.param({"w_bits": None, "a_bits": 8}, (), (None, 8), "first", "", id="weight float, input quantized"),
    ],
)
def test_first_sites(first, rules, bits, label, reason, planned):
    row = planned(Policy(W4A4, rules=rules, first=first))["conv1"]
    assert (row.rule, row.reason) == (label, reason)
    assert (row.settings and (row.settings.w_bits, row.settings.a_bits)) == bits
    assert row.converted == (bits is not None)


def test_last_sites_and_the_others(planned):
    plan = planned(Policy(W4A4, last=None))
    assert (plan["head.fc"].rule, plan["head.fc"].reason) == ("last", "last layer (last = None)")
    assert plan["layer2.0.conv1"].rule == "default"


@pytest.mark.parametrize(
    ("first", "last", "bits", "label"),
    [
        pytest.param({"w_bits": 6}, {"w_bits": 7}, (7, 4), "last", id="last wins"),
        pytest.param({"w_bits": 6}, {"a_bits": 7}, (6, 7), "last", id="both apply"),
        pytest.param(None, {"w_bits": 7}, (7, None), "last", id="float first"),
        pytest.param({"w_bits": 6}, None, None, "last", id="float last"),
    ],
)
def test_a_site_that_is_first_and_last(first, last, bits, label, planned):
    only = (Site("", "Linear", first=True, last=True),)
    row = planned(Policy(W4A4, first=first, last=last), only)[""]
    assert row.rule == label
    assert (row.settings and (row.settings.w_bits, row.settings.a_bits)) == bits


@pytest.mark.parametrize(
    ("exclude", "label"),
    [
        pytest.param(("layer1.0.conv1",), 'exclude: "layer1.0.conv1"', id="name"),
        pytest.param(("layer1.*", "*.conv1"), 'exclude: "*.conv1"', id="pattern, the later"),
        pytest.param(("re:layer1.*",), 'exclude: "re:layer1.*"', id="regular expression"),
    ],
)
def test_exclude_beats_all(exclude, label, planned):
    row = planned(Policy(W4A4, rules=(EXACT,), exclude=exclude))["layer1.0.conv1"]
    assert (row.settings, row.rule, row.reason, row.signed) == (None, label, "excluded", None)


def test_inconvertible_sites_keep_their_reason_whatever_the_rules_say(planned):
    row = planned(Policy(W4A4, rules=(Rule({"w_bits": 2}, match="layer2.*"),), exclude=("*.attn.*",)))[
        "layer2.0.attn.proj"
    ]
    assert (row.settings, row.rule, row.reason, row.notes) == (None, "-", "its weight is parametrized", ("seen",))


def test_default_of_float_leaves_all_but_the_named_alone(planned):
    policy = Policy(Settings(None, None), rules=(Rule({"w_bits": 2}, match="layer2.0.conv1"),), first=None, last=None)
    plan = planned(policy)
    assert [row.name for row in plan.converted] == ["layer2.0.conv1"]
    assert (plan["layer1.0.conv1"].rule, plan["layer1.0.conv1"].reason) == ("default", "w_bits and a_bits are None")


def test_signs_follow_the_proof(planned):
    assert [row.signed for row in planned(Policy(W4A4))] == [None, False, None, False, None, False]


def test_the_plan_carries_what_was_given(planned, sites):
    plan = planned(Policy(W4A4, name="policy.toml"))
    assert (plan.model, plan.order, plan.other_params, plan.input_size) == ("Net", "fx", 64, (1, 3, 32, 32))
    assert plan.policy == "policy.toml"
    assert tuple(row.site for row in plan) == sites
    assert not any("auto" in (row.settings.grid, row.settings.normalize) for row in plan.converted)


def test_no_sites_make_an_empty_plan(planned):
    assert len(planned(Policy(rules=(Rule({"w_bits": 2}, match="fc"),)), ())) == 0


@pytest.mark.parametrize(
    ("grid", "w_bits", "a_bits", "reduction", "noted"),
    [
        pytest.param("integer", 8, 8, 518, False, id="integer, below"),
        pytest.param("integer", 8, 8, 519, True, id="integer, above"),
        pytest.param("midrise", 8, 8, 258, False, id="mid-rise, below"),
        pytest.param("midrise", 8, 8, 259, True, id="mid-rise, above"),
        pytest.param("midrise", 1, 1, 2**24 - 1, False, id="one less"),
        pytest.param("midrise", 1, 1, 2**24, True, id="reached"),
        pytest.param("integer", 8, None, 2**30, False, id="float input"),
        pytest.param("integer", None, 8, 2**30, False, id="float weight"),
    ],
)
def test_sums_beyond_exactness_are_noted(grid, w_bits, a_bits, reduction, noted, planned):
    settings = Settings(w_bits, a_bits, grid=grid)
    row = planned(Policy(settings), (Site("fc", "Linear", reduction=reduction, nonnegative=True),))["fc"]
    assert row.notes == ((SUM_NOTE,) if noted else ())
    assert (largest_sum(row.site, row.settings) >= EXACT_SUM) == noted


@pytest.mark.parametrize(
    ("policy", "notes"),
    [
        pytest.param(preset("paper-w2a2"), (PAPER_NOTE,), id="paper"),
        pytest.param(preset("paper-w1a1"), (PAPER_NOTE, ONE_BIT_NOTE), id="paper at 1 bit"),
        pytest.param(preset("paper-w1a32"), (), id="paper with a float input"),
        pytest.param(Policy(Settings(1, 1)), (ONE_BIT_NOTE,), id="1 bit"),
        pytest.param(Policy(Settings(2, 2), name="paper-like.toml"), (), id="a file of such a name"),
    ],
)
def test_inputs_that_may_be_negative_are_noted(policy, notes, planned):
    plan = planned(policy)
    assert plan["layer1.0.attn.qkv"].notes == notes
    assert plan["layer1.0.conv1"].notes == ()


def test_notes_of_the_site_come_first(planned):
    site = Site("fc", "Linear", reduction=2**20, nonnegative=True, notes=("shared by two modules",))
    assert planned(Policy(), (site,))["fc"].notes == ("shared by two modules", SUM_NOTE)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        pytest.param(
            Policy(Settings(4, 4), rules=(Rule({"w_bits": 1, "grid": "integer"}, match="*.qkv"),), name="p.toml"),
            'p.toml: layer layer1.0.attn.qkv (rule 1: "*.qkv"): grid = "integer" has no level but 0 at w_bits = 1. '
            'Set grid = "midrise" or "auto", or w_bits to 2 or more.',
            id="impossible together",
        ),
        pytest.param(
            Policy(rules=(Rule({"w_bits": 9}, match="conv1"),), name="p.toml"),
            "p.toml rule 1: w_bits: expected an integer from 1 to 8, or None (32) for floating point; found 9.",
            id="impossible width",
        ),
        pytest.param(
            Policy(rules=(Rule({"w_bits": 2}, match="layer9.*"),)),
            'arguments rule 1: "layer9.*" matches no layer. '
            "Nearest: layer2.0.conv1, layer1.0.conv1, layer1.0.attn.qkv. "
            "Fix the pattern or set optional = true.",
            id="matches nothing",
        ),
    ],
)
def test_errors(policy, message, planned):
    with pytest.raises(PolicyError) as caught:
        planned(policy)
    assert str(caught.value) == message
