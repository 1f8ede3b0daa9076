"""`docs/policies.md` says what the code does."""

import dataclasses
import re

import pytest
import typer.main

from daqconvert.cli import app
from daqconvert.errors import PolicyError
from daqconvert.policy import from_toml
from daqconvert.policy.presets import preset, preset_names
from daqconvert.policy.resolve import SUM_NOTE
from daqconvert.spec import SETTING_NAMES, Call, Policy, Settings, Site
from daqconvert.spec.auto import resolve_auto
from daqconvert.spec.targets import TARGETS


@pytest.fixture(scope="module")
def page(root) -> str:
    return (root / "docs" / "policies.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def policies(page) -> list[Policy]:
    """Every TOML block of the page, which must parse."""
    return [from_toml(block) for block in re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]


def test_the_first_file(policies, planned):
    names = ("conv1", "layer4.0.conv1", "layer4.0.fc", "aux.0", "fc", "head")
    sites = tuple(Site(name, "Linear" if "fc" in name else "Conv2d", first=name == "conv1") for name in names)
    rows = planned(policies[0], sites).rows
    assert [row.settings and (row.settings.w_bits, row.settings.a_bits) for row in rows] == [
        (8, 8),
        (3, 3),
        (2, 8),
        None,
        (4, 8),
        (8, None),
    ]
    assert [row.rule for row in rows] == [
        "first",
        'bits: "layer4.0.conv1"',
        'rule 1: "layer4.*"',
        'exclude: "aux.*"',
        'rule 2: type "Linear"',
        'bits: "head"',
    ]


def test_the_table_of_targets_is_the_one_in_the_code(page):
    words = {
        name: (
            "0 in int8" if target.symmetric else "any",
            ("those of all layers" if target.outputs == "all" else 'as for `deploy = "integer"`')
            + (" and operators" if target.operators else ""),
            "one term stays in float" if target.sums == "shortcut" else "both terms and the sum are codes",
            "one grid" if target.one_scale_concat else "each on its own grid",
        )
        for name, target in TARGETS.items()
    }
    rows = re.findall(r"^\| `(\w+)` \| (any|0 in int8) \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert {name: tuple(cells) for name, *cells in rows} == words


def test_settings_merge_as_the_page_says(policies, planned):
    sites = (Site("layer4.0.conv1", "Conv2d"), Site("layer4.0.conv2", "Conv2d"))
    rows = planned(policies[1], sites).rows
    assert [(row.settings.w_bits, row.settings.a_bits) for row in rows] == [(2, 3), (4, 3)]


def test_a_first_layer_as_the_page_says(policies, planned):
    rows = planned(policies[2], (Site("conv1", "Conv2d", first=True), Site("fc", "Linear", last=True))).rows
    assert (rows[0].settings.w_bits, rows[0].settings.a_bits) == (8, None)
    assert rows[1].reason == "last layer (last = None)"


def test_the_preset_as_a_file(policies):
    assert dataclasses.replace(policies[4], name="paper-w1a2") == preset("paper-w1a2")
    assert len(policies) == 5


def test_attention_as_the_page_says(policies, planned):
    product = Call("matmul", ("attn",), "attn.qk")
    names = ("blocks.0.qk", "blocks.1.qk", "blocks.1.q", "blocks.1.k")
    sites = [Site(n, "matmul" if "qk" in n else "Linear", call=product if "qk" in n else None) for n in names]
    sites[3] = dataclasses.replace(sites[3], reads="blocks.1.q")
    plan = planned(policies[3], tuple(sites))
    assert [row.converted for row in plan] == [False, True, True, True]
    assert plan.input_groups() == {"blocks.1.k": "blocks.1.q"}


def test_the_python_examples(page, capsys):
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
    told = capsys.readouterr().out
    assert "Sequential: 3 of 3 sites" in told
    assert "2 of 3 layers changed; bops " in told


def test_the_commands(page):
    options = set(re.findall(r" (--[a-z-]+)", re.search(r"```console\n(.*?)```", page, re.DOTALL)[1]))
    known = {o for p in typer.main.get_command(app).commands["plan"].params for o in p.opts}
    assert options <= known and {"--bits", "--include", "--attention", "--share-inputs", "--toml", "--diff"} <= options


def test_names_and_defaults(page):
    assert all(f"`{name}`" in page for name in (*preset_names(), *SETTING_NAMES))
    assert SUM_NOTE.startswith("sums may pass 2**24")
    default, seen, shown = Settings(), [], {None: "false", False: "false"}  # as a file says it
    for names, values in re.findall(r"^\| (`\w+`(?:, `\w+`)?) \|[^|]*\| ([^|]+) \|[^|]*\|$", page, re.MULTILINE):
        for name, value in zip(names.split(", "), values.split(", "), strict=True):
            seen.append(name.strip("`"))
            assert value.strip('"`') == shown.get(getattr(default, seen[-1]), str(getattr(default, seen[-1]))), name
    assert sorted(seen) == sorted(SETTING_NAMES)


def test_the_table_of_auto(page):
    low = int(re.search(r"^\| 1, (\d) \| true", page, re.MULTILINE)[1])
    for bits in range(1, 9):
        settled = resolve_auto(Settings(w_bits=bits))
        expected = (True, "midrise", "tensor") if bits <= low else (False, "integer", "channel")
        assert (settled.normalize, settled.grid, settled.granularity) == expected


def test_the_messages(page, planned):
    sites = (Site("layer4.0.conv1", "Conv2d"), Site("head", "Linear"))
    told = re.search(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1].splitlines()
    rule = '[[rule]]\nmatch = "layer4.*"\nw_bits = 4\n'
    texts = (
        2 * rule + rule.replace("4.*", "5.*"),
        'exclude = ["heads"]',
        "[default]\nw_bit = 4",
        rule.replace("= 4", "= 9"),
    )
    for text, message in zip(texts, told, strict=True):
        with pytest.raises(PolicyError) as caught:
            planned(from_toml(text), sites)
        start, _, end = message.removeprefix("policy.toml").partition(" ... ")
        found = str(caught.value).removeprefix("policy text")
        assert found.startswith(start)
        assert end.rstrip(".") in found
