"""Policies as TOML and dicts: what is read, what is refused, and the way there and back."""

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daqconvert.errors import PolicyError
from daqconvert.policy import from_dict, from_toml, to_dict, to_toml
from daqconvert.spec import CHOICES, Policy, Rule, Settings

EXAMPLE = """
exclude = ["head", "aux.*"]

[default]
w_bits = 4
a_bits = 32
granularity = "tensor"
normalize = false
w_gamma = 3

[[rule]]
match = "layer4.*"
w_bits = 2

[[rule]]
type = "Linear"
optional = true
rounding = "ste"

[first]
w_bits = 8
"""


def test_every_part_of_a_file(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    expected = Policy(
        Settings(4, None, "tensor", normalize=False, w_gamma=3.0),
        rules=(Rule({"w_bits": 2}, "layer4.*"), Rule({"rounding": "ste"}, type="Linear", optional=True)),
        first={"w_bits": 8},
        exclude=("head", "aux.*"),
        name="policy.toml",
    )
    assert from_toml(path) == from_toml(str(path)) == expected
    assert from_toml(EXAMPLE) == dataclasses.replace(expected, name="policy text")


def test_nothing_said_is_the_default():
    assert from_dict({}) == Policy(name="dict")


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "policy.toml").write_bytes(b"\xef\xbb\xbffirst = false\n")
    assert from_toml(tmp_path / "policy.toml").first is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "w_bits = 4",
            "unknown key 'w_bits'. Keys are: target, default, rule, bits, first, last, exclude, include.",
            id="top",
        ),
        pytest.param("[defaults]\nx=1", "unknown key 'defaults'. Keys are: *. Nearest: default*", id="table"),
        pytest.param("default = 4", "[default]: expected a table; found 4.", id="default is a number"),
        pytest.param(
            "[default]\nw_bit = 4", "[default]: unknown key 'w_bit'. Keys are: *. Nearest: w_bits, *", id="key"
        ),
        pytest.param(
            "[default]\nw_bits = 0", "[default]: w_bits: expected an integer from 1 to 8, *; found 0.", id="0"
        ),
        pytest.param("[default]\nw_bits = 9", "[default]: w_bits: expected *; found 9.", id="9 bits"),
        pytest.param("[default]\na_bits = 2.5", "[default]: a_bits: expected *; found 2.5.", id="2.5 bits"),
        pytest.param("[default]\na_bits = true", "[default]: a_bits: expected *; found True.", id="true bits"),
        pytest.param(
            "[default]\ngrid = 'int'", "[default]: grid: expected *; found 'int'. Nearest: integer*", id="grid"
        ),
        pytest.param("[default]\nw_gamma = -1", "[default]: w_gamma: expected a positive *; found -1.", id="gamma"),
        pytest.param("[default]\nw_sigma = inf", "[default]: w_sigma: expected a positive *; found inf.", id="inf"),
        pytest.param("[default]\na_sigma = nan", "[default]: a_sigma: expected a positive *; found nan.", id="nan"),
        pytest.param(f"[default]\na_gamma = 1{'0' * 400}", "[default]: a_gamma: expected a positive *", id="huge"),
        pytest.param(
            "[rule]\nmatch='a'", "rule: expected a list of tables, each under [[rule]]; found *", id="[rule]"
        ),
        pytest.param("rule = ['a']", "rule 1: expected a table; found 'a'.", id="a list of texts"),
        pytest.param("[[rule]]\nw_bits=4", "rule 1: expected either match *; found neither.", id="neither"),
        pytest.param(
            "[[rule]]\nmatch='a'\nw_bits=1\n[[rule]]\nmatch='a'\ntype='b'\nw_bits=4",
            'rule 2: expected either match *; found match = "a" and type = "b".',
            id="both",
        ),
        pytest.param(
            "[[rule]]\nmatch=1\nw_bits=4", "rule 1: match: expected a text; found 1.", id="match is a number"
        ),
        pytest.param("[[rule]]\ntype=['a']\nw_bits=4", "rule 1: type: expected a text; found ['a'].", id="types"),
        pytest.param(
            "[[rule]]\nmtach='a'", "rule 1: unknown key 'mtach'. Keys are: match, *. Nearest: match*", id="typo"
        ),
        pytest.param("[[rule]]\nmatch='a'", 'rule 1: "a" changes nothing. *', id="no settings"),
        pytest.param("[[rule]]\nmatch='a'\nw_bits=12", "rule 1: w_bits: expected *; found 12.", id="12 bits"),
        pytest.param("[[rule]]\nmatch='re:('\nw_bits=1", 'rule 1: "re:(" is no regular expression *', id="regex"),
        pytest.param(
            "[[rule]]\nmatch='a'\noptional=1\nw_bits=4", "rule 1: optional: expected true or *", id="optional"
        ),
        pytest.param("first = true", "first: expected a table [first] *, or first = false *; found True.", id="true"),
        pytest.param("last = [8, 8]", "last: expected a table [last] *; found [8, 8].", id="a pair"),
        pytest.param("[last]\nbits = 8", "[last]: unknown key 'bits'. *Nearest: w_bits, a_bits*", id="last"),
        pytest.param("[first]\nw_bits = 64", "[first]: w_bits: expected *; found 64.", id="first"),
        pytest.param("exclude = 'head'", 'exclude: expected a list of names such as ["head"]; found *', id="a text"),
        pytest.param("exclude = [1]", "exclude: expected a name or pattern; found 1.", id="a number"),
        pytest.param("exclude = ['re:[']", 'exclude: "re:[" is no regular expression *', id="excluded regex"),
    ],
)
def test_what_is_refused(text, message, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError) as caught:
        from_toml(path)
    told = str(caught.value)
    position = 0
    assert told.startswith(str(path))
    for part in message.split("*"):  # a star stands for any text
        assert part in told[position:], told
        position = told.index(part, position) + len(part)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[default", id="bracket"),
        pytest.param("w_bits = ", id="no value"),
        pytest.param("[default]\nw_bits = 4\nw_bits = 4", id="twice"),
        pytest.param(f"[default]\nw_gamma = {'1' * 5000}", id="more digits than Python reads"),
        pytest.param(f"exclude = {'[' * 5000}", id="deep"),
    ],
)
def test_what_is_no_toml(text, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError, match=r"policy\.toml is not valid TOML: "):
        from_toml(path)


