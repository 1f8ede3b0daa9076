"""`dasr` against values and gradients recorded from the authors' code in float32 (`golden/dasr.npz`).

Our values are integers and our float32 gradient is good to 3e-7 of itself (`test_dasr.py`), so what the two differ by
is the rounding of the recorded code. It computes a softmax in float32 and differentiates it by autograd, which costs

* values: up to 3e-7 of `max(1, |y|)` at gamma = 1, where the largest `beta * s` meets the flattest sigmoid, else 2e-7;
* gradients: a few roundings of `1 - m`, of which `m = sigmoid(gamma)` leaves the share `exp(-gamma)`: 2e-6 of the
  gradient up to gamma = 2, 1.3e-5 at gamma = 4;
* one gradient a case: the code subtracts the maximum of the *whole tensor* before the softmax, and autograd sends the
  rounding errors of all elements to the one that is that maximum. They do not scale with its own gradient: up to 2e-5.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from daqconvert.functional.dasr import dasr, slope, slope_coefficients

ROUNDING = 2.0**-24  # of float32


@pytest.fixture(scope="module")
def recorded(root):
    with np.load(root / "tests" / "golden" / "dasr.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


@pytest.fixture(params=range(36), ids="case{}".format)
def case(request, recorded):
    names = ("bits", "sigma", "gamma", "x", "grad_out", "y", "grad_x")
    found = {name: recorded[f"c{request.param}_{name}"] for name in names}
    found.update({name: found[name].item() for name in ("bits", "sigma", "gamma")})
    return found


def rounded(case) -> tuple[Tensor, Tensor]:
    x = case["x"].clone().requires_grad_()
    y = dasr(x, 2 ** case["bits"] - 1, case["gamma"], case["sigma"])
    y.backward(case["grad_out"])
    return y.detach(), x.grad


def largest_score(x: Tensor, sigma: float) -> Tensor:
    """Mask of the element with the tensor's largest `beta * s = gamma / (1 - exp(-(|1 - 2t| + a)))`."""
    t = x.double() - x.double().floor()
    nearness = -((1.0 - 2.0 * t).abs() + 1.0 / sigma**2)
    return nearness == nearness.max()


def test_every_recorded_case_is_tested(recorded):
    assert recorded["n_cases"].item() == 36
    assert {recorded[f"c{k}_bits"].item() for k in range(36)} == {1, 2, 3, 4}


def test_values(case):
    y, _ = rounded(case)
    tolerance = 3e-7 if case["gamma"] == 1.0 else 2e-7
    assert torch.equal(y, case["y"].round())
    assert ((y - case["y"]).abs() / y.clamp(min=1.0)).max().item() <= tolerance


def test_gradients(case):
    _, grad = rounded(case)
    error = (grad.double() - case["grad_x"].double()).abs()
    collector = largest_score(case["x"], case["sigma"])
    tolerance = max(2e-6, 4.0 * math.exp(case["gamma"]) * ROUNDING)
    assert (error / grad.abs())[~collector].max().item() <= tolerance
    assert collector.sum().item() == 1
    assert error[collector].max().item() <= 2e-5


def test_the_element_left_out_is_the_one_that_is_off(recorded):
    """Against float64 the recorded gradient is worst at the tensor's maximum, and typically 8 times worse."""
    factors = []
    for k in range(36):
        x, grad_out, grad = (recorded[f"c{k}_{name}"].double().flatten() for name in ("x", "grad_out", "grad_x"))
        sigma, gamma = recorded[f"c{k}_sigma"].item(), recorded[f"c{k}_gamma"].item()
        exact = grad_out * slope(x, *slope_coefficients(gamma, sigma))
        error = (grad - exact).abs() / exact.abs()
        collector = largest_score(x, sigma)
        factors.append((error[collector] / error[~collector].max()).item())
    assert sum(factor > 1.0 for factor in factors) >= 30
    assert np.median(factors) >= 8.0
