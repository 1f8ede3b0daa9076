"""Models whose forwards multiply by themselves: the whole way, and what must stay as it was."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.utils._pytree import tree_leaves

import daqconvert as dq
from daqconvert.graph import find_sites
from daqconvert.layers import QuantizedLayer
from daqconvert.layers.computed import plain_class
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.site import QuantizedSite, Watcher, watching
from daqconvert.models import copy_model, in_mode, quantized_sites
from helpers.call_cases import CALLS
from helpers.cases import BY_ID, run
from helpers.made_weights import MADE, Made

REWRITTEN = ("functional", "branch-on-data", "bare-parameters", "subclass", "attention", "encoder")
EVERY = (*CALLS, *(BY_ID[name] for name in REWRITTEN))
each_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.id)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's encoder, in evaluation
ENDS = {"first": (2, 2), "last": (2, 2)}
KEYS = {"weight_quantizer", "input_quantizer", "output_scale"}


def same(a, b):
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def quantized(case, **settings):
    torch.manual_seed(0)
    model = case.make().eval()
    qmodel = dq.quantize(model, **settings)
    dq.calibrate(qmodel, [case.batch()[0]])
    return model, qmodel.eval()


@each_case
def test_what_is_found(case):
    sites = {site.name: site for site in find_sites(case.make(), case.batch()).sites}
    assert {name for name, site in sites.items() if not site.reason and not site.is_product} == set(case.converted)
    assert {name for name, site in sites.items() if site.is_product} == set(case.products)
    assert {name: site.reason for name, site in sites.items() if site.reason}.keys() == case.skipped.keys()
    for name, reason in case.skipped.items():
        assert reason in sites[name].reason, name
    for name, note in case.notes.items():
        assert any(note in text for text in sites[name].notes), (name, sites[name].notes)


@each_case
def test_ends_and_signs(case):
    found = find_sites(case.make(), case.batch())
    assert found.order == case.order
    assert {site.name for site in found.sites if site.first} == set(case.first)
    assert {site.name for site in found.sites if site.last} == set(case.last)
    assert {site.name for site in found.sites if site.nonnegative} == set(case.unsigned)


@each_case
def test_disabled_is_the_original_in_every_mode(case):
    model, qmodel = quantized(case, w_bits=3, a_bits=3)
    assert not same(run(qmodel, case.batch()), run(model, case.batch()))
    with dq.disabled(qmodel):
        for training in (False, True):
            for grad in (False, True):
                with in_mode(model, training), in_mode(qmodel, training), torch.set_grad_enabled(grad):
                    torch.manual_seed(1)
                    expected = run(copy_model(model), case.batch(1))  # training moves buffers
                    torch.manual_seed(1)
                    assert same(run(copy_model(qmodel), case.batch(1)), expected), (training, grad)


@each_case
def test_no_verb_moves_what_the_model_keeps(case):
    model = case.make().train()
    before = copy.deepcopy(model.state_dict())
    qmodel = dq.quantize(model, w_bits=3, a_bits=3)
    dq.calibrate(qmodel, [case.batch()])
    dq.freeze(qmodel)
    assert model.training and qmodel.training
    for state in (model.state_dict(), qmodel.state_dict()):
        assert [key for key, value in before.items() if not torch.equal(state[key], value)] == []


class Seen(Watcher):
    def __init__(self):
        self.names = set()

    def after(self, site, y):
        self.names.add(site.layer_name)


@each_case
def test_the_same_sites_run_in_every_mode(case):
    _, qmodel = quantized(case)
    ran = []
    for training, grad in ((True, True), (False, True), (False, False)):
        seen = Seen()
        with torch.set_grad_enabled(grad), in_mode(qmodel, training):
            stack = [watching(site, seen) for site in quantized_sites(qmodel).values()]
            for context in stack:
                context.__enter__()
            run(qmodel, case.batch())
            for context in stack:
                context.__exit__(None, None, None)
        ran.append(seen.names)
        share = dq.coverage(qmodel, *case.batch()).share
        # what computes a weight from others (power iterations, matrix exponentials) multiplies parameters, in float
        partial = case.skipped or case.id in ("old-spectral-norm", "spectral-norm", "orthogonal")
        assert 0.0 < share < 1.0 if partial else share == 1.0
    assert ran[0] == ran[1] == ran[2] == set(case.converted) - set(NOT_RUN.get(case.id, ()))


NOT_RUN = {"optional-path": ("inner.only_masked", "inner.extra")}


@pytest.mark.parametrize(
    "settings",
    [{}, {"w_bits": 2, "a_bits": 3}, {"preset": "paper-w2a2", **ENDS}, {"w_bits": None}, {"a_bits": None}],
    ids=["default", "w2a3", "paper", "inputs", "weights"],
)
@each_case
def test_frozen_and_saved_are_the_same(case, settings, tmp_path):
    model, qmodel = quantized(case, **settings)
    frozen = dq.freeze(qmodel)
    assert not any(isinstance(module, QuantizedSite) for module in frozen.modules())
    assert {m.layer_name for m in frozen.modules() if isinstance(m, FrozenSite)} == {
        layer.layer_name for layer in quantized_sites(qmodel).values()
    }
    with torch.no_grad():
        expected = run(qmodel, case.batch(1))
        assert same(run(frozen, case.batch(1)), expected)
        assert same(run(copy.deepcopy(frozen), case.batch(1)), expected)
        dq.save(frozen, tmp_path / "artifact")
        assert same(run(dq.load(tmp_path / "artifact", model=model), case.batch(1)), expected)


@each_case
def test_gradients_reach_weights_and_bounds(case):
    model, qmodel = quantized(case, w_bits=4, a_bits=4)
    for parameters in (model, qmodel):
        sum(t.square().sum() for t in tree_leaves(run(parameters, case.batch(1)))).backward()
    gradients = {name: p.grad for name, p in qmodel.named_parameters()}
    assert all(g is None or g.isfinite().all() for g in gradients.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.any() and parameter.dim() > 1:
            assert gradients[name] is not None and gradients[name].any(), name
    for name, site in quantized_sites(qmodel).items():
        if site.layer_name in NOT_RUN.get(case.id, ()):
            continue
        quantizers = [getattr(site, f"{side}_quantizer").named_parameters() for side in ("weight", "input")]
        for key, bound in (item for quantizer in quantizers for item in quantizer):
            assert not bound.requires_grad or bound.grad is not None, (name, key)
        assert site.output_scale.grad.any(), name


def arguments(module):
    """Names, kinds and defaults; annotations may be written in another way."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(module.forward).parameters.values()]


