"""Which layers a rule means, and the errors for one that means none."""

import pytest
import torch

import daqconvert as dq
from daqconvert.errors import PolicyError
from daqconvert.policy.rules import Level, check_matches, check_pattern, name_level, rule_level
from daqconvert.spec import Policy, Rule, Site


@pytest.mark.parametrize(
    ("pattern", "name", "level"),
    [
        pytest.param("fc", "fc", Level.EXACT, id="exact"),
        pytest.param("fc", "fc2", None, id="a name is no prefix"),
        pytest.param("layer4", "layer4.0.conv1", None, id="a module is not its layers"),
        pytest.param("", "", Level.EXACT, id="the root module"),
        pytest.param("*", "", Level.PATTERN, id="a star is also nothing"),
        pytest.param("layer4.*", "layer4.0.conv1", Level.PATTERN, id="a star crosses dots"),
        pytest.param("*.conv1", "layer4.0.conv1", Level.PATTERN, id="star in front"),
        pytest.param("layer4.*", "layer4", None, id="the dot is needed"),
        pytest.param("layer?.0", "layer4.0", Level.PATTERN, id="one character"),
        pytest.param("layer[34].*", "layer3.0", Level.PATTERN, id="one of these"),
        pytest.param("layer[!34].*", "layer3.0", None, id="none of these"),
        pytest.param("Layer4.*", "layer4.0", None, id="case differs"),
        pytest.param("re:layer[34]\\..*", "layer3.0.conv1", Level.PATTERN, id="regular expression"),
        pytest.param("re:layer3", "layer3.0", None, id="the whole name"),
        pytest.param("re:.*(q|k|v)_proj", "blocks.0.v_proj", Level.PATTERN, id="alternatives"),
        pytest.param("a[0]", "a[0]", Level.EXACT, id="a name with a bracket is exact first"),
        pytest.param("a[0]", "a0", Level.PATTERN, id="and then a glob"),
    ],
)
def test_name_level(pattern, name, level):
    assert name_level(pattern, name) is level


@pytest.mark.parametrize(
    ("kind", "level"),
    [pytest.param("Linear", Level.TYPE, id="same"), pytest.param("QuantLinear", None, id="a name that ends so")],
)
def test_type_is_the_whole_class_name(kind, level):
    assert rule_level(Rule({}, type="Linear"), Site("fc", kind)) is level


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("re:layer[3", id="bracket"),
        pytest.param("re:*", id="nothing to repeat"),
        pytest.param("re:a{99999999999}", id="too large a count"),
    ],
)
def test_a_bad_regular_expression_names_its_rule(pattern):
    with pytest.raises(PolicyError, match=r"^policy.toml rule 3: .* is no regular expression") as caught:
        check_pattern(pattern, "policy.toml rule 3")
    assert pattern in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        pytest.param(
            Policy(rules=(Rule({}, type="Conv2d"), Rule({}, match="layer3.*")), name="policy.toml"),
            'policy.toml rule 2: "layer3.*" matches no layer. '
            "Nearest: layer2.0.conv1, layer1.0.conv1, layer1.0.attn.qkv. "
            "Fix the pattern or set optional = true.",
            id="glob",
        ),
        pytest.param(
            Policy(rules=(Rule({}, match="re:layer9.*"),)),
            'arguments rule 1: "re:layer9.*" matches no layer. '
            "Nearest: layer2.0.conv1, layer1.0.conv1, layer1.0.attn.qkv. "
            "Fix the pattern or set optional = true.",
            id="regular expression",
        ),
        pytest.param(
            Policy(rules=(Rule({}, match="head"),)),
            'arguments rule 1: "head" matches no layer. It is a module with 1 layer inside: write "head.*". '
            "Fix the pattern or set optional = true.",
            id="a module that holds layers",
        ),
        pytest.param(
            Policy(rules=(Rule({}, type="Linaer"),)),
            'arguments rule 1: type "Linaer" matches no layer. Types in this model: Conv2d, Linear. Nearest: Linear. '
            "Fix the type or set optional = true.",
            id="type",
        ),
        pytest.param(
            Policy(exclude=("conv1", "head.fcc"), name="policy.toml"),
            'policy.toml exclude: "head.fcc" matches no layer. Nearest: head.fc. Fix the pattern or remove it.',
            id="exclude",
        ),
        pytest.param(
            Policy(rules=(Rule({}, match="layer2.0.attn.proj"),)),
            'arguments rule 1: "layer2.0.attn.proj" cannot be converted: its weight is parametrized. '
            "Remove the rule or set optional = true.",
            id="exactly a layer that cannot be converted",
        ),
        pytest.param(
            Policy(rules=(Rule({}, match="*.proj"),)),
            'arguments rule 1: "*.proj" matches only layers that cannot be converted, as layer2.0.attn.proj: '
            "its weight is parametrized. Remove the rule or set optional = true.",
            id="nothing but such layers",
        ),
    ],
)
def test_what_has_nothing_to_act_on_is_refused(policy, message, sites):
    with pytest.raises(PolicyError) as caught:
        check_matches(policy, sites)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(Rule({}, match="layer9.*", optional=True), id="matches nothing"),
        pytest.param(Rule({}, type="Conv3d", optional=True), id="no such type"),
        pytest.param(Rule({}, match="layer2.0.attn.proj", optional=True), id="cannot be converted"),
        pytest.param(Rule({}, match="layer2.*"), id="some of several cannot be converted"),
    ],
)
def test_what_may_stay(rule, sites):
    check_matches(Policy(rules=(rule,)), sites)


def test_a_model_without_layers_is_the_callers_business():
    check_matches(Policy(rules=(Rule({}, match="fc"),), exclude=("head",)), ())


@pytest.mark.parametrize("how", ["exclude", "include", "bits", "rule", "first-rule-of-many"])
def test_a_layer_that_is_the_model_itself_is_typed_as_it_is_printed(how):
    model = torch.nn.Linear(4, 2)
    assert str(dq.plan(model)).splitlines()[1].startswith("(root)")
    asked = {
        "exclude": {"exclude": ["(root)"]},
        "include": {"include": ["(root)"], "w_bits": 3, "last": {}, "first": {}},
        "bits": {"bits": {"(root)": 3}},
        "rule": {"rules": [dq.Rule({"w_bits": 3}, match="(root)")]},
        "first-rule-of-many": {"bits": {"*": 5, "(root)": 3}},
    }[how]
    row = dq.plan(model, **asked)["(root)"]
    assert row is not None and row.name == "" and row.converted == (how != "exclude")
    assert row.settings is None or row.settings.w_bits == 3
    with pytest.raises(dq.PolicyError, match=r'"\(rot\)" matches no layer. Nearest: \(root\)'):
        dq.plan(model, exclude=["(rot)"])
    with pytest.raises(dq.PolicyError, match="matches no layer"):
        dq.plan(torch.nn.Sequential(model), exclude=["(root)"])


def test_a_plan_gives_rows_by_place():
    chosen = dq.plan(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))))
    assert (chosen[0].name, chosen[-1].name, [row.name for row in chosen[1:]]) == ("0", "2", ["1", "2"])
    assert chosen["1"] is chosen[1] and list(chosen) == list(chosen[:])
    with pytest.raises(IndexError):
        chosen[3]
    with pytest.raises(KeyError, match="no site of this plan"):
        chosen["3"]
