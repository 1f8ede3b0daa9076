"""The baselines EWGS and DSQ against the formulas of their papers, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

import daqconvert as dq
from daqconvert.functional.dasr import clip_round
from daqconvert.functional.grid import Rounding
from helpers.cases import GEOMETRIES
from helpers.literal_quantizers import CLOSE, SETTINGS, literal_input, literal_weight

each_width = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


def values(low, high):
    """Values in level units, from below the clip to above it, none on a level or half way between two."""
    x = torch.rand(4000, dtype=torch.float64) * (high - low + 4) + low - 2
    return x[((2 * x - torch.round(2 * x)).abs() > 1e-6)]


class Ewgs(torch.autograd.Function):
    """Equation 5 of the paper, on the scale where levels span [0, 1]."""

    @staticmethod
    def forward(ctx, x, n, delta):
        q = torch.round(x * n) / n
        ctx.save_for_backward(x - q)
        ctx.delta = delta
        return q

    @staticmethod
    def backward(ctx, grad):
        (difference,) = ctx.saved_tensors
        return grad * (1 + ctx.delta * torch.sign(grad) * difference), None, None


def soft(x, alpha):
    """DSQ's differentiable rounding within each interval; its value is not the rounded one."""
    k = 2 * math.atanh(1 - alpha)
    t = x - torch.floor(x).detach()
    return torch.tanh(k * (t - 0.5)) / (2 * math.tanh(k / 2)) + 0.5


@each_width
@pytest.mark.parametrize("delta", [0.0, 0.001, 0.7])
@pytest.mark.parametrize("shift", [0, 3], ids=["weights", "signed inputs"])
def test_ewgs(bits, delta, shift):
    n = 2**bits - 1
    low, high = -min(shift, n), n - min(shift, n)
    x = values(low, high).requires_grad_()
    grad = torch.randn_like(x)
    y = clip_round(x, float(low), float(high), *[getattr(Rounding.ewgs(delta, n), f) for f in ("kind", "c", "a")])
    y.backward(grad)
    other = x.detach().clone().requires_grad_()
    expected = Ewgs.apply((other.clamp(low, high) - low) / n, n, delta) * n + low
    expected.backward(grad)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(x.grad, other.grad, **CLOSE)
    assert delta == 0.0 or not torch.equal(x.grad, grad)


@each_width
@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.5, 0.99])
def test_dsq(bits, alpha):
    n = 2**bits - 1
    x = values(0, n).requires_grad_()
    grad, rounding = torch.randn_like(x), Rounding.dsq(alpha)
    y = clip_round(x, 0.0, float(n), rounding.kind, rounding.c, rounding.a)
    y.backward(grad)
    other = x.detach().clone().requires_grad_()
    soft(other.clamp(0, n), alpha).backward(grad)
    torch.testing.assert_close(x.grad, other.grad, **CLOSE)
    assert torch.equal(y, torch.round(x.clamp(0, n)))
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1] + 5e-6
    mean = clip_round(leaf := t.requires_grad_(), 0.0, 1.0, rounding.kind, rounding.c, rounding.a).sum()
    assert torch.autograd.grad(mean, leaf)[0].mean().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("alpha", [1e-300, 1e-12, 1 - 1e-16])
def test_dsq_at_its_limits_is_finite(alpha):
    rounding = Rounding.dsq(alpha)
    x = torch.tensor([0.1, 0.4999, 0.5, 0.9], requires_grad=True)
    clip_round(x, 0.0, 1.0, rounding.kind, rounding.c, rounding.a).sum().backward()
    assert x.grad.isfinite().all() and (x.grad >= 0).all()


def literal_ewgs(x, low, high):
    n = high - low
    return Ewgs.apply((x.clamp(low, high) - low) / n, n, 0.6) * n + low


def literal_dsq(x, low, high):
    smooth = soft(x.clamp(low, high), 0.2)
    return torch.round(x.detach().clamp(low, high)) + smooth - smooth.detach()


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize(("kind", "literal"), [("ewgs", literal_ewgs), ("dsq", literal_dsq)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_whole_layers(settings, kind, literal, signed):
    cls, args, kwargs, shape = GEOMETRIES["conv2d"]
    x = torch.randn(5, *shape, dtype=torch.float64)
    x = x if signed else x.abs()
    both = {"a_bits": 3, "rounding": kind, "delta": 0.6} | settings
    layer = dq.quantize(cls(*args, **kwargs, dtype=torch.float64), first=both, last=both)
    dq.calibrate(layer, [x], method="percentile")
    with torch.no_grad():  # so that both ends clip, and no grid is symmetric by chance
        for key, parameter in layer.named_parameters():
            if key not in ("weight", "bias"):
                parameter.mul_(0.6 + 0.2 * torch.rand_like(parameter))
    parameters = {key: p.detach().clone().requires_grad_(p.requires_grad) for key, p in layer.named_parameters()}
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    w_q, x_q = literal_weight(layer, parameters, literal), literal_input(layer, inputs[0], parameters, literal)
    scale = parameters["output_scale"]
    expected = layer.accumulate(x_q, w_q) * (scale.reshape(-1, 1, 1) if scale.dim() else scale)
    if layer.bias is not None:
        expected = expected + parameters["bias"].reshape(-1, 1, 1)
    out = layer(inputs[1])
    grad = torch.randn_like(out)
    expected.backward(grad)
    out.backward(grad)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)
    if not signed:
        parameters["input_quantizer.lower"].grad = torch.zeros(1, dtype=torch.float64)
    for key, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, parameters[key].grad, **close)
