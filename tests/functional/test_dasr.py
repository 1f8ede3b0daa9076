"""The closed form of `dasr.py` against the literal equations, and its rules: ties, edges, dtypes, compile, refusals.

"Ties apart" means: `t = x - floor(x)` is at least 1e-9 of a level away from 1/2. In float64 `t`, `1 - t` and `1 - 2t`
are then exact enough for both sides to agree which level is nearer. "Relative" means relative to `max(1, |y|)` for a
value (a level is the unit; level 0 has no relative error) and to the gradient itself, element by element.
"""

from __future__ import annotations

import math
import re
import shutil
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daqconvert.errors import DaqError
from daqconvert.functional.dasr import clip_round, dasr, round_half_even, slope, slope_coefficients
from daqconvert.functional.reference import dasr_reference, gaussian_kernel, softmax_of_two

EXACT = 1e-12
TIE_GAP = 1e-9
GAMMAS = [0.5, 1.0, 2.0, 4.0, 7.3, 9.87, 10.0]
SIGMAS = [0.5, 0.8, 1.0, 2.0, 4.0]


def points(n: int, count: int = 400) -> Tensor:
    """Points of [0, n] with ties apart: random ones, every level, both sides of every tie down to `TIE_GAP`."""
    levels = torch.arange(n, dtype=torch.float64)
    gaps = torch.logspace(math.log10(TIE_GAP) + 0.1, -1, 9, dtype=torch.float64)
    near = (levels[:, None] + 0.5 + torch.cat([gaps, -gaps])).flatten()
    x = torch.cat([torch.rand(count, dtype=torch.float64) * n, levels, torch.tensor([float(n)]), near])
    return x[(x - x.floor() - 0.5).abs() >= TIE_GAP]


def value_and_gradient(function, x: Tensor, grad_out: Tensor, *args) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf, *args)
    y.backward(grad_out)
    return y.detach(), leaf.grad


def largest_errors(x: Tensor, n: int, gamma: float, sigma: float) -> tuple[float, float]:
    grad_out = torch.randn_like(x)
    y, grad = value_and_gradient(dasr, x, grad_out, n, gamma, sigma)
    y_ref, grad_ref = value_and_gradient(dasr_reference, x, grad_out, n, gamma, sigma)
    value_error = (y - y_ref).abs() / y_ref.abs().clamp(min=1.0)
    return value_error.max().item(), ((grad - grad_ref).abs() / grad_ref.abs()).max().item()


# ---------------------------------------------------------------------------- closed form = literal equations


@pytest.mark.parametrize("sigma", SIGMAS, ids="sigma={}".format)
@pytest.mark.parametrize("gamma", GAMMAS, ids="gamma={}".format)
def test_closed_form_equals_the_literal_equations(gamma, sigma):
    for n in (1, 3, 15, 255):
        value_error, gradient_error = largest_errors(points(n), n, gamma, sigma)
        assert value_error <= EXACT
        assert gradient_error <= EXACT


@settings(max_examples=60, deadline=None)
@given(
    gamma=st.floats(0.5, 10.0),
    sigma=st.floats(0.5, 4.0),
    n=st.sampled_from([1, 7, 255]),
    t=st.floats(0.0, 0.5 - TIE_GAP),
    upper_half=st.booleans(),
)
def test_closed_form_equals_the_literal_equations_anywhere(gamma, sigma, n, t, upper_half):
    x = torch.tensor([1.0 - t if upper_half else t, n - 1 + t], dtype=torch.float64)
    value_error, gradient_error = largest_errors(x, n, gamma, sigma)
    assert value_error <= EXACT
    assert gradient_error <= EXACT


def decimal_soft_rounding(t: Decimal, beta: Decimal, nearest: int, gamma: Decimal, sigma: Decimal) -> Decimal:
    s0 = (-t).exp() * (-Decimal(nearest) / sigma**2).exp()
    s1 = (-(1 - t)).exp() * (-Decimal(1 - nearest) / sigma**2).exp()
    e = 1 / (gamma.exp() - 1)
    m0, m1 = (beta * s0).exp(), (beta * s1).exp()
    return (m0 * (0 - e) + m1 * (1 + e)) / (m0 + m1)


