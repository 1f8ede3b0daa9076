"""The operator of a weight: compiled kernel, plain torch and the reference give the same on every grid and layout."""

from __future__ import annotations

import pytest
import torch

from daqconvert.functional import grid
from helpers.operators import agree, each_rounding, leaf, on_the_levels, run_weight

VIEWS = {
    "linear": ((6, 40), (1, 1, 6, 40)),
    "convolution": ((5, 3, 3, 3), (1, 1, 5, 27)),
    "transposed": ((4, 3, 2, 2), (2, 2, 3, 4)),
    "one bound": ((5, 3, 3, 3), (1, 1, 1, 135)),
    "large": ((3, 20000), (1, 1, 3, 20000)),
}


def run_weight_reference(weight, lower, upper, mean, std, view, bits, name, rounding):
    leaves = leaf(weight), None if lower is None else leaf(lower), leaf(upper)
    shape = (view[0], 1, view[2], 1)
    v = leaves[0].reshape(view)
    if mean is not None:
        v = (v - mean.reshape(shape)) / std.reshape(shape)
    high = leaves[2].reshape(shape)
    low = -high if lower is None else leaves[1].reshape(shape)
    operand = grid.quantize_weight(v, low, high, bits, name, rounding).reshape(weight.shape)
    (operand * torch.cos(weight * 7)).sum().backward()
    return (operand, grid.weight_codes(operand, bits, name)), [None if t is None else t.grad for t in leaves]


@each_rounding
@pytest.mark.parametrize("layout", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize(
    ("name", "normalize", "bits"),
    [
        ("midrise", True, 1),
        ("midrise", True, 4),
        ("midrise", False, 1),
        ("midrise", False, 3),
        ("integer", False, 8),
        ("twos", False, 3),
    ],
)
def test_weight_kernel_plain_and_reference_agree(name, normalize, bits, layout, rounding, plain):
    shape, view = layout
    channels = view[0] * view[2]
    weight = on_the_levels(shape, 0.3)
    upper = torch.linspace(0.9, 2.0, channels)
    rows = weight.reshape(view).transpose(1, 2).reshape(channels, -1)
    lower, mean, std = (-upper * 1.1, rows.mean(1), rows.std(1)) if normalize else (None, None, None)
    arguments = weight, lower, upper, mean, std, view, bits, name, rounding
    expected = run_weight_reference(*arguments)
    agree(run_weight(*arguments), expected)
    agree(plain(run_weight, *arguments), expected)
