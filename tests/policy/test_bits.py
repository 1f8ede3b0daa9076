"""`include`, and bits per layer from a mapping or the table `[bits]`."""

import pytest

from daqconvert.errors import PolicyError
from daqconvert.policy import from_toml, to_toml
from daqconvert.policy.arguments import build
from daqconvert.spec import Policy, Rule, Settings


def bits_of(plan):
    return {row.name: row.bits for row in plan.converted}


def test_a_mapping(planned):
    asked = {"layer1.*": 2, "head.fc": (8, None), "conv1": None, "layer1.0.attn.qkv": [3, 5], "layer2.0.conv1": 32}
    plan = planned(build(w_bits=4, a_bits=4, bits=asked))
    assert bits_of(plan) == {"layer1.0.conv1": (2, 2), "layer1.0.attn.qkv": (3, 5), "head.fc": (8, 32)}
    assert plan["layer1.0.conv1"].rule == 'bits: "layer1.*"'
    assert (plan["conv1"].reason, plan["conv1"].rule) == ("w_bits and a_bits are None", 'bits: "conv1"')


def test_a_table_says_the_same(planned):
    asked = {"layer1.*": 2, "head.fc": (8, None), "re:layer2.*": (6, 4)}
    text = '[bits]\n"layer1.*" = 2\n"head.fc" = [8, 32]\n"re:layer2.*" = [6, 4]\n[[rule]]\nmatch = "*"\nw_bits = 5\n'
    policy = from_toml(text)
    assert policy.rules == build(rules={"match": "*", "w_bits": 5}, bits=asked).rules
    assert bits_of(planned(policy))["layer2.0.conv1"] == (6, 4)  # bits come after the rules, wherever they stand
    assert from_toml(to_toml(policy)) == policy


def test_numbers_of_rules_do_not_count_bits(planned):
    policy = build({"bits": {"conv1": 2}}, rules=[Rule({"w_bits": 3}, "layer1.*"), Rule({"w_bits": 5}, "layer9.*")])
    with pytest.raises(PolicyError, match=r'dict \+ arguments rule 2: "layer9\.\*" matches no layer'):
        planned(policy)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        pytest.param({"a": 9}, 'bits "a": w_bits: expected an integer from 1 to 8, ', id="9"),
        pytest.param({"a": (4, "4")}, 'bits "a": a_bits: expected an integer from 1 to 8, ', id="text"),
        pytest.param({"a": True}, 'bits "a": w_bits: expected an integer from 1 to 8, ', id="True"),
        pytest.param({"a": (4, 4, 4)}, 'bits "a": expected bits of weight and input such as 4, (4, 8)', id="three"),
        pytest.param({3: 4}, "bits: expected the name or pattern of a layer; found 3.", id="a number as name"),
        pytest.param([("a", 4)], "bits: expected layers and their bits, such as {", id="a list"),
        pytest.param({"re:(": 4}, 'bits "re:(": "re:(" is no regular expression ', id="regex"),
    ],
)
def test_bits_that_are_none(bits, message):
    with pytest.raises(PolicyError) as caught:
        build(bits=bits)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "[bits]\nlayer4.0.conv1 = 2",
            'policy text [bits] "layer4": expected bits such as 4, [4, 8] or 32; found a table. '
            'Put a name that holds dots in quotes: "layer4.0.conv1" = 2.',
            id="dots without quotes",
        ),
        pytest.param("[bits.head]\n", 'policy text [bits] "head": expected bits such as 4', id="a table of its own"),
        pytest.param("[bits]\nlayer4.* = 2", "policy text is not valid TOML: ", id="a star without quotes"),
        pytest.param("bits = 4", "policy text [bits]: expected layers and their bits", id="a number"),
        pytest.param("[default]\nbits = 4", "policy text [default]: unknown key 'bits'", id="in the wrong place"),
    ],
)
def test_files_that_say_bits_wrongly(text, message):
    with pytest.raises(PolicyError) as caught:
        from_toml(text)
    assert str(caught.value).startswith(message)
    if "*" in text:
        assert 'stands in quotes: "layer4.*" = 2.' in str(caught.value)


@pytest.mark.parametrize(
    ("bits", "told"),
    [
        ({"layer9.*": 2}, 'arguments bits: "layer9.*" matches no layer. Nearest: '),
        ({"layer1": 2}, 'arguments bits: "layer1" matches no layer. It is a module with 2 layers inside: write '),
        ({"layer2.0.attn.proj": 2}, 'arguments bits: "layer2.0.attn.proj" cannot be converted: '),
    ],
    ids=["nothing", "module", "inconvertible"],
)
def test_bits_for_nobody(bits, told, planned):
    with pytest.raises(PolicyError) as caught:
        planned(build(bits=bits))
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("include", "names"),
    [
        pytest.param("head.fc", ["head.fc"], id="one text"),
        pytest.param(["layer1.*", "conv1"], ["conv1", "layer1.0.conv1", "layer1.0.attn.qkv"], id="patterns"),
        pytest.param(("re:.*conv1",), ["conv1", "layer1.0.conv1", "layer2.0.conv1"], id="regular expression"),
    ],
)
def test_include(include, names, planned):
    plan = planned(build(include=include))
    assert [row.name for row in plan.converted] == names
    left = [row for row in plan if not row.converted and not row.site.reason]
    assert {(row.rule, row.reason) for row in left} == {("include", "not included")}
    assert plan["layer2.0.attn.proj"].reason == "its weight is parametrized"


def test_exclude_beats_include(planned):
    plan = planned(build(include="layer1.*", exclude="*.qkv"))
    assert [row.name for row in plan.converted] == ["layer1.0.conv1"]
    assert plan["layer1.0.attn.qkv"].reason == "excluded"


def test_include_in_a_file_and_over_it():
    policy = from_toml('include = ["layer1.*"]\nexclude = ["b"]')
    assert (policy.include, from_toml(to_toml(policy))) == (("layer1.*",), policy)
    assert build(policy, include="fc").include == ("fc",)
    assert build(policy, exclude="c").include == ("layer1.*",)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        pytest.param(
            lambda: build(include=["heads.fc"]),
            'arguments include: "heads.fc" matches no layer. Nearest: head.fc',
            id="nearest",
        ),
        pytest.param(
            lambda: build(include=["layer2.0.attn.proj"]),
            'arguments include: "layer2.0.attn.proj" matches only layers that cannot be converted, as layer2.0.attn',
            id="inconvertible",
        ),
        pytest.param(lambda: build(include=[]), "include: an empty list would convert nothing", id="empty"),
        pytest.param(lambda: from_toml("include = []"), "policy text include: an empty list would ", id="empty file"),
        pytest.param(lambda: build(include=[3]), "include: expected a name or pattern; found 3.", id="number"),
        pytest.param(
            lambda: Policy(include="head.fc"), "arguments include: expected a list of names", id="text in Python"
        ),
        pytest.param(lambda: build(bits=None, include="re:("), 'include: "re:(" is no regular', id="regex"),
    ],
)
def test_include_refused(make, told, planned):
    with pytest.raises(PolicyError) as caught:
        planned(make())
    assert str(caught.value).startswith(told)


def test_a_setting_called_bits_is_explained():
    with pytest.raises(PolicyError, match=r"'bits' is not a setting\. Write bits beside them: "):
        Settings().replace(bits=4)