def decimal_beta(t: Decimal, nearest: int, gamma: Decimal, sigma: Decimal) -> Decimal:
    s0 = (-t).exp() * (-Decimal(nearest) / sigma**2).exp()
    s1 = (-(1 - t)).exp() * (-Decimal(1 - nearest) / sigma**2).exp()
    return gamma / abs(s0 - s1)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0], ids="sigma={}".format)
@pytest.mark.parametrize("gamma", [0.5, 2.0, 10.0], ids="gamma={}".format)
def test_closed_form_equals_sixty_digits_without_autograd(gamma, sigma):
    ts = [0.0, 0.001, 0.3, 0.49, 0.4999999, 0.5000001, 0.625, 0.999]
    x = torch.tensor(ts, dtype=torch.float64)
    y, grad = value_and_gradient(dasr, x, torch.ones_like(x), 1, gamma, sigma)
    with localcontext(prec=60):
        g, s, h = Decimal(gamma), Decimal(sigma), Decimal("1e-20")
        for i, t in enumerate(map(Decimal, ts)):
            nearest = int(t > Decimal("0.5"))
            beta = decimal_beta(t, nearest, g, s)  # held constant, as the paper does
            at = [decimal_soft_rounding(t + step, beta, nearest, g, s) for step in (-h, Decimal(0), h)]
            assert float(at[1]) == pytest.approx(y[i].item(), abs=1e-50)
            assert float((at[2] - at[0]) / (2 * h)) == pytest.approx(grad[i].item(), rel=1e-14)


def test_softmax_of_the_reference_is_the_softmax():
    z = torch.randn(1000, 2, dtype=torch.float64) * 5
    assert torch.allclose(softmax_of_two(z), torch.softmax(z, dim=-1), rtol=1e-14, atol=0)


def test_reference_sends_a_tie_down_as_the_authors_code_does():
    ties = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
    assert torch.allclose(dasr_reference(ties, 3), torch.tensor([0.0, 1.0, 2.0]).double(), rtol=0, atol=EXACT)
    assert gaussian_kernel(torch.tensor([[0.5, 0.5]]), 1.0)[0].tolist() == pytest.approx([1.0, math.exp(-1.0)])


def test_package_does_not_import_the_reference(root):
    imports = re.compile(r"functional(\.| import .*)reference")
    assert [p.name for p in (root / "src").rglob("*.py") if imports.search(p.read_text(encoding="utf-8"))] == []


# -------------------------------------------------------------------------------------------- ties and edges


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ties_go_to_the_even_level(dtype):
    ties = torch.arange(0, 15, dtype=dtype) + 0.5
    even = [0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14]
    assert dasr(ties, 15).tolist() == even
    assert round_half_even(ties).tolist() == even == np.rint(ties.double().numpy()).tolist()
    assert round_half_even(-ties).tolist() == [-k for k in even]


def test_ties_below_zero_go_to_the_even_level():
    ties = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5])
    assert clip_round(ties, -7.0, 7.0, "daq", 1.0, 1.0).tolist() == [-4.0, -2.0, -2.0, 0.0, 0.0, 2.0]


def test_slope_at_a_tie_is_the_largest_and_on_a_level_the_smallest():
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    c, a = slope_coefficients(2.0, 1.0)
    found = slope(x, c, a)
    assert found.argmax() == 50
    assert found[50].item() == pytest.approx(c / math.tanh(a / 2), rel=EXACT)
    assert found[0].item() == found[100].item() == found.min().item()
    assert found[0].item() == pytest.approx(c / math.tanh((1 + a) / 2), rel=EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 15, 255], ids="n={}".format)
def test_gradient_passes_at_both_ends_and_is_zero_outside(n, dtype):
    ends = torch.tensor([0.0, float(n)], dtype=dtype)
    outside = torch.nextafter(ends, torch.tensor([-1.0, n + 1.0], dtype=dtype))
    far = torch.tensor([-1e30, 1e30, -math.inf, math.inf], dtype=dtype)
    x = torch.cat([ends, outside, far])
    y, grad = value_and_gradient(dasr, x, torch.ones_like(x), n)
    c, a = slope_coefficients(2.0, 1.0)
    on_level = c / math.tanh((1 + a) / 2)
    assert y.tolist() == [0.0, n] * 4
    assert grad[:2].tolist() == pytest.approx([on_level, on_level], rel=1e-6)
    assert grad[2:].tolist() == [0.0] * 6


