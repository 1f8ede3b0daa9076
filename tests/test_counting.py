"""`coverage` counts what ran: quantized operands, float ones, and operands that were changed on the way."""

import copy
import random
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

import daqconvert as dq
from helpers import awkward_models as awkward
from helpers.cases import GEOMETRIES, NETWORKS

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def calibrated(model, x=X, **settings):
    qmodel = dq.quantize(model, **{"w_bits": 4, "a_bits": 4, **settings})
    dq.calibrate(qmodel, [x])
    return qmodel


def both(counted):
    return counted.share, counted.share_weights


def test_a_quantized_network_is_covered_in_every_mode_frozen_too():
    qmodel = calibrated(awkward.Chain())
    frozen = dq.freeze(qmodel)
    assert both(dq.coverage(qmodel.train(), X)) == (1.0, 1.0)
    assert both(dq.coverage(qmodel.eval(), X)) == (1.0, 1.0)
    with torch.no_grad():
        assert both(dq.coverage(qmodel, X)) == (1.0, 1.0)
    with torch.inference_mode():
        assert both(dq.coverage(qmodel, X)) == (1.0, 1.0)
        assert both(dq.coverage(frozen, X)) == (1.0, 1.0)
    counted = dq.coverage(frozen, X)
    assert both(counted) == (1.0, 1.0)
    assert [(row.name, row.macs) for row in counted.sites] == [
        ("0", 2 * 8 * 81 * 27),
        ("3", 2 * 8 * 16 * 72),
        ("7", 2 * 8 * 5),
    ]
    assert counted.macs == sum(row.macs for row in counted.sites) and counted.products == 0
    assert counted.unassigned == counted.skipped == ()


def test_a_float_network_is_not_covered():
    counted = dq.coverage(awkward.Chain(), X)
    assert both(counted) == (0.0, 0.0)
    assert [row.name for row in counted.sites] == ["0", "3", "7"]
    assert counted.unassigned == counted.skipped == ()


def test_what_multiplies_nothing_has_no_share():
    counted = dq.coverage(nn.ReLU(), X)
    assert (counted.macs, counted.share, counted.share_weights, counted.share_products) == (0, 0.0, 0.0, 0.0)


def test_disabled_quantizers_do_not_count():
    qmodel = calibrated(awkward.Chain())
    with dq.disabled(qmodel):
        assert both(dq.coverage(qmodel, X)) == (0.0, 0.0)