def test_files_that_cannot_be_read(tmp_path):
    missing, folder, binary = tmp_path / "nix.toml", tmp_path / "folder.toml", tmp_path / "binary.toml"
    folder.mkdir()
    binary.write_bytes(b"\xff\xfe\x00")
    for path, told in (
        (missing, "does not exist"),
        (folder, "cannot be read: Is a directory"),
        (binary, "is not UTF-8"),
    ):
        with pytest.raises(PolicyError) as caught:
            from_toml(str(path))
        assert str(caught.value).startswith(f"{path} {told}")


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("nowhere/policy.toml", id="ends in .toml"),
        pytest.param("runs/lr=0.1/policy.toml", id="and holds ="),
        pytest.param("policy", id="one word"),
    ],
)
def test_a_string_that_is_a_path(source):
    with pytest.raises(PolicyError, match=r"does not exist"):
        from_toml(source)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([], id="list"),
        pytest.param({1: 2}, id="a key that is a number"),
        pytest.param({"default": {1: 2}}, id="a setting that is a number"),
        pytest.param({"default": None}, id="None"),
        pytest.param({"rule": "a"}, id="text"),
        pytest.param({"rule": [Rule({"w_bits": 4}, match="a")]}, id="a Rule is no table"),
    ],
)
def test_dicts_that_no_toml_file_could_hold(data):
    with pytest.raises(PolicyError, match=r"^dict"):
        from_dict(data)


def test_a_dict_may_say_none():
    policy = from_dict({"default": {"a_bits": None}, "first": None, "last": {"w_bits": None}})
    assert (policy.default.a_bits, policy.first, policy.last) == (None, None, {"w_bits": None})


BITS = st.none() | st.integers(1, 8)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
VALUES = {
    "w_bits": BITS,
    "a_bits": BITS,
    "attention": BITS,
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    "delta": POSITIVE | st.just(0.0),
    "alpha": st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
    **dict.fromkeys(("w_gamma", "w_sigma", "a_gamma", "a_sigma"), POSITIVE),
}
CHANGES = st.fixed_dictionaries({}, optional=VALUES)
NAMES = st.text().filter(lambda text: not text.startswith("re:")) | st.just("re:layer[34]\\..*")
SOME = CHANGES.filter(bool)
RULES = st.builds(Rule, SOME, match=NAMES, optional=st.booleans()) | st.builds(Rule, SOME, type=st.text())
POLICIES = st.builds(
    Policy,
    default=CHANGES.map(lambda changes: Settings(**changes)),
    rules=st.lists(RULES, max_size=3).map(tuple),
    first=st.none() | CHANGES,
    last=st.none() | CHANGES,
    exclude=st.lists(NAMES, max_size=3).map(tuple),
    include=st.lists(NAMES, max_size=3).map(tuple),
    name=st.just("policy text"),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
@given(POLICIES)
def test_there_and_back(policy):
    assert from_toml(to_toml(policy)) == policy
    assert from_dict(json.loads(json.dumps(to_dict(policy))), name=policy.name) == policy


def test_the_values_above_are_all_settings():
    assert sorted(VALUES) == sorted(field.name for field in dataclasses.fields(Settings))


def test_what_is_written_reads_well():
    policy = from_toml(EXAMPLE)
    assert to_toml(policy).startswith('exclude = ["head", "aux.*"]\n\n[default]\nw_bits = 4\na_bits = 32\n')
    middle = '\nattention = false\nshare_inputs = false\ndeploy = "float"\n\n[first]\nw_bits = 8\n\n[last]\nw_bits'
    assert middle in to_toml(policy)
    assert to_toml(policy).endswith('[[rule]]\ntype = "Linear"\noptional = true\nrounding = "ste"\n')
