"""The promises of bit-exactness, one test each: `torch.equal` everywhere, no tolerance in this file."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import daqconvert as dq
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.site import QuantizedSite
from daqconvert.models import quantized_sites
from helpers import awkward_models as awkward
from helpers.cases import CASES, GEOMETRIES, NETWORKS, SETTINGS, run

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))


def same(a, b):
    """Whether two outputs, of whatever structure, are equal in every element and dtype."""
    left, right = tree_leaves(a), tree_leaves(b)
    assert len(left) == len(right)
    return all(
        x.dtype == y.dtype and x.isfinite().all() and torch.equal(x, y) for x, y in zip(left, right, strict=True)
    )


@torch.no_grad()
def shake(qmodel):
    """Change every learned number as training would: bounds by up to a third, some output scales to negative ones."""
    for layer in quantized_sites(qmodel).values():
        for quantizer in filter(None, (layer.weight_quantizer, layer.input_quantizer)):
            for bound in (quantizer.lower, quantizer.upper):
                bound.mul_(1 + 0.3 * (torch.rand_like(bound) - 0.5))
        layer.output_scale.mul_(torch.randn_like(layer.output_scale))
    return qmodel


def calibrated(model, batch, **settings):
    qmodel = dq.quantize(model, **settings)
    dq.calibrate(qmodel, [batch if isinstance(batch, dict) else batch[0]])
    return qmodel


@each_setting
@each_case
def test_quantized_and_frozen_are_identical(case, settings):
    model = case.make().eval()
    qmodel = shake(calibrated(model, case.batch(), **settings)).eval()
    frozen = dq.freeze(qmodel)

    assert run(frozen, case.batch()).shape == run(model, case.batch()).shape
    assert sorted(m.layer_name for m in frozen.modules() if isinstance(m, FrozenSite)) == sorted(case.converted)
    assert not any(isinstance(m, QuantizedSite) for m in frozen.modules())
    for seed in (0, 1):
        with torch.no_grad():
            assert same(run(frozen, case.batch(seed)), run(qmodel, case.batch(seed)))
    assert same(run(copy.deepcopy(frozen), case.batch()), run(frozen, case.batch()))


@each_setting
@each_case
def test_training_and_evaluation_forward_are_identical(case, settings):
    qmodel = shake(calibrated(case.make(), case.batch(), **settings)).eval()
    expected = run(qmodel, case.batch())
    for layer in quantized_sites(qmodel).values():
        layer.train()  # batch norm and dropout stay as they are
    assert same(run(qmodel, case.batch()), expected)


@each_case
def test_disabled_is_the_original(case):
    model = case.make().eval()
    qmodel = calibrated(model, case.batch(), w_bits=3, a_bits=3)
    assert not same(run(qmodel, case.batch()), run(model, case.batch()))
    with dq.disabled(qmodel):
        assert same(run(qmodel, case.batch()), run(model, case.batch()))


@pytest.mark.parametrize("settings", [{}, {"w_bits": 2, "a_bits": 4}], ids=["default", "w2a4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, settings):
    make, size = NETWORKS[name]
    model = make().eval()
    images = torch.randn(2, 3, size, size)
    qmodel = shake(calibrated(model, (images,), **settings))
    with torch.no_grad():
        assert same(dq.freeze(qmodel)(images), qmodel(images))
        with dq.disabled(qmodel):
            assert same(qmodel(images), model(images))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("w_bits", range(1, 9))
def test_all_widths(w_bits, signed, granularity):
    """Frozen is quantized for every weight width and every input width, on each grid that has this width."""
    x = torch.randn(4, 3, 8, 8)
    for a_bits in range(2 if signed else 1, 9):
        for grid in ("midrise", "integer") if w_bits > 1 else ("midrise",):
            for normalize in (True, False) if grid == "midrise" else (False,):
                layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Identity() if signed else nn.ReLU(), nn.Conv2d(4, 5, 3)]
                qmodel = calibrated(
                    nn.Sequential(*layers), (x,), w_bits=w_bits, a_bits=a_bits, grid=grid, normalize=normalize,
                    granularity=granularity, first=None, last=(w_bits, a_bits),
                ).eval()  # fmt: skip
                frozen = dq.freeze(qmodel)
                assert same(frozen(x), qmodel(x)), (a_bits, grid, normalize)
                layer = qmodel[2]
                assert layer.input_quantizer.sign is signed
                codes = layer.weight_quantizer.codes(layer.weight)
                assert torch.equal(codes, frozen[2].weight_codes) and int(codes.max()) < 2**w_bits
                inputs = layer.input_quantizer.codes(qmodel[:2](x))
                assert torch.equal(inputs, frozen[2].input_codes(qmodel[:2](x))) and int(inputs.max()) < 2**a_bits


@pytest.mark.parametrize("rounding", ["daq", "ste"])
def test_exact_ties_go_the_same_way_quantized_and_frozen(rounding):
    """Every value lies exactly half way between two levels, which are 1/4 apart."""
    layer = nn.Linear(1, 32, bias=False)
    halves = (torch.arange(32) - 15.5) / 4
    layer.weight.data = halves[:, None].clone()
    both = {"w_bits": 5, "a_bits": 5, "rounding": rounding, "granularity": "tensor"}
    qlayer = dq.quantize(layer, first=both, last=both).eval()
    qlayer.weight_quantizer.upper.data.fill_(15 / 4)
    qlayer.input_quantizer.set_bounds(-4.0, 15 / 4)
    frozen = dq.freeze(qlayer)
    even = torch.round(halves * 4)
    inputs = even.clamp(-16, 15)
    assert torch.equal(qlayer.input_quantizer(halves), inputs) and torch.equal(frozen.input_operand(halves), inputs)
    assert torch.equal(qlayer.weight_quantizer(layer.weight)[:, 0], even.clamp(-15, 15))
    assert torch.equal(frozen.weight_operand()[:, 0], even.clamp(-15, 15))
    assert same(frozen(halves[:, None]), qlayer(halves[:, None]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"w_bits": 2, "a_bits": 8}, {"preset": "paper-w2a2"}], ids=str)
def test_other_dtypes(dtype, settings):
    model = awkward.Residual().to(dtype).eval()
    x = torch.randn(4, 3, 9, 9, dtype=dtype)
    qmodel = calibrated(model, (x,), **settings)
    assert qmodel(x).dtype == dtype
    assert same(dq.freeze(qmodel)(x), qmodel(x))
    with dq.disabled(qmodel):
        assert same(qmodel(x), model(x))


def operands(layer, x):
    return layer.input_quantizer(x), layer.weight_quantizer(layer.weight)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_sums_do_not_depend_on_batch_layout_or_order(name, bits):
    cls, args, kwargs, shape = GEOMETRIES[name]
    x = torch.randn(64, *shape).abs()
    both = {"first": (bits, bits), "last": (bits, bits)}
    layer = calibrated(cls(*args, **kwargs), (x,), w_bits=bits, a_bits=bits, **both).eval()
    q, w = operands(layer, x)
    sums = layer.accumulate(q, w)

    assert torch.equal(sums, sums.round()) and sums.abs().max() < 2**24
    assert torch.equal(torch.cat([layer.accumulate(one, w) for one in q.split(1)]), sums)
    assert torch.equal(layer.accumulate(q[0], w), sums[0])  # no batch dimension at all
    assert torch.equal(layer.accumulate(q.double(), w.double()), sums.double())
    assert torch.equal(torch.cat([layer(one) for one in x.split(1)]), layer(x))
    if x.dim() == 4:
        assert torch.equal(layer.accumulate(q.to(memory_format=torch.channels_last), w), sums)
        turned = layer(x.to(memory_format=torch.channels_last))
        assert torch.equal(turned, layer(x))
        last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        assert torch.equal(last(x), layer(x)) and torch.equal(operands(last, x)[1], w)
        assert torch.equal(dq.freeze(last)(x), layer(x))


def test_channels_last_network_gives_the_same_codes_in_its_first_layers():
    """Batch norm and adds are float and free to differ in the last bit; from the same codes comes the same output."""
    x = torch.randn(8, 3, 16, 16)
    qmodel = calibrated(awkward.Chain(), (x,), w_bits=4, a_bits=4).eval()
    codes = qmodel[0].input_quantizer.codes(x)
    turned = copy.deepcopy(qmodel).to(memory_format=torch.channels_last)
    assert torch.equal(turned[0].input_quantizer.codes(x.to(memory_format=torch.channels_last)), codes)
    assert torch.equal(turned[0](x.to(memory_format=torch.channels_last)), qmodel[0](x))


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiled_and_eager_give_the_same_operands_and_sums(backend):
    layer = calibrated(nn.Conv2d(4, 6, 3, padding=1), (torch.randn(8, 4, 9, 9),), first=(4, 4), last=(4, 4)).eval()
    x = torch.randn(8, 4, 9, 9)

    def compute(x):
        q, w = layer.input_quantizer(x), layer.weight_quantizer(layer.weight)
        return q, w, layer.accumulate(q, w), layer(x)

    torch._dynamo.reset()
    with torch.no_grad():
        for compiled, eager in zip(torch.compile(compute, backend=backend)(x), compute(x), strict=True):
            assert torch.equal(compiled, eager)


def test_compiled_training_step_gives_the_same_output():
    qmodel = calibrated(awkward.Chain(), (torch.randn(4, 3, 9, 9),), w_bits=2, a_bits=2)
    x = torch.randn(4, 3, 9, 9)
    eager = qmodel(x)
    eager.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in qmodel.named_parameters() if p.grad is not None}
    qmodel.zero_grad()
    torch._dynamo.reset()
    out = torch.compile(qmodel, backend="aot_eager")(x)
    out.square().mean().backward()
    assert torch.equal(out, eager)
    assert expected.keys() == {name for name, p in qmodel.named_parameters() if p.grad is not None}
    for name, p in qmodel.named_parameters():
        assert p.grad is None or torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_is_exactly_zero_in_any_input_quantizer(bits):
    layer = nn.Conv2d(2, 3, 3, padding=1)
    qlayer = calibrated(layer, (torch.randn(2, 2, 5, 5),), first=(4, bits), last=(4, bits)).eval()
    for factor in torch.linspace(0.2, 3.0, 15).tolist():  # whatever the bounds are
        with torch.no_grad():
            qlayer.input_quantizer.lower.fill_(-factor)
        for zero in (0.0, -0.0):
            assert not qlayer.input_quantizer(torch.full((4,), zero)).any()
        out = qlayer(torch.zeros(1, 2, 5, 5))
        assert torch.equal(out, layer.bias.reshape(1, -1, 1, 1).expand_as(out))
        assert same(dq.freeze(qlayer)(torch.zeros(1, 2, 5, 5)), out)


def test_zero_padding_inside_the_layer_is_zero_padding_of_its_operand():
    x = torch.randn(2, 2, 6, 6)
    inside, outside = nn.Conv2d(2, 3, 3, padding=2), nn.Conv2d(2, 3, 3)
    outside.load_state_dict(inside.state_dict())
    a = calibrated(inside, (x,), w_bits=3, first=(3, 3), last=(3, 3)).eval()
    b = dq.quantize(outside, w_bits=3, first=(3, 3), last=(3, 3)).eval()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(F.pad(x, (2, 2, 2, 2))))


def test_masked_positions_do_not_reach_a_sum():
    x = torch.randn(4, 6)
    layer = calibrated(nn.Linear(6, 3), (x,), first=(4, 4), last=(4, 4)).eval()
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    q, w = operands(layer, x * mask)
    assert not q[:, mask == 0].any()
    assert torch.equal(layer.accumulate(q, w), F.linear(q[:, mask == 1], w[:, mask == 1]))


def test_an_all_zero_channel_gives_its_bias():
    x = torch.randn(2, 4, 5, 5)
    layer = nn.Conv2d(4, 3, 3)
    with torch.no_grad():
        layer.weight[1] = 0.0
    for w_bits in range(1, 9):
        for grid in ("midrise", "integer") if w_bits > 1 else ("midrise",):
            for normalize in (True, False) if grid == "midrise" else (False,):
                settings = {"grid": grid, "normalize": normalize, "first": (w_bits, 4), "last": (w_bits, 4)}
                qlayer = calibrated(layer, (x,), granularity="channel", **settings).eval()
                assert torch.equal(qlayer(x)[:, 1], layer.bias[1].expand(2, 3, 3)), settings
                assert same(dq.freeze(qlayer)(x), qlayer(x))


def test_the_remark_on_sums_beyond_float32_is_there_when_it_is_true():
    wide = dq.plan(nn.Linear(4096, 4), first=(8, 8), last=(8, 8), grid="midrise", normalize=False)[""]
    narrow = dq.plan(nn.Linear(128, 4), first=(8, 8), last=(8, 8), grid="midrise", normalize=False)[""]
    assert any("2**24" in note for note in wide.notes) and not any("2**24" in note for note in narrow.notes)
    assert 4096 * 255 * 255 >= 2**24 > 128 * 255 * 255
