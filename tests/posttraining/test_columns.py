"""Columns are what an operation multiplies a weight's rows with: rows times columns are its outputs."""

import pytest
import timm.layers
import torch
from torch import nn

import daqconvert as dq
from daqconvert.functional.products import ConvolutionProducts
from daqconvert.posttraining.gptq import MOST_POSITIONS, columns, has_columns, second_moments

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear over tokens": (nn.Linear(6, 4), (2, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 11)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    "pointwise": (nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 5, padding=2, groups=4), (2, 4, 7, 7)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "same": (timm.layers.Conv2dSame(4, 6, 3, stride=2), (2, 4, 7, 6)),
    "without a batch": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_columns_are_the_outputs(name):
    layer, shape = LAYERS[name]
    site = dq.quantize(nn.Sequential(layer), w_bits=4, a_bits=8)[0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = layer.weight.detach().double()
    operation = site.bare_operation()
    assert has_columns(operation)
    found = columns(operation, x, tuple(weight.shape))
    assert len(found) == getattr(layer, "groups", 1)
    products = (weight.reshape(len(found), -1, found.shape[1]) @ found).flatten(0, 1)  # (C_out, P)
    expected = operation(x, weight)
    if isinstance(layer, nn.Linear):
        expected = expected.reshape(-1, 4).t()
    else:
        expected = expected.reshape(-1, *expected.shape[-site.output_dims - 1 :]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=1e-12)


def test_large_images_are_thinned_out_evenly():
    conv = ConvolutionProducts((1, 1), (1, 1), (1, 1), 1)
    x = torch.arange(64.0 * 48).reshape(1, 1, 64, 48).repeat(2, 1, 1, 1)
    found = columns(conv, x, (1, 1, 3, 3))
    assert MOST_POSITIONS / 4 < found.shape[2] / 2 <= MOST_POSITIONS
    centres = found[0, 4, : found.shape[2] // 2]
    assert torch.equal(centres.diff().unique()[:1], torch.tensor([4.0]))  # every fourth of a row
    tokens = columns(dq.functional.products.LinearProducts(), torch.randn(2, 2048, 3), (4, 3))
    assert tokens.shape == (1, 3, 2 * MOST_POSITIONS)


def test_others_have_none():
    site = dq.quantize(nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), w_bits=4, a_bits=8)[0]
    assert not has_columns(site.bare_operation())
    assert not has_columns(lambda x, w: x @ w.t())


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 1, 70000), 1.0, dtype=torch.bfloat16)
    assert second_moments(x).item() == 70000.0
