"""The paper's presets, to the letter."""

import pytest

from daqconvert.errors import PolicyError
from daqconvert.policy.presets import is_paper, preset, preset_names
from daqconvert.spec import Settings

PAPER = {
    "paper-w1a1": (1, 1),
    "paper-w1a2": (1, 2),
    "paper-w2a2": (2, 2),
    "paper-w3a3": (3, 3),
    "paper-w4a4": (4, 4),
    "paper-w1a32": (1, None),
    "paper-w2a32": (2, None),
    "paper-w3a32": (3, None),
}


def test_names():
    assert preset_names() == tuple(PAPER)


@pytest.mark.parametrize(("name", "bits"), PAPER.items(), ids=PAPER)
def test_paper(name, bits, planned):
    policy = preset(name)
    assert (policy.name, policy.first, policy.last, policy.rules, policy.exclude) == (name, None, None, (), ())
    assert policy.default == Settings(
        *bits,
        granularity="tensor",
        grid="midrise",
        normalize=True,
        rounding="daq",
        slope="paper",
        w_gamma=2.0,
        w_sigma=1.0,
        a_gamma=2.0,
        a_sigma=2.0,
    )
    plan = planned(policy)
    assert [row.name for row in plan.converted] == ["layer1.0.conv1", "layer1.0.attn.qkv", "layer2.0.conv1"]
    assert all(row.settings == policy.default for row in plan.converted)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        pytest.param("paper-w1a3", "Nearest: paper-w1a32, paper-w3a3, paper-w1a2.", id="no such bits"),
        pytest.param("xyz", "paper-w3a32.", id="nothing like it"),
        pytest.param(["paper-w1a1"], "paper-w3a32.", id="a list"),
    ],
)
def test_unknown(name, told):
    with pytest.raises(PolicyError) as caught:
        preset(name)
    assert str(caught.value).startswith(f"preset {name!r} does not exist. Presets are: paper-w1a1, paper-w1a2, ")
    assert str(caught.value).endswith(told)


def test_is_paper():
    assert all(is_paper(name) and is_paper(f"{name} + arguments") for name in PAPER)
    assert not is_paper("arguments")