@pytest.mark.parametrize("frozen", [False, True], ids=["quantized", "frozen"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"a_bits": None, "first": (4, None), "last": (4, None)}, (0.0, 1.0), id="weights only"),
        pytest.param({"w_bits": None, "first": (None, 4), "last": (None, 4)}, (0.0, 0.0), id="inputs only"),
    ],
)
def test_one_operand_alone_is_half_the_matter(settings, expected, frozen):
    qmodel = calibrated(awkward.Chain(), **settings)
    counted = dq.coverage(dq.freeze(qmodel) if frozen else qmodel, X)
    assert both(counted) == expected
    sides = {(row.weight_quantized, row.input_quantized) for row in counted.sites}
    assert sides == {(expected[1] == 1.0, expected[1] == 0.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", GEOMETRIES)
def test_every_layer_is_covered(key, dtype):
    """Padding of every mode moves operands; float16 divides them first."""
    cls, args, kwargs, shape = GEOMETRIES[key]
    x = torch.randn(2, *shape)
    qmodel = calibrated(cls(*args, **kwargs), x)
    frozen = dq.freeze(qmodel)
    for model in (qmodel, frozen):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert both(dq.coverage(model, x)) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["lite0", "vit"])
def test_real_networks(name):
    make, size = NETWORKS[name]
    x, model = torch.randn(1, 3, size, size), make()
    qmodel = calibrated(model.eval(), x)
    counted = dq.coverage(qmodel, x)
    assert both(counted) == (1.0, 1.0) and counted.unassigned == ()
    assert counted.macs == dq.coverage(model, x).macs
    assert {row.name for row in counted.sites} == {row.name for row in dq.plan(qmodel) if not row.site.is_product}
    assert (counted.products > 0) == (name == "vit") and counted.share_products == 0.0


def test_layers_that_stay_float_are_in_the_denominator_with_their_reason():
    qmodel = calibrated(awkward.Chain(), exclude=["3"])
    counted = dq.coverage(qmodel, X)
    assert counted["3"].both == counted["3"].weight == counted["3"].input == 0
    assert counted.share == counted.share_weights == 1 - counted["3"].macs / counted.macs
    assert [(row.name, row.reason) for row in counted.skipped] == [("3", counted["3"].reason)]
    assert "exclude" in dq.plan(qmodel)["3"].rule


@pytest.mark.parametrize("frozen", [False, True], ids=["quantized", "frozen"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda x, w: (x, w * 2), (0.0, 0.0), id="weight scaled"),
        pytest.param(lambda x, w: (x, w.mul_(2)), (0.0, 0.0), id="weight scaled in place"),
        pytest.param(lambda x, w: (x, w - w.mean()), (0.0, 0.0), id="weight centred"),
        pytest.param(lambda x, w: (F.dropout(x, 0.5), w), (0.0, 1.0), id="dropout"),
        pytest.param(lambda x, w: (x.clone().relu_(), w), (0.0, 1.0), id="relu in place on a copy"),
        pytest.param(lambda x, w: (torch.cat([x[:1], torch.rand(1, 4)]), w), (0.0, 1.0), id="cat with floats"),
        pytest.param(lambda x, w: (x / torch.tensor(3.0), w), (0.0, 1.0), id="divided by a tensor"),
        pytest.param(lambda x, w: (x.div(3, rounding_mode="floor"), w), (0.0, 1.0), id="divided and rounded"),
        pytest.param(lambda x, w: (F.pad(x[:, 1:], (0, 1), value=0.5), w), (0.0, 1.0), id="padded with a value"),
        pytest.param(lambda x, w: (x.new_ones(2, 4).copy_(x), w), (0.0, 1.0), id="copied over floats"),
        pytest.param(lambda x, w: (x / 15, w), (1.0, 1.0), id="divided by a number"),
        pytest.param(lambda x, w: (F.pad(x[:, 1:], (0, 1)), w), (1.0, 1.0), id="padded with zeros"),
        pytest.param(lambda x, w: (torch.cat(x.chunk(2)[::-1]), w.t().contiguous().t()), (1.0, 1.0), id="moved"),
        pytest.param(lambda x, w: (x.new_zeros(2, 4).copy_(x), w), (1.0, 1.0), id="copied over zeros"),
        pytest.param(lambda x, w: (x[[1, 0]].double(), w.double()), (1.0, 1.0), id="picked and cast"),
    ],
)
def test_an_operand_counts_only_as_the_quantizer_returned_it(change, expected, frozen):
    x = torch.randn(2, 4)
    qmodel = calibrated(nn.Linear(4, 3), x)
    model = dq.freeze(qmodel) if frozen else qmodel
    model.accumulate = MethodType(lambda self, x, w: F.linear(*change(x, w)).float(), model)
    with torch.no_grad():
        assert both(dq.coverage(model, x)) == expected


class Extra(nn.Module):
    """A linear layer, and products outside of layers: with a bare parameter, with a buffer, of two activations."""

    def __init__(self):
        super().__init__()
        self.fc, self.bare = nn.Linear(4, 4), nn.Parameter(torch.randn(5, 4))
        self.register_buffer("filter", torch.ones(1, 1, 3))
        self.register_buffer("basis", torch.eye(5))

    def forward(self, x):
        y = F.linear(self.fc(x), self.bare)
        y = F.conv1d(y[:, None], self.filter, padding=1)[:, 0] @ self.basis
        return y @ y.t()


def test_products_of_no_layer_are_listed():
    qmodel = calibrated(Extra(), torch.randn(2, 4), exclude=["bare"])
    counted = dq.coverage(qmodel, torch.randn(2, 4))
    macs = {row.name: row.macs for row in (*counted.sites, *counted.unassigned)}
    assert macs == {"fc": 32, "bare": 40, "filter": 30}
    assert counted.share == counted.share_weights == 32 / 102
    assert (counted.products, [row.module for row in counted.attention]) == (20, [""])