@each_case
def test_keys_classes_signatures_and_hooks(case):
    model, qmodel = quantized(case)
    holders = {id(qmodel.get_submodule(name)) for name in case.modules}
    other = dict(qmodel.named_modules(remove_duplicate=False))
    prefixes = {f"{name}." if name else "" for name, module in other.items() if id(module) in holders}
    result = qmodel.load_state_dict(model.state_dict(), strict=False)
    assert result.unexpected_keys == []
    for key in result.missing_keys:
        assert any(key.startswith(p) and key[len(p) :].split(".")[0] in KEYS for p in prefixes), key
    assert isinstance(qmodel, type(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" in name:
            continue
        assert isinstance(other[name], plain_class(type(module))), name  # torch makes a parametrized class per layer
        if not isinstance(other[name], QuantizedLayer):
            assert arguments(other[name]) == arguments(module), name


@each_case
def test_hooks_of_the_user_fire_on_every_module_that_fired_before(case):
    model, calls = case.make().eval(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
    run(model, case.batch())
    before = set(calls)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [case.batch()[0]])
    calls.clear()
    run(qmodel, case.batch())
    assert before <= set(calls)


@pytest.mark.parametrize("name", MADE)
def test_a_weight_that_layers_make_is_quantized_as_a_whole(name, tmp_path):
    torch.manual_seed(0)
    make, site, makers = MADE[name]
    model, x = make().eval(), torch.randn(5, 4, 16)
    chosen = dq.plan(model)
    assert {row.name for row in chosen if row.reason} == makers
    assert all(f"weight of {site}" in row.reason or f"that of {site}" in row.reason for row in chosen if row.reason)
    assert [row.name for row in chosen.converted] == ["pre", site, "head"]
    qmodel, expected = dq.quantize(model), dq.quantize(model.reference())
    for one in (qmodel, expected):
        dq.calibrate(one, [x])
    assert torch.equal(qmodel.eval()(x), expected.eval()(x))  # as if the weight were a layer's own
    with dq.disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    frozen = dq.freeze(qmodel)
    assert torch.equal(frozen(x), qmodel(x))
    dq.save(frozen, tmp_path / "artifact")
    torch.manual_seed(1)
    assert torch.equal(dq.load(tmp_path / "artifact", make())(x), frozen(x))
    qmodel.train()(x).square().sum().backward()
    unused = {key for key, p in qmodel.named_parameters() if p.requires_grad and p.grad is None}
    assert unused <= {key for key, _ in model.named_parameters()}  # no quantizer is without a gradient


def test_a_maker_that_data_reach_too_stays_in_float():
    class Both(Made):
        def forward(self, x):
            return super().forward(x) + self.net(x[:, 0, :8]).mean()

    torch.manual_seed(0)
    model = Both(lambda m: m.net(m.position).view(4, 4, 3), net=torch.nn.Linear(8, 48)).eval()
    x = torch.randn(5, 4, 16)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x])
    assert [row.name for row in dq.plan(qmodel) if row.reason] == ["net"]
    with torch.no_grad():
        expected, found = model(x), qmodel.eval()(x)
    assert (found - expected).norm() < 0.03 * expected.norm()  # 8 bits


