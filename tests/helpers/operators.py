"""The fused operators of inputs and weights, run forward and backward, and how nearly two runs have to agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from daqconvert.functional.grid import Rounding
from daqconvert.functional.input_operator import InputGrid, quantize_input
from daqconvert.functional.weight_operator import WeightGrid, quantize_weight

ROUNDINGS = {
    "daq": Rounding.make("daq", 2.0, 1.0, False),
    "unit": Rounding.make("daq", 2.0, 0.5, True),
    "wide": Rounding.make("daq", 2.0, 50.0, False),
    "ste": Rounding.make("ste", 2.0, 1.0, False),
    "ewgs": Rounding.ewgs(0.7, 3),
    "dsq": Rounding.dsq(0.2),
    "steep dsq": Rounding.dsq(0.001),
}
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS.keys())


def leaf(values: Tensor | float) -> Tensor:
    return torch.as_tensor(values).clone().requires_grad_()


def on_the_levels(shape: tuple[int, ...], scale: float) -> Tensor:
    """Random values, some exactly on levels, half way between them, on the bounds, at zero of both signs."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2
    x.view(-1)[:40] = torch.arange(-20, 20) * 0.5 * scale
    x.view(-1)[40:42] = torch.tensor([0.0, -0.0])
    return x


def run_input(x, lower, upper, bits, rounding):
    leaves = leaf(x), leaf(lower), leaf(upper)
    operand, codes, scale, zero_point = quantize_input(leaves[0], InputGrid(*leaves[1:], bits, rounding), codes=True)
    ((operand * torch.cos(x * 7)).sum() + 3 * scale).backward()
    return (operand, codes, scale, zero_point), [t.grad for t in leaves]


def run_weight(weight, lower, upper, mean, std, view, bits, name, rounding):
    leaves = leaf(weight), None if lower is None else leaf(lower), leaf(upper)
    operand, codes = quantize_weight(leaves[0], WeightGrid(*leaves[1:], mean, std, view, bits, name, rounding))
    (operand * torch.cos(weight * 7)).sum().backward()
    return (operand, codes.codes), [None if t is None else t.grad for t in leaves]


def agree(found, expected):
    """Values exactly, the gradient elementwise nearly, its sums (for the bounds) within 1e-5 of what they sum."""
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(found[1][0], expected[1][0], rtol=2e-6, atol=1e-7)
    summed = float(expected[1][0].abs().sum())
    for a, b in zip(found[1][1:], expected[1][1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * summed), (a, b)