def test_layers_that_came_after_the_plan_have_a_row():
    qmodel = calibrated(awkward.Chain())
    qmodel.append(nn.Linear(5, 3))
    with pytest.warns(UserWarning, match="plan: Chain was changed after quantize: 8, a float Linear, was put in"):
        counted = dq.coverage(qmodel, X)
    assert (counted["8"].macs, counted["8"].reason) == (30, "put in after quantize: it stays in float")
    assert not counted.unassigned
    assert counted.share == 1 - 30 / counted.macs


def test_a_recurrent_layer_counts_as_what_its_kernel_computes():
    model = awkward.Recurrent()
    x = torch.randn(2, 3, 4)
    counted = dq.coverage(calibrated(model, x), x)
    expected = sum(w.numel() for w in model.rnn.parameters() if w.dim() == 2) * 6
    assert counted["rnn"].macs == expected and "recurrent" in counted["rnn"].reason
    assert counted.share == (counted.macs - expected) / counted.macs


PACKED = ("1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj")


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "unfused"])
def test_the_fused_encoder_kernel_counts_for_each_of_its_weights(grad):
    x = torch.randn(2, 3, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    qmodel = calibrated(model, x, exclude=["1.*"]).eval()
    with torch.set_grad_enabled(grad):
        counted = dq.coverage(qmodel, x)
    macs = {row.name: row.macs for row in (*counted.sites, *counted.unassigned)}
    packed = {name: macs.pop(name) for name in [*macs] if name in ("1.self_attn", *PACKED)}
    assert sum(packed.values()) == 6 * 192 and len(set(packed.values())) == 1
    assert macs == {
        "0": 6 * 64, "1.self_attn.out_proj": 6 * 64, "1.linear1": 6 * 128,
        "1.linear2": 6 * 128, "2": 6 * 16,
    }  # fmt: skip
    assert counted.share == counted.share_weights == 6 * (64 + 16) / counted.macs
    assert counted.products == 2 * (2 * 9 * 8)
    fused = any(row.op == "_transformer_encoder_layer_fwd" for row in counted.sites)
    assert fused is not grad  # the kernel must run while counting too


@pytest.mark.parametrize("settings", [{}, {"w_bits": None}, {"a_bits": None}], ids=["both", "inputs", "weights"])
def test_the_projections_of_an_attention_block_are_sites_of_one_weight(settings):
    x = torch.randn(2, 3, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    qmodel = calibrated(model, x, **settings, exclude=["1.self_attn.k_proj"])
    for counted in (dq.coverage(qmodel, x), dq.coverage(dq.freeze(qmodel), x)):
        assert [counted[name].macs for name in PACKED] == [6 * 64] * 3 and counted.unassigned == ()
        quantized = [counted[name].both for name in PACKED]
        if not settings:
            assert quantized == [6 * 64, 0, 6 * 64] and counted.share == 1 - 6 * 64 / counted.macs
        assert sum(quantized) == (0 if settings else 2 * 6 * 64)


def test_a_layer_called_twice_and_quantized_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.fc(x), self.fc.bias.repeat(4, 1)) if self.once else self.fc(self.fc(x))

    model, x = Twice(), torch.randn(2, 4)
    model.once = False
    qmodel = calibrated(model, x, first=(4, 4), last=(4, 4))
    assert dq.coverage(qmodel, x)["fc"].macs == 64
    enabled, calls = qmodel.fc, []
    enabled.register_forward_pre_hook(lambda m, a: calls.append(setattr(m, "enabled", len(calls) % 2 == 0)))
    counted = dq.coverage(qmodel, x)
    assert (counted["fc"].both, counted.share) == (32, 0.5)
    assert not counted["fc"].weight_quantized
    assert "50%" in str(counted)


def test_what_the_model_raises_reaches_the_caller():
    with pytest.raises(dq.DaqError, match="bounds of its input quantizer were never set"):
        dq.coverage(dq.quantize(awkward.Chain()), X)


def test_keyword_inputs_and_objects_that_hold_tensors():
    class Batch:
        def __init__(self, x):
            self.x = x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, pair, batch):
            return (pair["a"][0] @ batch.x.t()) @ self.fc(batch.x)

    x = torch.randn(2, 4)
    counted = dq.coverage(Model(), {"a": [x]}, batch=Batch(torch.randn(2, 4)))
    assert (counted.macs, counted.products) == (32, 32)