def test_nan_stays_visible_and_gives_no_gradient():
    y, grad = value_and_gradient(dasr, torch.tensor([math.nan, 1.2]), torch.ones(2), 3)
    assert y.isnan().tolist() == [True, False]
    assert grad[0].item() == 0.0 and grad[1].item() > 0.0


# ---------------------------------------------------------------------------------- dtypes, shapes, compile


SHAPES = [(), (0,), (1,), (7,), (2, 0, 3), (3, 5), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_shape_and_dtype_with_arithmetic_in_float32(dtype, shape):
    x, grad_out = (torch.rand(shape) * 9 - 1).to(dtype), torch.randn(shape).to(dtype)
    y, grad = value_and_gradient(dasr, x, grad_out, 7, 2.0, 2.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    levels = x.to(wide)
    expected = grad_out.to(wide) * slope(levels, *slope_coefficients(2.0, 2.0))
    expected = torch.where((levels >= 0) & (levels <= 7), expected, 0.0).to(dtype)
    assert (y.dtype, y.shape, grad.dtype, grad.shape) == (dtype, x.shape, dtype, x.shape)
    assert torch.equal(y, torch.round(levels.clamp(0, 7)).to(dtype))
    assert torch.equal(grad, expected)


def test_strided_input_gives_what_contiguous_input_gives():
    x = torch.rand(2, 3, 4, 5) * 7
    grad_out = torch.randn_like(x)
    expected = value_and_gradient(dasr, x, grad_out, 7)
    for found in (
        value_and_gradient(dasr, x.to(memory_format=torch.channels_last), grad_out, 7),
        [v.transpose(0, 3) for v in value_and_gradient(dasr, x.transpose(0, 3), grad_out.transpose(0, 3), 7)],
    ):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0], ids="sigma={}".format)
@pytest.mark.parametrize("gamma", [0.5, 2.0, 10.0], ids="gamma={}".format)
def test_float32_gradient_is_good_to_three_roundings(gamma, sigma):
    x = points(15).float()  # a few may now be ties; the slope is the same on both sides
    _, grad = value_and_gradient(dasr, x, torch.ones_like(x), 15, gamma, sigma)
    exact = slope(x.double(), *slope_coefficients(gamma, sigma))
    assert ((grad - exact).abs() / exact).max().item() <= 3e-7


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_without_a_graph_break_equals_eager(backend):
    def block(x: Tensor, low: Tensor) -> Tensor:
        hard = clip_round(x, low, low + 6.0, "ste", 1.0, 1.0)
        return dasr(x * 2.0, 7, 2.0, 1.0) + clip_round(x, -3.0, 3.0, "daq", 0.6, 1.0) + 3.0 * hard

    x, low = torch.rand(4, 33) * 9 - 2, torch.tensor(-3.0)
    x[0, :6] = torch.tensor([0.0, 0.25, 0.5, 1.5, 3.0, 3.5])
    grad_out = torch.randn_like(x)
    y, grad = value_and_gradient(block, x, grad_out, low)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    y_compiled, grad_compiled = value_and_gradient(compiled, x, grad_out, low)
    assert torch.equal(y_compiled, y)
    # inductor adds the three gradients of x in another order; the values above are integers and cannot differ
    assert torch.allclose(grad_compiled, grad, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("rounding", ["daq", "ste"])
def test_second_derivative_is_refused(rounding):
    x = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    y = clip_round(x, 0.0, 3.0, rounding, 0.5, 1.0)
    (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    assert grad.abs().sum() > 0
    with pytest.raises(DaqError, match=r"no second derivative.*create_graph"):
        grad.sum().backward()


IMPOSSIBLE = [(0, 2.0, 1.0), (3, 0.0, 1.0), (3, -1.0, 1.0), (3, 2.0, 0.0)]
NOT_FINITE = [(3, math.nan, 1.0), (3, math.inf, 1.0), (3, 2.0, math.inf)]


@pytest.mark.parametrize("arguments", IMPOSSIBLE + NOT_FINITE, ids=str)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(DaqError, match="must be positive and finite; found n="):
        dasr(torch.zeros(2), *arguments)


def test_integer_tensor_is_refused_with_the_remedy():
    with pytest.raises(DaqError, match=re.escape("found torch.int64. Call x.float() first.")):
        dasr(torch.tensor([1, 2]), 3)
