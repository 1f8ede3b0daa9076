"""The fused operators: registered as torch wants; compiled kernels, plain torch and the reference give the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from daqconvert.functional.input_operator import InputGrid, quantize_input
from daqconvert.functional.weight_operator import WeightGrid, quantize_weight
from helpers.operators import ROUNDINGS, agree, leaf, run_input, run_weight


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 2),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
    ids=["channels_last", "transposed", "every second", "expanded"],
)
def test_any_layout(layout, plain):
    x = layout(torch.randn(4, 6, 5, 3))
    arguments = x, torch.tensor(-1.0), torch.tensor(1.5), 4, ROUNDINGS["daq"]
    agree(run_input(*arguments), plain(run_input, *arguments))
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    arguments = weight, None, torch.linspace(1, 2, 6), None, None, (1, 1, 6, 36), 4, "integer", ROUNDINGS["daq"]
    agree(run_weight(*arguments), plain(run_weight, *arguments))


def samples():
    """One call of each operator, as `torch.library.opcheck` wants them."""
    operators = torch.ops.daqconvert
    constants = 4, True, 1, 1.0, 4.0
    x, low, high = torch.randn(3, 4, requires_grad=True), leaf(-1.0), leaf(1.5)
    scale, zero = torch.tensor(0.2), torch.tensor(6.0)
    yield operators.quantize_input.default, (x, low, high, *constants, True)
    yield operators.quantize_input.default, (x, low, high, *constants, False)
    detached = [t.detach() for t in (x, low, high)]
    yield operators.quantize_input_backward.default, (torch.ones(3, 4), scale, *detached, scale, zero, *constants)
    weight, upper = torch.randn(3, 4, requires_grad=True), leaf(torch.ones(3))
    last = [1, 1, 3, 4], 4, "integer", 1, 1.0, 4.0
    yield operators.quantize_weight.default, (weight, None, upper, None, None, None, *last)
    mean, std = torch.zeros(3), torch.ones(3)
    yield (
        operators.quantize_weight.default,
        (weight, leaf(-torch.ones(3)), upper, mean, std, None, [1, 1, 3, 4], 4, "midrise", 1, 1.0, 4.0),
    )
    values = weight.detach(), None, upper.detach(), None, None
    yield operators.quantize_weight_backward.default, (torch.ones(3, 4), *values, *last)
    bounds = *detached[1:], None, upper.detach(), None, None
    both = [1, 1, 3, 4], 4, True, 4, "integer"
    slopes = torch.tensor((1.0, 4.0), dtype=torch.float64), torch.tensor((1.0, 4.0), dtype=torch.float64)
    yield operators.layer_forward.default, (weight.detach(), std, *bounds, *both)
    tensors = torch.ones(3, 3), detached[0], weight.detach(), std
    yield operators.layer_backward.default, (*tensors, *bounds, *slopes, [], True, True, *both, 1, 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own check reads it
@pytest.mark.parametrize("index", range(8))
def test_registered_as_torch_wants_it(index):
    operator, arguments = next(itertools.islice(samples(), index, None))
    torch.library.opcheck(operator, arguments)


def test_samples_are_all_tested():
    assert len(list(samples())) == 8


def test_fake_tensors_have_the_right_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
        bounds = InputGrid(torch.zeros(()), torch.ones(()), 4, ROUNDINGS["ste"])
        operand, codes, scale, _ = quantize_input(x, bounds, True)
        assert operand.stride() == codes.stride() == x.stride() and codes.dtype == torch.uint8 and scale.shape == ()
        weight_grid = WeightGrid(None, torch.ones(3), None, None, (1, 1, 3, 8), 4, "integer", ROUNDINGS["ste"])
        operand, codes = quantize_weight(torch.empty(3, 8), weight_grid)
        assert operand.shape == codes.codes.shape == (3, 8)