def test_a_cast_weight_that_autocast_kept_is_not_lost():
    qmodel, x = calibrated(awkward.Chain(), exclude=["7"]), X
    with torch.autocast("cpu", torch.bfloat16):
        qmodel(x)
        assert [row.name for row in dq.coverage(qmodel, x).sites] == ["0", "3", "7"]


class Gram(nn.Module):
    def forward(self, x):
        return x @ x.t()


def test_it_prints_as_a_table():
    x = torch.randn(2, 4)
    qmodel = calibrated(nn.Sequential(nn.Linear(4, 4), Gram(), nn.Linear(2, 6)), x, exclude=["2"])
    qmodel.append(nn.Linear(6, 1))
    with pytest.warns(UserWarning, match="3, a float Linear, was put in"):
        counted, planned = dq.coverage(qmodel, x), dq.plan(qmodel)
    assert str(counted).splitlines() == [
        "site      op     MACs     weight      input  remarks",
        "0         mm       32  quantized  quantized",
        "2         addmm    24      float      float  " + planned["2"].reason,
        "3         addmm    12      float      float  put in after quantize: it stays in float",
        "1         mm       16      float      float  product of activations",
        "1.matmul            -          -          -  " + planned["1.matmul"].reason,
        "Sequential: 47.1% of 68 MACs have both operands quantized, 47.1% the weight; "
        "0.0% of 16 MACs of attention products",
    ]


def test_an_unknown_site_is_told():
    with pytest.raises(KeyError, match="'8' is no site that ran. Ran: 0, 3, 7"):
        dq.coverage(awkward.Chain(), X)["8"]


# ------------------------------------------------------------------------------------------ what a count leaves behind


class Leaky(nn.Module):
    """A module that changes all kinds of state in a forward: statistics, attributes, counts, random numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls, self.last, self.seen = self.calls + 1, x, self.seen + x.sum()
        return F.dropout(self.bn(self.conv(x))) * random.random()


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_nothing_is_left_behind(fails):
    qmodel = calibrated(Leaky()).train()
    frozen = dq.freeze(qmodel)
    frozen.fails = qmodel.fails = fails
    if fails:
        for model in (qmodel, frozen):
            model.register_forward_hook(lambda *_: 1 / 0)
    for model in (qmodel, frozen):
        before = copy.deepcopy(model.state_dict())
        attributes = [dict(vars(m)) for m in model.modules()]
        buffers = [dict(m._buffers) for m in model.modules()]
        versions = [b._version for b in model.conv.buffers()]
        generators = torch.get_rng_state(), random.getstate()
        hooks = [dict(h) for h in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)]
        try:
            dq.coverage(model, X)
        except ZeroDivisionError:
            assert fails
        else:
            assert not fails
        assert versions == [b._version for b in model.conv.buffers()]
        for module, own, held in zip(model.modules(), attributes, buffers, strict=True):
            assert vars(module).keys() == own.keys() and all(vars(module)[key] is own[key] for key in own)
            assert all(module._buffers[key] is held[key] for key in held)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
        assert hooks == [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.parametrize("wrap", ["whole", "part", "in place"])
def test_a_compiled_model_is_counted_as_it_was_written(wrap):
    qmodel = calibrated(awkward.Chain())
    expected = dq.coverage(qmodel, X)
    if wrap == "whole":
        model = torch.compile(qmodel, backend="aot_eager")
    else:
        model = qmodel
        if wrap == "part":
            qmodel[3] = torch.compile(qmodel[3], backend="aot_eager")
        else:
            qmodel.compile(backend="aot_eager")
    with torch.no_grad():
        model(X)  # compiled by now
        assert dq.coverage(model, X) == expected
