"""Every site of every awkward model is found and gets its answer; looking at a model leaves nothing behind in it."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from daqconvert.errors import ConversionError
from daqconvert.graph import find_sites
from helpers import awkward_models as awkward
from helpers.cases import BY_ID, CASES, NETWORKS, timm_network

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def sites_of(model, example=None):
    return {site.name: site for site in find_sites(model, example).sites}


@each_case
def test_all_sites_are_found_and_each_gets_its_answer(case):
    sites = sites_of(case.make(), case.batch())

    assert {name for name, site in sites.items() if not site.reason and not site.is_product} == set(case.converted)
    assert {name for name, site in sites.items() if site.is_product} == set(case.products)
    assert {name for name, site in sites.items() if site.reason} == set(case.skipped)
    for name, reason in case.skipped.items():
        assert reason in sites[name].reason, name
    for name, note in case.notes.items():
        assert any(note in text for text in sites[name].notes), (name, sites[name].notes)


@each_case
def test_first_last_and_signs(case):
    found = find_sites(case.make(), case.batch())

    assert found.order == case.order
    assert {site.name for site in found.sites if site.first} == set(case.first)
    assert {site.name for site in found.sites if site.last} == set(case.last)
    assert {site.name for site in found.sites if site.nonnegative} == set(case.unsigned)


@each_case
def test_the_model_is_as_it_was(case):
    model = case.make().train()
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())

    find_sites(model, case.batch())

    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys(), name
        assert all(vars(module)[key] is value for key, value in attributes[name].items() if key[:1] != "_"), name
        assert module.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_hooks_of_the_user_do_not_fire_while_the_model_is_looked_at():
    model, seen = nn.Sequential(awkward.Chain()), []
    for module in model.modules():
        module.register_forward_hook(lambda *args: seen.append(args))
        module.register_forward_pre_hook(lambda *args: seen.append(args))

    find_sites(model, torch.zeros(1, 3, 9, 9))

    assert seen == []
    model.eval()(torch.zeros(1, 3, 9, 9))
    assert len(seen) == 2 * len(list(model.modules()))


def test_a_cache_that_holds_a_graph_is_no_obstacle():
    model = awkward.Caching()
    model(torch.ones(1, 4)).sum().backward()  # `hidden` and `seen` now hold tensors that deepcopy refuses

    assert set(sites_of(model)) == {"a", "b"}
    assert model.hidden.grad_fn is not None


def test_what_cannot_be_copied_is_said():
    model = awkward.Chain()
    model.generator = (i for i in range(3))
    with pytest.raises(ConversionError, match=r"Chain cannot be copied .*generator"):
        find_sites(model)


def test_calls_in_a_forward_that_fx_cannot_follow_are_seen_in_its_parts_alone():
    model = nn.Sequential(nn.Linear(4, 4), awkward.BranchOnData())
    assert not sites_of(model)["1.inner.qkv"].reason  # the branch is in `1`, the call in `1.inner`


def test_a_read_of_dtype_or_shape_is_no_use_of_the_weight():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.to(self.fc.weight.dtype).reshape(-1, self.fc.weight.shape[1]))

    assert not sites_of(Asks())["fc"].reason


def test_an_output_that_is_a_weight_does_not_keep_the_layer_from_its_site():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x), self.fc.weight.norm()

    assert not sites_of(Returns())["fc"].reason


def test_a_tied_weight_in_a_call_is_the_first_of_its_owners():
    class TiedRead(awkward.Tied):
        def forward(self, x):
            return self.c(torch.relu(F.linear(self.a(x), self.b.weight)))

    sites = sites_of(TiedRead())
    assert not any(site.reason for site in sites.values()) and sites.keys() == {"a", "b", "c"}
    assert sites["a"].call.modules == ("",)  # fx names a shared parameter by the first of its names
    assert sites["b"].notes == ("shares its weight with a", "not called in evaluation")


def test_matrix_products_with_a_bare_parameter_are_found():
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.proj = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 3))
            self.shift = nn.Parameter(torch.randn(2, 4))

        def forward(self, x):
            return (self.fc(x) + self.shift) @ self.proj

    sites = sites_of(Clip())
    assert sites["proj"].kind == "matmul" and not sites["proj"].reason
    assert "shift" not in sites and sites["proj"].last and not sites["fc"].last


def test_timm_beit_is_seen_through():
    sites = sites_of(timm_network("beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2))
    calls = {name: site.call.modules for name, site in sites.items() if site.call and not site.is_product}
    assert calls == {f"blocks.{i}.attn.qkv": (f"blocks.{i}.attn",) for i in range(2)}
    assert not any(site.reason for site in sites.values())


def test_a_forward_that_was_replaced_on_the_object_leaves_its_layers_alone():
    model = nn.Sequential(nn.Linear(4, 4), awkward.Projection(), nn.Linear(4, 2))
    model[0].forward, model[1].forward = lambda x: x * 2, lambda x: x @ model[1].qkv.weight
    sites = sites_of(model)
    assert {name for name, site in sites.items() if not site.reason} == {"1.proj", "2"}
    assert all("replaced on the object itself" in sites[name].reason for name in ("0", "1.qkv"))


def test_lazy_layers_are_left_alone():
    assert "lazy" in sites_of(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)))["1"].reason


def test_no_sites_at_all():
    found = find_sites(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), torch.zeros(1, 3, 4, 4))
    assert found.sites == () and found.other_params == 13


@each_case
def test_every_parameter_is_counted_once(case):
    model = case.make()
    found = find_sites(model)
    # a site says how many parameters it has, so a weight in two sites is counted in both
    shared = model.b.weight.numel() if case.id == "tied" else 0
    total = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert sum(site.params for site in found.sites) + found.other_params == total + shared


@pytest.mark.parametrize("bad", [7, "image", object(), torch.float32], ids=["number", "text", "object", "dtype"])
def test_example_inputs_of_another_kind_are_refused(bad):
    with pytest.raises(ConversionError, match="example_inputs: expected a tensor, a tuple .* or a dict"):
        find_sites(awkward.Chain(), bad)


def test_example_inputs_that_the_model_cannot_take_are_refused():
    with pytest.raises(ConversionError, match="example_inputs: Chain fails on them"):
        find_sites(awkward.Chain(), torch.zeros(1, 4, 9, 9))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_on_the_meta_device(name):
    make, size = NETWORKS[name]
    real = make()
    with torch.device("meta"):
        meta = make()
    example = torch.zeros(1, 3, size, size)
    assert find_sites(meta, example) == find_sites(real, example)


def test_the_answer_is_the_same_with_and_without_inputs():
    case = BY_ID["residual"]
    with_inputs, without = find_sites(case.make(), case.batch()), find_sites(case.make())
    assert without.input_size is None and all(site.macs is None for site in without.sites)
    assert [dataclasses.replace(site, macs=None) for site in with_inputs.sites] == list(without.sites)


def test_two_fused_attentions_in_one_module_are_counted_apart():
    model = timm_network("vit_dwee_patch16_reg1_gap_256", depth=1)
    rows = {site.name: site.macs for site in find_sites(model).sites if site.is_product}
    assert len(rows) == 4 and all(rows.values())
