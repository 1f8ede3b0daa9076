"""The operator of an input: compiled kernel, plain torch and the reference give the same; dtypes, NaN, refusals."""

from __future__ import annotations

import pytest
import torch

from daqconvert.errors import DaqError
from daqconvert.functional import grid
from daqconvert.functional.input_operator import InputGrid, quantize_input
from helpers.operators import ROUNDINGS, agree, each_rounding, leaf, on_the_levels, run_input

INPUTS = {
    "unsigned": (0.0, 2.1),
    "signed": (-1.3, 2.1),
    "no width": (0.0, 0.0),
    "crossed": (0.4, -0.2),
}


def run_reference(x, lower, upper, bits, rounding):
    leaves = leaf(x), leaf(lower), leaf(upper)
    scale = grid.input_scale(*leaves[1:], bits)
    zero_point = grid.input_zero_point(leaves[1], scale, bits)
    operand = grid.quantize_input(leaves[0], scale, zero_point, bits, rounding)
    ((operand * torch.cos(x * 7)).sum() + 3 * scale).backward()
    return (operand, (operand + zero_point).to(torch.uint8), scale, zero_point), [t.grad for t in leaves]


@each_rounding
@pytest.mark.parametrize("bounds", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_input_kernel_plain_and_reference_agree(bits, bounds, rounding, plain):
    x = on_the_levels((3, 70, 100), max(bounds[1] - bounds[0], 0.1) / (2**bits - 1))
    lower, upper = map(torch.tensor, bounds)
    expected = run_reference(x, lower, upper, bits, rounding)
    agree(run_input(x, lower, upper, bits, rounding), expected)
    agree(plain(run_input, x, lower, upper, bits, rounding), expected)


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.bfloat16])
def test_narrow_types_compute_in_float32(change):
    x, lower, upper = change(torch.randn(50)), torch.tensor(-1.0), torch.tensor(1.0)
    operand, _, scale, _ = quantize_input(x, InputGrid(change(lower), change(upper), 4, ROUNDINGS["daq"]))
    wide = quantize_input(x.float(), InputGrid(lower, upper, 4, ROUNDINGS["daq"]))[0]
    assert operand.dtype == x.dtype and scale.dtype == torch.float32
    assert torch.equal(operand.float(), wide)


def test_nan_stays_nan_and_has_no_gradient(plain):
    x = torch.tensor([float("nan"), 1.0, float("inf"), -float("inf")])
    for run in (run_input, lambda *a: plain(run_input, *a)):
        (operand, *_), (grad, *_) = run(x.nan_to_num(0.5), torch.tensor(-1.0), torch.tensor(1.5), 4, ROUNDINGS["daq"])
        operand = quantize_input(x, InputGrid(torch.tensor(-1.0), torch.tensor(1.5), 4, ROUNDINGS["daq"]))[0]
        assert operand.isnan().tolist() == [True, False, False, False] and grad.isfinite().all()


def test_a_second_derivative_is_refused():
    x = torch.randn(5, requires_grad=True)
    operand = quantize_input(x, InputGrid(torch.tensor(0.0), torch.tensor(1.0), 4, ROUNDINGS["daq"]))[0]
    (grad,) = torch.autograd.grad(operand.sum(), x, create_graph=True)
    with pytest.raises(DaqError, match="no second derivative"):
        grad.sum().backward()
