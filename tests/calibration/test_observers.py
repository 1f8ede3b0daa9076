"""What an observer records of one input, and the bounds that each method chooses from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.calibration.observers import (
    BINS,
    METHODS,
    InputObserver,
    minimum_error_bounds,
    minmax_bounds,
    observer_for,
    percentile_bounds,
    std_bounds,
)
from daqconvert.functional.grid import Rounding, input_scale, input_zero_point, quantize_input

# ------------------------------------------------------------------------------------------------- what is observed


def observed(*batches):
    observer = InputObserver()
    for batch in batches:
        observer.observe(batch)
    return observer


def test_the_histogram_of_many_batches_is_the_histogram_of_all_data():
    """The values are centers of the finest bins, so merging pairs of bins is all that can change them."""
    fine = torch.randint(0, 2 * BINS, (40, 50)).float() + 0.5
    batches = [
        (row / BINS - 1.0) * 2.0**power for row, power in zip(fine, [-3, -1, 0, 0, 2, -2, 5, 1] * 5, strict=True)
    ]
    observer, data = observed(*batches), torch.cat(batches)
    limit = observer.limit

    assert limit >= data.abs().max() > limit / 2 and math.frexp(limit)[0] == 0.5
    direct = torch.histc(data, bins=BINS, min=-limit, max=limit)
    assert torch.equal(observer.histogram, direct.double())
    assert observer.histogram.sum() == data.numel()
    assert (observer.minimum, observer.maximum) == (float(data.min()), float(data.max()))


def test_large_batches_are_sampled_but_their_range_is_not():
    x = torch.zeros(3_000_000)
    x[12345] = -7.0
    observer = observed(x)
    assert observer.minimum == -7.0 and abs(float(observer.histogram.sum()) - 3e6) < 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_and_shapes_are_observed(dtype):
    observer = observed(
        torch.randn(2, 3, 4, dtype=dtype), torch.empty(0, 3, dtype=dtype), torch.tensor(2.0, dtype=dtype)
    )
    assert observer.histogram.sum() == 25 and observer.maximum >= 2.0


def test_the_moments_are_those_of_the_first_batch():
    first = torch.randn(100)
    assert observed(first, torch.randn(100) * 50).first_std == pytest.approx(float(first.std()))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e4, 1e20])
def test_values_are_counted_in_the_bins_of_histc(scale):
    x = torch.randn(10000) * scale
    x[:3] = torch.tensor([2.0, -2.0, 0.0]) * 2.0 ** round(torch.tensor(scale).log2().item())  # on edges of bins
    observer = InputObserver()
    observer.observe(x)
    direct = torch.histc(x, bins=BINS, min=-observer.limit, max=observer.limit)
    assert torch.equal(observer.histogram, direct.double())


def test_the_largest_float_is_counted_and_a_larger_double_told():
    observer = InputObserver()
    observer.observe(torch.tensor([torch.finfo(torch.float32).max, 1.0]))
    assert observer.finite and observer.histogram.sum() == 2
    observer.observe(torch.tensor([1e300], dtype=torch.float64))
    assert not observer.finite


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_an_observer_for_a_method_gives_the_same_bounds_as_one_of_everything(method, bits):
    batches = torch.randn(3, 5000).relu()
    everything, needed = InputObserver(), observer_for(method, bits)
    for batch in batches:
        everything.observe(batch)
        needed.observe(batch)
    assert METHODS[method](needed, bits, False) == METHODS[method](everything, bits, False)
    constant = observer_for(method, bits)
    constant.observe(torch.ones(9))
    assert METHODS[method](constant, bits, False)[1] > 0.0


# ------------------------------------------------------------------------------------------------- what is chosen


def error(data, lower, upper, bits):
    bounds = torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64)
    scale = input_scale(*bounds, bits)
    zero_point = input_zero_point(bounds[0], scale, bits)
    return float(
        (quantize_input(data.double(), scale, zero_point, bits, Rounding("ste")) * scale - data).square().mean()
    )


DATA = {
    "normal": lambda: torch.randn(20000),
    "relu": lambda: torch.randn(20000).relu(),
    "gelu": lambda: F.gelu(torch.randn(20000)),
    "shifted": lambda: torch.randn(20000) + 3.0,
    "uniform": lambda: torch.rand(20000),
    "outlier": lambda: torch.cat([torch.randn(20000).relu(), torch.tensor([60.0])]),
    "heavy": lambda: torch.distributions.StudentT(3.0).sample((20000,)),
    "negative": lambda: -torch.rand(20000) - 1.0,
}


NONNEGATIVE = {"relu", "uniform", "outlier"}  # the only ones that 1 bit can take


@pytest.mark.parametrize(
    ("kind", "bits"), [(k, b) for k in DATA for b in (1, 2, 3, 4, 6, 8) if b > 1 or k in NONNEGATIVE]
)
def test_minimum_error_bounds_are_near_the_best(kind, bits):
    """The error is within 5 % of the least among 60 x 60 pairs; that grid is coarse too, so it may even be lower."""
    data = DATA[kind]()
    observer = observed(*data.split(3000))
    signed = observer.minimum < 0
    lows = torch.linspace(0.02, 1.0, 60) * min(observer.minimum, 0.0) if signed else torch.zeros(1)
    highs = torch.logspace(-2.5, 0.0, 60) * max(observer.maximum, 0.0)
    best = min(error(data, float(low), float(high), bits) for low in lows[:: 3 if bits > 4 else 1] for high in highs)
    lower, upper = minimum_error_bounds(observer, bits, signed)
    assert min(observer.minimum, 0.0) <= lower <= 0 <= upper <= max(observer.maximum, 0.0)
    assert error(data, lower, upper, bits) <= best * 1.05


def test_the_other_methods_by_hand():
    data = torch.cat([torch.linspace(-1.0, 3.0, 40001)[:-1], torch.tensor([-50.0, 80.0])])
    observer = observed(data)
    assert minmax_bounds(observer, 4, True) == (-50.0, 80.0) and minmax_bounds(observer, 4, False) == (0.0, 80.0)
    lower, upper = percentile_bounds(observer, 4, True)
    assert lower == pytest.approx(-1.0, abs=0.05) and upper == pytest.approx(3.0, abs=0.05)
    assert percentile_bounds(observer, 4, False)[0] == 0.0
    std = float(data.std())
    assert std_bounds(observer, 4, True) == pytest.approx((-3 * std, 3 * std))
    assert std_bounds(observer, 4, False) == pytest.approx((0.0, 3 * std))


DEGENERATE = {
    "zeros": torch.zeros(9),
    "constant": torch.full((9,), 5.0),
    "negative-constant": torch.full((9,), -5.0),
    "negative": torch.linspace(-2.0, -1.0, 9),
    "tiny": torch.tensor([1e-30, -1e-30]),
}
# three standard deviations around 0 do not hold values that lie far from it
METHODS_FOR = [(name, method) for name in DEGENERATE for method in METHODS if (name, method) != ("negative", "std")]


@pytest.mark.parametrize(("name", "method"), METHODS_FOR)
def test_degenerate_inputs_get_bounds_that_hold_them(name, method):
    data = DEGENERATE[name]
    qlayer = dq.quantize(nn.Linear(1, 2))
    dq.calibrate(qlayer, [data[:, None]], method=method)
    quantizer = qlayer.input_quantizer
    assert quantizer.lower <= 0 <= quantizer.upper and quantizer.lower != quantizer.upper
    on_grid = quantizer(data) * quantizer.scale()
    torch.testing.assert_close(on_grid, data, rtol=0.05, atol=1e-9)
