"""Which site a product counts for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from daqconvert.macs import Places, count_macs
from daqconvert.macs.attribution import owner_of
from helpers import awkward_models as awkward
from helpers.counted import events_of


class Standardized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x):
        w = self.conv.weight
        return F.conv2d(x, (w - w.mean()) / w.std())


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        pytest.param(Standardized(), (1, 2, 4, 4), {"conv": 3 * 4 * 18}, id="computed"),
        pytest.param(awkward.parametrized(), (1, 4), None, id="parametrized"),
        pytest.param(awkward.old_weight_norm(), (1, 4), None, id="weight norm"),
        pytest.param(awkward.pruned(), (1, 4), None, id="pruned"),
        pytest.param(awkward.Projection(), (1, 4), None, id="used by another module"),
        pytest.param(awkward.Tied(), (1, 4), {"a": 16, "b": 16, "c": 8}, id="tied"),
        pytest.param(awkward.CalledTwice(), (1, 4), {"a": 16, "mid": 32, "b": 8}, id="called twice"),
        pytest.param(awkward.TwoNames(), (1, 4), {"a": 16, "b": 16}, id="two names"),
        pytest.param(awkward.BareParameters(), (1, 3, 9, 9), None, id="bare parameters"),
    ],
)
def test_each_product_finds_its_site(model, shape, expected):
    sites = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    sites |= {name for name, _ in model.named_parameters() if name in ("kernel", "raw")}
    macs = count_macs(model, Places(sites), (torch.randn(shape),), {}, required=True)
    assert macs is not None and all(macs.values())
    assert sum(macs.values()) == sum(e.macs for e in events_of(model.eval(), torch.randn(shape)))
    assert expected is None or macs == expected


def test_weights_that_depend_on_the_data_count_for_the_module_that_convolves():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 3 * 2 * 9))

        def forward(self, x):
            routing = x.mean((2, 3)).softmax(-1)
            return F.conv2d(x, (routing @ self.experts)[0].view(3, 2, 3, 3))

    model, x = nn.Sequential(nn.ReLU(), Dynamic()), torch.randn(1, 2, 4, 4)
    events = events_of(model, x)
    assert [(e.op, e.tensors, e.module, e.macs) for e in events] == [
        ("mm", ("1.experts",), "1", 2 * 54),
        ("convolution", (), "1", 3 * 4 * 18),
    ]
    places = Places((), modules={"1": "kernel"}, tensors={"1.experts": "mix"})
    assert count_macs(model, places, (x,), {}) == {"kernel": 216, "mix": 108}


def test_products_of_activations_go_to_their_sites_in_turns():
    class Attention(nn.Module):
        def forward(self, q, v):
            return (q @ q.transpose(1, 2)).softmax(-1) @ v

    model = nn.ModuleDict({"inner": Attention()})
    model.forward = lambda q, v: model["inner"](q, model["inner"](q, v))
    args = (torch.randn(1, 3, 4), torch.randn(1, 3, 5))
    found = count_macs(model, Places((), products={"inner": ("scores", "sums")}), args, {}, required=True)
    assert found == {"scores": 2 * 36, "sums": 2 * 45}
    assert count_macs(model, Places((), products={"inner": ("all",)}), args, {}, required=True) == {"all": 162}
    assert count_macs(model, Places((), products={"inner": ("a", "b", "c")}), args, {}, required=True) == {}


def test_owner_of_a_parameter():
    names = ("weight", "a.b.weight", "parametrizations.weight.0.u", "a.parametrizations.w.x")
    assert [owner_of(name) for name in names] == ["", "a.b", "", "a"]