READS = {
    "type_as": lambda w, x: x.type_as(w),
    "to": lambda w, x: x.to(w),
    "to-dtype": lambda w, x: x.to(w.dtype),
    "to-device": lambda w, x: x.to(device=w.device),
    "new_zeros": lambda w, x: x + w.new_zeros(x.shape),
    "new_tensor": lambda w, x: x + w.new_tensor([0.5]),
    "zeros_like": lambda w, x: x + torch.zeros_like(w).sum(),
    "full_like": lambda w, x: x + torch.full_like(w, 0.1).sum(),
    "shape": lambda w, x: x * w.shape[0],
    "size": lambda w, x: x * w.size(1),
    "len": lambda w, x: x * len(w),
    "numel": lambda w, x: x / w.numel(),
    "numel-function": lambda w, x: x / torch.numel(w),
    "is_cuda": lambda w, x: -x if w.is_cuda else x,
    "is_contiguous": lambda w, x: x if w.is_contiguous() else -x,
    "is_complex": lambda w, x: -x if torch.is_complex(w) else x,
    "result_type": lambda w, x: x.to(torch.result_type(x, w)),
    "data-dtype": lambda w, x: x.to(w.data.dtype),
    "detached": lambda w, x: x + w.detach().new_ones(1),
    "transposed": lambda w, x: x * w.mT.shape[-1],
    "grad": lambda w, x: x if w.grad is None else -x,
    "element_size": lambda w, x: x * w.element_size(),
    "get_device": lambda w, x: x if w.get_device() < 0 else -x,
    "converted": lambda w, x: x + w.to(x.dtype).new_zeros(1),
}


SIZES = ("shape", "size", "len", "numel", "numel-function", "transposed", "full_like")


class Reads(torch.nn.Module):
    """Reads a layer's weight for something else than its values."""

    def __init__(self, read, traceable, by_parameters):
        super().__init__()
        self.c, self.d = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1)
        self.read, self.traceable, self.by_parameters = read, traceable, by_parameters

    def forward(self, x):
        if not self.traceable:
            x = x * (1 if x.isfinite().all() else 0)
        x = self.read(next(self.parameters()) if self.by_parameters else self.c.weight, x)
        return self.d(self.c(x).relu())


@pytest.mark.parametrize(
    ("traceable", "by_parameters"), [(True, False), (False, False), (True, True)], ids=["traced", "untraced", "first"]
)
@pytest.mark.parametrize("name", READS)
def test_a_weight_may_be_asked_for_all_but_its_values(name, traceable, by_parameters):
    torch.manual_seed(0)
    model, x = Reads(READS[name], traceable, by_parameters).eval(), torch.randn(4, 3, 8, 8)
    plain = dq.plan(Reads(lambda w, x: x, traceable, by_parameters))
    chosen = dq.plan(model)
    assert [(row.name, row.reason) for row in chosen] == [("c", ""), ("d", "")]
    if chosen.order == plain.order:  # torch.fx does not follow `if w.is_cuda`
        assert not plain.diff(chosen)
        assert all(row.site.output == other.site.output for row, other in zip(chosen, plain, strict=True))
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x])
    with torch.no_grad():
        expected, found = model(x), qmodel.eval()(x)
        assert (found - expected).norm() < 0.03 * expected.norm()  # 8 bits
        if not (by_parameters and name in SIZES):
            assert torch.equal(dq.freeze(qmodel)(x), found)  # the first parameter of the frozen model is a bias


@pytest.mark.parametrize(
    "read",
    [
        lambda w, x: x + w.sum(),
        lambda w, x: x + w.detach().mean(),
        lambda w, x: x + w.data.abs().max(),
        lambda w, x: x * w.to(x.dtype).norm(),
        lambda w, x: x + w.clone().view(-1)[0],
        lambda w, x: w.to(x).flatten()[:3].view(1, 3, 1, 1) + x,
    ],
)
def test_values_of_a_weight_are_still_refused(read):
    qmodel = dq.quantize(Reads(read, False, False))
    with pytest.raises(dq.ConversionError, match="c: another module's forward uses its weight"):
        dq.calibrate(qmodel, [torch.randn(1, 3, 8, 8)])
