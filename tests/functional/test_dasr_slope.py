"""The coefficients of the slope, its mean, and the straight-through variant of `clip_round`."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from daqconvert.functional.dasr import clip_round, mean_slope, slope, slope_coefficients

NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(200))


def integrated(c: float, a: float) -> float:
    """Gauss-Legendre integral of `slope` over [0, 1], each half by itself: there is a kink at 1/2."""
    halves = [(NODES + 1.0) / 4.0, (NODES + 3.0) / 4.0]
    return sum((WEIGHTS * slope(t, c, a)).sum().item() / 4.0 for t in halves)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 4.0, 8.0], ids="sigma={}".format)
@pytest.mark.parametrize("gamma", [0.5, 2.0, 10.0, 50.0], ids="gamma={}".format)
def test_mean_slope_is_the_integral(gamma, sigma):
    c, a = slope_coefficients(gamma, sigma)
    assert mean_slope(c, a) == pytest.approx(integrated(c, a), rel=1e-10)


@pytest.mark.parametrize(("sigma", "mean"), [(1.0, 0.4485), (2.0, 0.9215)], ids=["weights", "activations"])
def test_published_settings_shrink_the_gradient(sigma, mean):
    assert mean_slope(*slope_coefficients(2.0, sigma)) == pytest.approx(mean, abs=5e-5)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 4.0, 8.0], ids="sigma={}".format)
@pytest.mark.parametrize("gamma", [0.5, 2.0, 10.0, 50.0], ids="gamma={}".format)
def test_unit_slope_has_mean_one_and_the_same_shape(gamma, sigma):
    c, a = slope_coefficients(gamma, sigma, unit=True)
    assert integrated(c, a) == pytest.approx(1.0, rel=1e-10)
    assert a == slope_coefficients(gamma, sigma)[1]


@pytest.mark.parametrize("gamma", [1e-9, 0.5, 2.0, 10.0, 50.0, 700.0], ids="gamma={}".format)
def test_height_of_the_slope_keeps_its_digits(gamma):
    with localcontext(prec=700):
        g = Decimal(gamma)
        exact = float(g / (g.exp() - (-g).exp()))
    assert slope_coefficients(gamma, 1.0)[0] == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("sigma", [1e-300, 1e-160, 1e-3, 1e4, 1e9, 1e200], ids="sigma={}".format)
@pytest.mark.parametrize("gamma", [1e-300, 0.5, 50.0, 1e4, 1e300], ids="gamma={}".format)
@pytest.mark.parametrize("unit", [False, True], ids=["paper", "unit"])
def test_nothing_overflows(gamma, sigma, unit):
    c, a = slope_coefficients(gamma, sigma, unit)
    found = slope(torch.tensor([0.0, 0.2, 0.5, 0.7]), c, a)
    assert math.isfinite(c) and math.isfinite(mean_slope(c, a)) and a > 0
    assert torch.isfinite(found).all() and (found >= 0).all()
    assert not unit or (c > 0 and mean_slope(c, a) == pytest.approx(1.0, rel=1e-12))


@pytest.mark.parametrize("rounding", ["daq", "ste"])
def test_gradient_at_the_ends_is_a_choice(rounding):
    for low in (0.0, torch.tensor(0.0)):
        found = []
        for ends in (True, False):
            x = torch.tensor([-0.1, 0.0, 1e-30, 2.9, 3.0, 3.1], requires_grad=True)
            clip_round(x, low, 3.0, rounding, 0.5, 1.0, ends).sum().backward()
            found.append((x.grad > 0).tolist())
        assert found == [[False, True, True, True, True, False], [False, False, True, True, False, False]]


def test_ste_has_the_same_values_and_slope_one_inside():
    low, high = torch.tensor([[-3.0], [0.0]]), torch.tensor([[4.0], [7.0]])
    x = torch.tensor([[-3.1, -3.0, -0.5, 3.9, 4.0, 4.1], [-0.1, 0.0, 0.5, 6.9, 7.0, 7.1]], requires_grad=True)
    grad_out = torch.randn_like(x)
    y = clip_round(x, low, high, "ste", 9.0, 9.0)
    y.backward(grad_out)
    inside = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]] * 2)
    assert y.tolist() == [[-3.0, -3.0, 0.0, 4.0, 4.0, 4.0], [0.0, 0.0, 0.0, 7.0, 7.0, 7.0]]
    assert torch.equal(y, clip_round(x, low, high, "daq", 0.5, 1.0))
    assert torch.equal(x.grad, grad_out * inside)
