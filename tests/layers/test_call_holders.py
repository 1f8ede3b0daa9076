"""Calls whose weight belongs to several places: one holder for all of them, and helper functions that get a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.layers.site import Watcher, watching
from daqconvert.models import quantized_sites

ROWS = torch.logspace(-2, 1, 32)
"""Sizes of the rows of a weight: a scale per row, used for its columns, is wrong by far."""


def rows(*shape):
    return nn.Parameter(torch.randn(shape) * ROWS[: shape[0]].reshape(-1, *(1,) * (len(shape) - 1)))


def decibels(model, x, **settings):
    """Return the signal-to-noise ratio of a model at 8 bits, quantized and frozen, and the rows of its plan."""
    expected = model.eval()(x)
    qmodel = dq.quantize(model, w_bits=8, a_bits=8, **settings)
    dq.calibrate(qmodel, [x])
    qmodel.eval()
    with torch.no_grad():
        found = [10 * torch.log10(expected.var() / (y - expected).var()) for y in (qmodel(x), dq.freeze(qmodel)(x))]
    return min(found).item(), {row.name: row for row in dq.plan(qmodel).rows}


class Holding(nn.Module):
    def __init__(self, times=1.0):
        super().__init__()
        self.w, self.times = rows(32, 32), times

    def forward(self, x):
        return F.linear(x, self.w if self.times == 1.0 else self.w * self.times)


class Both(nn.Module):
    """Multiplies by a child's parameter along its other axis."""

    def __init__(self, times=1.0):
        super().__init__()
        self.inner, self.head = Holding(times), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.inner(x) + x @ self.inner.w)


class Tied(nn.Module):
    """A decoder that has the weight of its encoder, which it calls (`call`) or computes itself."""

    def __init__(self, call):
        super().__init__()
        self.call, self.conv = call, nn.Conv1d(32, 32, 3, bias=False)
        self.conv.weight = rows(32, 32, 3)

    def forward(self, x):
        h = self.conv(x) if self.call else F.conv1d(x, self.conv.weight)
        return F.conv_transpose1d(x, self.conv.weight)[..., 2:-2] + h


def test_products_along_two_axes_share_one_scale():
    torch.manual_seed(0)
    found, plan = decibels(Both(), torch.randn(64, 32))
    assert found > 25 and plan["inner.w"].settings.granularity == "tensor"
    assert plan["inner.w"].site.one_scale == "one scale: matmul and linear have their channels along different axes"


@pytest.mark.parametrize("call", [True, False])
def test_a_transposed_convolution_by_the_weight_of_a_convolution(call):
    torch.manual_seed(0)
    found, plan = decibels(Tied(call), torch.randn(16, 32, 12))
    assert found > 25 and plan["conv"].settings.granularity == "tensor"


def test_different_weights_from_one_parameter_stay_in_float():
    torch.manual_seed(0)
    found, plan = decibels(Both(times=3.0), torch.randn(64, 32))
    assert found > 35
    assert plan["inner.w"].site.reason == (
        "the model and inner compute different weights from it, which cannot share one set of quantizers"
    )


class Projecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.fc(x).relu())

    def project(self, x):
        return F.linear(x, self.fc.weight)


def test_a_layer_that_another_method_multiplies_by_is_converted():
    model, x = Projecting().eval(), torch.randn(64, 32)
    found, plan = decibels(model, x)
    assert found > 30 and plan["fc"].converted
    qmodel = dq.quantize(model, w_bits=8, a_bits=8)
    dq.calibrate(qmodel, [x])
    error = (qmodel.eval().project(x) - model.project(x)).var() / model.project(x).var()
    assert 0 < error < 1e-3


def helper(x, w, how, b=None):
    if x.shape[0] < 1:  # stops the trace
        raise ValueError
    return {
        "linear": lambda: F.linear(x, w, b),
        "conv2d": lambda: F.conv2d(x, w, b),
        "x @ w": lambda: x @ w,
        "x @ w.T": lambda: x @ w.T,
        "x @ w.transpose": lambda: x @ w.transpose(0, 1),
        "w @ x": lambda: (w @ x.t()).t(),
        "w.t() @ x": lambda: (w.t() @ x.t()).t(),
        "w.mm": lambda: w.mm(x.t()).t(),
    }[how]()


class Helped(nn.Module):
    def __init__(self, how, layer=False, kernel=()):
        super().__init__()
        self.how, self.layer, self.head = how, layer, nn.Linear(32, 4)
        self.b = nn.Parameter(torch.randn(32))
        if layer:
            self.fc = nn.Linear(32, 32, bias=False)
            self.fc.weight = rows(32, 32)
        else:
            self.w = nn.Parameter(torch.randn(32, 32, *kernel))

    def forward(self, x):
        y = helper(x, self.fc.weight if self.layer else self.w, self.how, self.b)
        return self.head(y.flatten(2).mean(2) if self.how == "conv2d" else y)


@pytest.mark.parametrize("how", ["linear", "x @ w", "x @ w.T", "x @ w.transpose", "w @ x", "w.t() @ x", "w.mm"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_helper_may_turn_the_weight_it_gets(how):
    torch.manual_seed(0)
    model, x = Helped(how), torch.randn(64, 32)
    found, plan = decibels(model, x)
    assert found > 30 and plan["w"].converted
    with torch.no_grad():
        model.head = nn.Identity()
        qmodel = dq.quantize(model, w_bits=2, a_bits=8)
        dq.calibrate(qmodel, [x])
        assert (qmodel(x) - model(x)).abs().max() > 0.1  # not in float


def test_the_bias_of_a_convolution_in_a_helper_is_the_channels():
    torch.manual_seed(0)
    found, _ = decibels(Helped("conv2d", kernel=(3, 3)), torch.randn(16, 32, 6, 6))
    assert found > 30


@pytest.mark.parametrize("how", ["x @ w", "x @ w.T", "w @ x", "w.t() @ x", "w.mm"])
def test_a_helper_that_multiplies_by_a_layer_along_another_axis(how):
    torch.manual_seed(0)
    model, x = Helped(how, layer=True), torch.randn(64, 32)
    with pytest.raises(dq.ConversionError, match=r'^fc: .*"granularity": "tensor"'):
        decibels(model, x)
    assert decibels(model, x, rules=[dq.Rule({"granularity": "tensor"}, match="fc")])[0] > 25


class Doubling(Watcher):
    def before(self, site, x, weight, operation):
        return 2 * x


@pytest.mark.parametrize("how", ["linear", "conv2d", "addmm", "helper"])
def test_what_a_watcher_replaces_keeps_the_bias(how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, *((3, 3) if how == "conv2d" else ())))
            self.b = nn.Parameter(torch.randn(4))

        def forward(self, x):
            if how == "helper":
                return helper(x, self.w, "linear", self.b)
            return torch.addmm(self.b, x, self.w) if how == "addmm" else getattr(F, how)(x, self.w, self.b)

    model, x = Model().eval(), torch.randn(5, 4, *((6, 6) if how == "conv2d" else ()))
    qmodel = dq.quantize(model, w_bits=8, a_bits=8).eval()
    (site,) = quantized_sites(qmodel).values()
    with dq.disabled(qmodel), watching(site, Doubling()):
        torch.testing.assert_close(qmodel(x), model(2 * x))
