"""A whole quantized convolution against the authors' code (`golden/layer.npz`), three ways to the same answer.

`equations` writes METHOD's layer out from `clip_round` alone, `grid` uses the quantizer's arithmetic of
`functional.grid`, `layer` is the real `QuantConv2d`. Codes are equal; arrays agree within 2e-5 of their largest value
and scalar gradients within 1e-4 relative, for the recorded code works with fractions `q / n` in float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daqconvert.functional.dasr import clip_round, slope_coefficients
from daqconvert.functional.grid import Rounding, input_scale, quantize_input, quantize_weight
from daqconvert.layers.families import QuantConv2d
from daqconvert.spec import Settings

ARRAYS = 2e-5
SCALARS = 1e-4
WEIGHT = slope_coefficients(2.0, 1.0)
INPUT = slope_coefficients(2.0, 2.0)
NAMES = ("weight", "weight_lower", "weight_upper", "act_upper", "output_scale")


@pytest.fixture(params=range(6), ids="case{}".format)
def case(request, root):
    with np.load(root / "tests" / "golden" / "layer.npz") as file:
        prefix = f"c{request.param}_"
        found = {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}
        assert file["n_cases"] == 6
    return {key: v.item() if v.ndim == 0 else torch.from_numpy(v) for key, v in found.items()}


def test_recorded_zeros_get_no_gradient(case):
    """Half of the recorded inputs are exactly 0, the low end of the clip: why inputs are clipped with `ends=False`."""
    at_zero = case["x"] == 0
    assert 0.4 < at_zero.float().mean() < 0.6
    assert not case["grad_x"][at_zero].any()


def normalized(weight: Tensor) -> Tensor:
    return (weight - weight.detach().mean()) / weight.detach().std()


def by_equations(x: Tensor, leaf: dict[str, Tensor], bits: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return the sums of products of the integer-valued operands, and what one of them is worth."""
    n = 2**bits - 1
    lower, upper = leaf["weight_lower"], leaf["weight_upper"]
    q_w = clip_round((normalized(leaf["weight"]) - lower) / ((upper - lower) / n), 0.0, n, "daq", *WEIGHT)
    q_x = clip_round(x / (leaf["act_upper"] / n), 0.0, n, "daq", *INPUT, ends=False)
    return F.conv2d(q_x, 2.0 * q_w - n, stride=stride, padding=1), leaf["output_scale"].abs() / n**2


def by_grid(x: Tensor, leaf: dict[str, Tensor], bits: int, stride: int) -> tuple[Tensor, Tensor]:
    n = 2**bits - 1
    lower, upper, zero = leaf["weight_lower"], leaf["weight_upper"], torch.zeros(())
    w_rounding, x_rounding = (Rounding.make("daq", 2.0, sigma, unit=False) for sigma in (1.0, 2.0))
    w = quantize_weight(normalized(leaf["weight"]), lower, upper, bits, "midrise", w_rounding)
    q_x = quantize_input(x, input_scale(zero, leaf["act_upper"], bits), zero, bits, x_rounding)
    return F.conv2d(q_x, w, stride=stride, padding=1), leaf["output_scale"].abs() / n**2


def check(case, y: Tensor, grads: dict[str, Tensor]) -> None:
    """Compare an output and gradients with the recorded ones."""
    for recorded in ("y_train", "y_eval"):
        assert (y - case[recorded]).abs().max() <= ARRAYS * case[recorded].abs().max()
    for name, grad in grads.items():
        expected = case[f"grad_{name}"]
        if isinstance(expected, float):
            assert grad.item() == pytest.approx(expected, rel=SCALARS), name
        else:
            assert grad.shape == expected.shape
            assert (grad - expected).abs().max() <= ARRAYS * expected.abs().max(), name


def recorded_sums(case) -> Tensor:
    """The integer sums of products behind the recorded output: exact, or the assertion says so."""
    n = 2 ** case["bits"] - 1
    sums = case["y_eval"].double() / case["output_scale"] * n**2
    assert (sums - sums.round()).abs().max() < 0.01
    return sums.round()


@pytest.mark.parametrize("way", [by_equations, by_grid], ids=["equations", "grid"])
def test_functions_give_the_recorded_layer(case, way):
    leaf = {name: torch.as_tensor(case[name], dtype=torch.float32).clone().requires_grad_() for name in NAMES}
    x = case["x"].clone().requires_grad_()
    sums, worth = way(x, leaf, case["bits"], case["stride"])
    y = sums * worth
    y.backward(case["grad_out"])
    assert torch.equal(sums.detach().double(), recorded_sums(case))
    check(case, y.detach(), {"x": x.grad} | {name: value.grad for name, value in leaf.items()})


def recorded_layer(case) -> QuantConv2d:
    """The real layer with the file's weight, bounds and output scale."""
    channels_out, channels_in = case["weight"].shape[:2]
    float_layer = nn.Conv2d(channels_in, channels_out, 3, stride=case["stride"], padding=case["padding"], bias=False)
    bits = case["bits"]
    settings = Settings(
        w_bits=bits,
        a_bits=bits,
        granularity="tensor",
        grid="midrise",
        normalize=True,
        rounding="daq",
        slope="paper",
        w_sigma=1.0,
        a_sigma=2.0,
    )
    layer = QuantConv2d.convert(float_layer, settings, "conv", signed=False)
    layer.input_quantizer.set_bounds(case["act_lower"], case["act_upper"])
    with torch.no_grad():
        layer.weight.copy_(case["weight"])
        layer.weight_quantizer.lower.fill_(case["weight_lower"])
        layer.weight_quantizer.upper.fill_(case["weight_upper"])
        layer.output_scale.fill_(case["output_scale"])
    return layer


def test_quantized_layer_gives_the_recorded_layer(case):
    layer = recorded_layer(case)
    x = case["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(case["grad_out"])
    grads = {
        "x": x.grad,
        "weight": layer.weight.grad,
        "weight_lower": layer.weight_quantizer.lower.grad,
        "weight_upper": layer.weight_quantizer.upper.grad,
        "act_upper": layer.input_quantizer.upper.grad,
        "output_scale": layer.output_scale.grad,
    }
    check(case, y.detach(), grads)
    assert torch.equal(layer.eval()(x), y)


def test_quantized_layer_has_the_recorded_codes(case):
    layer, n = recorded_layer(case), 2 ** case["bits"] - 1
    w_codes, x_codes = layer.weight_quantizer.codes(case["weight"]), layer.input_quantizer.codes(case["x"])
    assert w_codes.dtype == x_codes.dtype == torch.uint8
    sums = F.conv2d(x_codes.double(), 2.0 * w_codes.double() - n, stride=case["stride"], padding=1)
    assert torch.equal(sums, recorded_sums(case))
