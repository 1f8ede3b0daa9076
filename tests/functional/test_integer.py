"""The arithmetic of `functional.integer`, against exact integers and by hand."""

import numpy as np
import pytest
import torch

from daqconvert.functional.integer import LARGEST_BIAS, IntegerLayer, integer_layer, requantize


def numbers(scale, bias, top=7, x_scale=0.5, y_scale=0.25, zero=0, bits=8, lower=None, upper=None):
    scale, bias = (torch.tensor(v, dtype=torch.float64) for v in (scale, bias))
    x_scale, y_scale = torch.tensor(x_scale), torch.tensor(y_scale)
    return integer_layer(scale, bias, top, x_scale, y_scale, torch.tensor(zero, dtype=torch.uint8), bits, lower, upper)


def test_requantize_is_the_formula_in_exact_integers():
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**23), 2**23, (4, 5, 7), generator=generator)
    layer = IntegerLayer(
        torch.rand(5, generator=generator) * 1e-3, torch.tensor([8, -8, 0, 127, 1], dtype=torch.int8),
        torch.randint(-(2**29), 2**29, (5,), generator=generator).to(torch.int32), torch.tensor(0.031),
        torch.tensor(9, dtype=torch.uint8), torch.tensor([3, 200], dtype=torch.uint8),
    )  # fmt: skip
    x_scale = torch.tensor(0.0173)
    sums = acc.numpy() * layer.factor.numpy().astype(np.int64).reshape(5, 1) + layer.bias.numpy().reshape(5, 1)
    assert np.abs(sums).max() < 2**31
    m = (np.float32(0.0173) * layer.weight_scale.numpy()) / np.float32(0.031)
    wanted = np.clip(np.rint(sums.astype(np.float32) * m.reshape(5, 1)) + np.float32(9), 3, 200)
    found = requantize(acc.float(), layer, x_scale, output_dims=1) + 9
    assert np.array_equal(found.numpy(), wanted)


def test_the_unit_of_the_bias_is_refined():
    layer = numbers([0.5], [1.0], top=1)
    assert layer.factor.tolist() == [127] and layer.bias.tolist() == [254]
    assert float(layer.weight_scale * 127 * 0.5) == pytest.approx(0.5)


def test_a_negative_scale_flips_its_channel():
    layer = numbers([0.25, -0.25], [1.0, 1.0])
    assert layer.factor.tolist() == [18, -18] and layer.bias[0] == layer.bias[1] > 0
    codes = requantize(torch.tensor([[4.0, 4.0]]), layer, torch.tensor(0.5), 0)
    assert codes.tolist() == [[8.0, 0.0]]  # (1 + 4 / 4) / 0.25 and (1 - 4 / 4) / 0.25


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-12], ids=["zero", "subnormal", "the bias would not fit"])
def test_a_channel_of_no_scale_is_its_bias(scale):
    layer = numbers([scale], [2.5])
    assert layer.factor.tolist() == [0]
    codes = requantize(torch.tensor([[1000.0], [-3.0]]), layer, torch.tensor(0.5), 0)
    assert codes.tolist() == [[10.0], [10.0]]


def test_a_bias_beyond_every_code_saturates():
    layer = numbers([0.0], [1e30])
    assert layer.bias.tolist() == [LARGEST_BIAS]
    assert requantize(torch.zeros(1, 1), layer, torch.tensor(0.5), 0).tolist() == [[255.0]]


@pytest.mark.parametrize(
    ("lower", "upper", "zero", "bits", "ends"),
    [
        (None, None, 0, 8, [0, 255]),
        (0.0, None, 0, 4, [0, 15]),
        (0.0, 6.0, 0, 8, [0, 24]),
        (0.0, 6.0, 0, 4, [0, 15]),
        (0.0, None, 7, 8, [7, 255]),
        (-0.5, 0.75, 7, 4, [5, 10]),
    ],
)
def test_an_activation_that_clips_becomes_a_range_of_codes(lower, upper, zero, bits, ends):
    assert numbers([1.0], [0.0], zero=zero, bits=bits, lower=lower, upper=upper).range.tolist() == ends
