"""Layers that read one tensor: one input quantizer where the policy asks for it."""

import dataclasses

import pytest

from daqconvert.policy.resolve import ONE_BIT_NOTE
from daqconvert.spec import Call, PlanRow, Policy, Rule, Settings, Site, input_groups

SHARED = Settings(4, 4, share_inputs=True)
SITES = (
    Site("q", "Linear", (8, 8), 8, 8, 64, reads="q", nonnegative=True),
    Site("k", "Linear", (8, 8), 8, 8, 64, reads="q", nonnegative=True),
    Site("v", "Linear", (8, 8), 8, 8, 64, reads="q"),
    Site("alone", "Linear", (8, 8), 8, 8, 64, reads="alone", nonnegative=True),
    Site("unknown", "Linear", (8, 8), 8, 8, 64),
    Site("product", "matmul", call=Call("matmul", ("",), "product"), reads="q"),
)


@pytest.mark.parametrize(
    ("policy", "groups"),
    [
        pytest.param(Policy(SHARED), {"k": "q", "v": "q"}, id="asked for"),
        pytest.param(Policy(Settings(4, 4)), {}, id="not asked for"),
        pytest.param(Policy(SHARED, exclude=("q",)), {"v": "k"}, id="the first is left alone"),
        pytest.param(Policy(SHARED, (Rule({"a_bits": 8}, match="q"),)), {"v": "k"}, id="other bits"),
        pytest.param(Policy(SHARED, (Rule({"a_bits": None}, match="k"),)), {"v": "q"}, id="a float input"),
        pytest.param(Policy(SHARED, (Rule({"w_bits": 2}, match="k"),)), {"k": "q", "v": "q"}, id="other weight bits"),
        pytest.param(Policy(SHARED, (Rule({"share_inputs": False}, match="k"),)), {"v": "q"}, id="one does not ask"),
        pytest.param(Policy(SHARED, (Rule({"rounding": "ste"}, match="k"),)), {"v": "q"}, id="another gradient"),
        pytest.param(Policy(SHARED, (Rule({"a_sigma": 2}, match="k"),)), {"v": "q"}, id="another temperature"),
        pytest.param(
            Policy(SHARED.replace(attention=4)), {"k": "q", "v": "q"}, id="a product has its own, even at these bits"
        ),
    ],
)
def test_groups(policy, groups, planned):
    plan = planned(policy, SITES)
    assert plan.input_groups() == groups
    told = {row.name: note for row in plan for note in row.notes if note.startswith("shares")}
    assert told == {name: f"shares the input quantizer of {keeper}" for name, keeper in groups.items()}


def test_a_shared_sign_is_proven_for_all_or_for_none(planned):
    plan = planned(Policy(SHARED), SITES)
    assert [plan[name].signed for name in ("q", "k", "v", "alone", "unknown")] == [None, None, None, False, None]
    plan = planned(Policy(SHARED, exclude=("v",)), SITES)
    assert [plan[name].signed for name in ("q", "k", "alone")] == [False, False, False]
    assert [row.signed for row in planned(Policy(Settings(4, 4)), SITES)][:3] == [False, False, None]


def test_notes_follow_the_shared_sign(planned):
    policy = Policy(Settings(1, 1, share_inputs=True))
    assert ONE_BIT_NOTE in planned(policy, SITES)["q"].notes
    assert ONE_BIT_NOTE not in planned(policy, SITES[:2])["q"].notes


def test_two_roots_share_by_name(planned):
    sites = (Site("", "Linear", reads=""), Site("b", "Linear", reads=""))
    assert planned(Policy(SHARED), sites).input_groups() == {}  # an empty `reads` says that nobody knows


def test_sharing_is_said_after_everything_else(planned):
    noted = tuple(dataclasses.replace(site, notes=("tied",)) for site in SITES[:2])
    assert planned(Policy(SHARED), noted)["k"].notes == ("tied", "shares the input quantizer of q")


def test_a_product_never_shares_whatever_its_row_says():
    rows = [PlanRow(site, SHARED, "by hand") for site in (SITES[0], SITES[-1])]
    assert input_groups(rows) == {}
