"""Keyword arguments become a policy."""

from pathlib import Path

import pytest

from daqconvert.errors import PolicyError
from daqconvert.policy.arguments import UNSET, build
from daqconvert.policy.presets import preset
from daqconvert.spec import Policy, Rule, Settings


def test_nothing_asked_is_the_default():
    assert build() == Policy()
    assert build(first=UNSET, w_bits=UNSET) == Policy()


def test_settings_are_the_default_ones():
    assert build(w_bits=4, a_bits=32, rounding="ste") == Policy(Settings(4, None, rounding="ste"))


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        pytest.param(None, None, id="float"),
        pytest.param((4, None), {"w_bits": 4, "a_bits": None}, id="pair"),
        pytest.param([4, 32], {"w_bits": 4, "a_bits": None}, id="list"),
        pytest.param({"granularity": "tensor"}, {"granularity": "tensor"}, id="dict"),
        pytest.param({}, {}, id="empty"),
    ],
)
@pytest.mark.parametrize("key", ["first", "last"])
def test_positions(key, given, changes):
    policy = build(**{key: given})
    assert getattr(policy, key) == changes
    assert getattr(policy, {"first": "last", "last": "first"}[key]) == {"w_bits": 8, "a_bits": 8}


def test_a_preset_and_what_overrides_it():
    assert build(preset="paper-w2a2") == preset("paper-w2a2")
    policy = build(preset="paper-w2a2", rounding="ste", last=(8, 8))
    assert policy.default == preset("paper-w2a2").default.replace(rounding="ste")
    assert (policy.first, policy.last) == (None, {"w_bits": 8, "a_bits": 8})
    assert policy.name == "paper-w2a2 + arguments"


def test_a_file_and_what_comes_on_top(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('exclude = ["a"]\nlast = false\n[[rule]]\nmatch = "b"\nw_bits = 2\n', encoding="utf-8")
    plain = Policy(rules=(Rule({"w_bits": 2}, "b"),), last=None, exclude=("a",), name="policy.toml")
    assert build(path) == build(str(path)) == build(policy=path) == plain
    more = build(path, a_bits=4, exclude="c", rules=[Rule({"w_bits": 3}, type="Linear"), {"match": "d", "w_bits": 32}])
    assert more == Policy(
        Settings(8, 4),
        rules=(*plain.rules, Rule({"w_bits": 3}, type="Linear"), Rule({"w_bits": None}, "d")),
        last=None,
        exclude=("a", "c"),
        name="policy.toml + arguments",
    )


def test_a_policy_and_a_dict():
    policy = Policy(Settings(3, 3), name="mine")
    assert build(policy) is not policy
    assert build(policy) == policy
    assert build({"default": {"w_bits": 3}}).default.w_bits == 3


def test_one_rule_may_stand_alone():
    assert build(rules={"match": "a", "w_bits": 2}) == build(rules=Rule({"w_bits": 2}, "a"))


def test_a_policy_from_python_is_checked_and_normalized():
    assert build(Policy(rules=(Rule({"w_bits": 32}, "a"),))).rules[0].changes == {"w_bits": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"policy": Policy(), "preset": "paper-w1a1"},
            "policy and preset = 'paper-w1a1' cannot both be given. Leave one out.",
            id="policy and preset",
        ),
        pytest.param({"preset": "paper"}, "preset 'paper' does not exist. ", id="no such preset"),
        pytest.param(
            {"policy": "paper-w1a1"},
            "policy: expected a Policy, a dict, or the path of a .toml file; found 'paper-w1a1'. "
            'Did you mean preset = "paper-w1a1"?',
            id="a preset as policy",
        ),
        pytest.param(
            {"policy": Path("a.yaml")}, "policy: expected a Policy, a dict, or the path of a .toml", id="yaml"
        ),
        pytest.param(
            {"policy": 4}, "policy: expected a Policy, a dict, or the path of a .toml file; found 4.", id="number"
        ),
        pytest.param({"policy": "nix.toml"}, "nix.toml does not exist.", id="no such file"),
        pytest.param(
            {"w_bit": 4}, "arguments: 'w_bit' is not a setting. Settings are: w_bits, ", id="no such setting"
        ),
        pytest.param({"w_bits": 2.5}, "arguments: w_bits: expected an integer from 1 to 8, ", id="2.5 bits"),
        pytest.param(
            {"first": 8},
            "first: expected None (float), a pair first = (w_bits, a_bits), or a dict of settings; found 8.",
            id="first is a number",
        ),
        pytest.param({"last": (8, 8, 8)}, "last: expected None (float), a pair last = ", id="three"),
        pytest.param({"last": False}, "last: expected None (float), a pair last = ", id="False"),
        pytest.param({"last": (8, 9)}, "last: a_bits: expected an integer from 1 to 8, ", id="9 bits"),
        pytest.param({"last": {"bits": 9}}, "last: 'bits' is not a setting. ", id="a dict"),
        pytest.param({"exclude": [4]}, "exclude: expected a name or pattern; found 4.", id="exclude"),
        pytest.param({"exclude": "re:["}, 'arguments exclude: "re:[" is no regular expression', id="exclude regex"),
        pytest.param({"rules": [{"w_bits": 4}]}, "rule 1: expected either match ", id="rule"),
        pytest.param(
            {"policy": Policy(rules=(Rule({"w_bits": 2}, "a"),)), "rules": [{"w_bits": 4}]},
            "rule 2: expected either match ",
            id="rules are counted after the policy's",
        ),
        pytest.param({"rules": [Rule({}, "a")]}, 'rule 1: "a" changes nothing. ', id="empty rule"),
        pytest.param({"rules": ["a"]}, "rule 1: expected a table; found 'a'.", id="text"),
        pytest.param(
            {"policy": Policy(rules=(Rule({"w_bits": 0}, "a"),), name="mine")},
            "mine rule 1: w_bits: ",
            id="Python policy",
        ),
        pytest.param(
            {"policy": Policy(default={"w_bits": 4})}, "arguments [default]: expected Settings; found", id="default"
        ),
        pytest.param(
            {"policy": Policy(rules=({"match": "a"},))}, "arguments rule 1: expected a Rule; found", id="a dict rule"
        ),
        pytest.param({"policy": Policy(first=(8, 8))}, "arguments [first]: expected settings such as ", id="a pair"),
        pytest.param({"policy": Policy(exclude="head")}, "arguments exclude: expected a list of names", id="a text"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(PolicyError) as caught:
        build(**arguments)
    assert str(caught.value).startswith(message)
