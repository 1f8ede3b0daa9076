"""Moments of a normalized weight: what the paper says, and the same bits in every program and layout."""

import pytest
import torch

from daqconvert.functional.weight_operator import weight_moments
from daqconvert.quantizers import WeightQuantizer
from daqconvert.quantizers.layout import ChannelLayout
from daqconvert.spec import Settings

SHAPES = [(64, 64, 3, 3), (32, 16, 3, 3), (16, 3, 3, 3), (100, 333)]


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels", [False, True], ids=["tensor", "channel"])
def test_they_are_mean_and_unbiased_std(shape, channels):
    w = weight(shape)
    bound = (shape[0],) + (1,) * (len(shape) - 1) if channels else None
    rows = w.double().reshape(shape[0] if channels else 1, -1)
    mean, std = weight_moments(w, shape, bound)
    torch.testing.assert_close(mean, rows.mean(1).float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(std, rows.std(1).float(), rtol=1e-5, atol=0)
    assert not mean.requires_grad and not weight_moments(w.requires_grad_(), shape, bound)[1].requires_grad


def test_the_dtype_is_float32_at_least():
    found = [weight_moments(weight((8, 9)).to(d), (8, 9), None)[0].dtype for d in (torch.bfloat16, torch.float64)]
    assert found == [torch.float32, torch.float64]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_compiled_program_and_another_layout_have_the_same_bits(granularity):
    settings = Settings(w_bits=2, grid="midrise", normalize=True, granularity=granularity)
    quantizer = WeightQuantizer(settings, ChannelLayout.forward((64, 64, 3, 3)))
    torch._dynamo.reset()
    compiled = torch.compile(quantizer.moments)
    for seed in range(8):
        w = weight((64, 64, 3, 3), seed)
        known = quantizer.moments(w)
        for other in (compiled(w), quantizer.moments(w.to(memory_format=torch.channels_last))):
            assert all(torch.equal(a, b) for a, b in zip(known, other, strict=True)), seed
