"""`calibrate`: bounds from data in one pass, four methods, signs decided once, output scales from the first batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.calibration import is_calibrated
from daqconvert.calibration.observers import METHODS
from helpers import awkward_models as awkward

# ------------------------------------------------------------------------------------------------- the verb


def chain(**settings):
    return dq.quantize(awkward.Chain().eval(), **{"w_bits": 4, "a_bits": 4} | settings)


def snapshot(model):
    """Return everything that a refused call must not change."""
    modules = list(model.modules())
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(getattr(m, "sign", None), getattr(m, "ready", None), m.training) for m in modules],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        [p.requires_grad for p in model.parameters()],
    )


def unchanged(model, before):
    (state, *rest), (now, *rest_now) = before, snapshot(model)
    return rest == rest_now and all(torch.equal(value, state[key]) for key, value in now.items())


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_over_a_generator(method):
    qmodel, read = chain(), []

    def batches():
        for i in range(4):
            read.append(i)
            yield torch.randn(2, 3, 9, 9), torch.zeros(2)

    report = dq.calibrate(qmodel, batches(), method=method)

    assert read == [0, 1, 2, 3] and report.batches == 4 and report.method == method
    assert [row.name for row in report.inputs] == ["0", "3", "7"] and report.unseen == ()
    assert [(row.signed, row.proven) for row in report.inputs] == [(True, False), (False, True), (False, True)]
    assert is_calibrated(qmodel)
    for row in report.inputs:
        quantizer = qmodel.get_submodule(row.name).input_quantizer
        assert quantizer.lower.item() == pytest.approx(row.lower) and quantizer.upper.item() == pytest.approx(
            row.upper
        )
        assert row.name in str(report) and f"{row.upper:.4g}" in str(report)


def test_no_more_than_max_batches_are_read():
    read = []

    def batches():
        while True:
            read.append(0)
            yield torch.randn(2, 3, 9, 9)

    assert dq.calibrate(chain(), batches(), max_batches=3).batches == 3 and len(read) == 3


ROWS = torch.randn(2, 4)
BATCHES = {
    "tensor": ROWS,
    "tuple": (ROWS, 0),
    "list": [ROWS],
    "dict": {"x": ROWS},
    "labels": {"x": ROWS, "labels": torch.zeros(2)},
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=list(BATCHES))
def test_every_kind_of_batch(batch):
    dq.calibrate(dq.quantize(awkward.Optional()), [batch])


def test_inputs_are_observed_in_the_float_model_and_the_rest_stays():
    model = awkward.Chain().train()
    qmodel = dq.quantize(model, w_bits=1, a_bits=4, first=(1, 4), last=(1, 4))
    images = torch.randn(8, 3, 9, 9)
    seen = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        copy.deepcopy(model).eval()(images)
    report = dq.calibrate(qmodel, [images], method="minmax")
    assert report.inputs[1].upper == pytest.approx(float(seen[0].max()))
    assert all(module.training for module in qmodel.modules())
    for key, value in model.state_dict().items():  # weights and the statistics of batch norm
        assert torch.equal(qmodel.state_dict()[key], value)
    assert all(p.grad is None for p in qmodel.parameters())


def test_the_sign_is_decided_once():
    qmodel = dq.quantize(nn.Linear(4, 2))
    assert qmodel.input_quantizer.sign is None and dq.plan(qmodel)[""].signed is None
    first = dq.calibrate(qmodel, [torch.rand(5, 4)])
    assert not first.inputs[0].signed and dq.plan(qmodel)[""].signed is False
    assert "unsigned (from data)" in str(first)
    second = dq.calibrate(qmodel, [torch.randn(5, 4)])
    assert not second.inputs[0].signed and not second.inputs[0].proven
    assert "negative values are clipped" in str(second)


def test_an_undecided_sign_is_shown_once_decided():
    qmodel = chain()
    assert "(calibrate decides)" in str(dq.plan(qmodel))
    dq.calibrate(qmodel, [torch.randn(2, 3, 9, 9)])
    assert dq.plan(qmodel)["0"].signed is True and "(calibrate decides)" not in str(dq.plan(qmodel))


def test_calibrating_again_with_the_same_data_changes_nothing():
    qmodel, images = chain(w_bits=2), torch.randn(4, 3, 9, 9)
    dq.calibrate(qmodel, [images])
    before = snapshot(qmodel)
    dq.calibrate(qmodel, [images])
    assert unchanged(qmodel, before)


def test_output_scales_start_as_in_the_paper():
    settings = {"w_bits": 2, "normalize": True, "granularity": "channel", "first": (2, 4), "last": (2, 4)}
    qmodel, images = chain(**settings), torch.randn(16, 3, 9, 9)
    dq.calibrate(qmodel, [images, torch.randn(16, 3, 9, 9) * 9])
    qmodel.eval()
    for name, x in (("0", images), ("3", nn.Sequential(*list(qmodel)[:3])(images))):
        layer = qmodel.get_submodule(name)
        exact = F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
        quantized = layer(x) - (0 if layer.bias is None else layer.bias[:, None, None])
        ratio = exact.abs().mean((0, 2, 3)) / quantized.abs().mean((0, 2, 3))
        torch.testing.assert_close(ratio, torch.ones(8), rtol=1e-4, atol=0.0)
        assert not torch.equal(layer.output_scale, torch.ones(8))


def test_output_scales_are_one_where_the_grid_carries_units():
    qmodel = chain()
    qmodel[3].output_scale.data.fill_(7.0)
    dq.calibrate(qmodel, [torch.randn(2, 3, 9, 9)])
    assert torch.equal(qmodel[3].output_scale, torch.ones(8))


def test_a_layer_called_twice_gets_one_scale_from_both_calls():
    model = awkward.CalledTwice().eval()
    qmodel = dq.quantize(model, w_bits=2, a_bits=8, first=None, last=None, granularity="tensor")
    x = torch.randn(64, 4)
    dq.calibrate(qmodel, [x])
    layer = qmodel.mid
    one = torch.relu(model.a(x))
    two = layer(one)
    exact = sum(F.linear(v, layer.weight).abs().mean() for v in (one, two))
    quantized = sum((layer(v) - layer.bias).abs().mean() for v in (one, two))
    assert (exact / quantized).item() == pytest.approx(1.0, rel=0.1)


def test_a_channel_that_is_dead_on_the_first_batch_is_not_lost():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False))
    for kind in ("channel", "tensor"):
        qmodel = dq.quantize(
            model, first={"w_bits": 2, "a_bits": 8, "granularity": kind}, last={"w_bits": 2, "a_bits": 8}
        )
        dead = torch.rand(8, 4, 6, 6)
        dead[:, 1] = 0.0
        dq.calibrate(qmodel, [dead, torch.rand(8, 4, 6, 6)])
        x = torch.rand(8, 4, 6, 6)
        relative = (qmodel(x) - model(x)).square().mean((0, 2, 3)) / model(x).square().mean((0, 2, 3))
        assert relative[1] < 1.0, kind
        qmodel(x).square().sum().backward()
        assert (qmodel[0].output_scale.grad != 0).all()


class Routed(nn.Module):
    """A model with an auxiliary head that only training calls, as Inception's; its input has both signs."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.aux = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


@pytest.mark.parametrize("w_bits", [2, 8])
def test_a_layer_that_no_batch_reaches(w_bits):
    qmodel = dq.quantize(Routed(), w_bits=w_bits, a_bits=8, first=(w_bits, 8), last=(w_bits, 8))
    report = dq.calibrate(qmodel, [torch.randn(4, 4)])
    assert report.unseen == ("aux",) and "aux: not reached by any batch" in str(report)
    assert qmodel.aux.input_quantizer.sign is None
    out = qmodel.train()(torch.randn(4, 4))[1]
    assert out.isfinite().all() and out.std() > 0  # not everything below zero was clipped
    frozen = dq.freeze(qmodel)
    assert torch.equal(frozen(torch.ones(1, 4)), qmodel.eval()(torch.ones(1, 4)))
    before = qmodel.aux.input_quantizer.upper.clone()
    qmodel.aux.input_quantizer.upper.data.mul_(2)
    dq.calibrate(qmodel, [torch.randn(4, 4)])
    assert qmodel.aux.input_quantizer.upper == 2 * before  # what was trained since is kept
