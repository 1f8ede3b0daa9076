"""Small quantized layers of every kind, and one training step with them, for the tests of a layer's step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.kernels import status

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (6, 12)),
    "linear-3d": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, dilation=2), (2, 4, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 7, 7)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5, 5)),
}
SETTINGS = {
    "default": {},
    "per tensor": {"granularity": "tensor"},
    "paper": {"normalize": True, "grid": "midrise", "granularity": "tensor"},
    "normalized per channel": {"normalize": True, "grid": "midrise", "granularity": "channel"},
    "two bits": {"w_bits": 2, "a_bits": 2},
    "ewgs": {"rounding": "ewgs", "delta": 0.5},
    "dsq": {"rounding": "dsq", "normalize": True, "grid": "midrise"},
    "lsq": {"rounding": "lsq"},
    "lsq per channel": {"rounding": "lsq", "granularity": "channel", "w_bits": 2, "a_bits": 2},
}
compiled = pytest.mark.skipif(not status().compiled, reason="no compiled kernels")


def quantized(kind="conv2d", **settings):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    x = torch.randn(shape)
    chosen = {"w_bits": 4, "a_bits": 4, **settings}
    qmodel = dq.quantize(nn.Sequential(make()), first=(chosen["w_bits"], chosen["a_bits"]), last={}, **chosen)
    dq.calibrate(qmodel, [x])
    return qmodel.train(), x


def run(qmodel, x):
    """Return the output and all gradients of one step."""
    x = x.clone().requires_grad_()
    qmodel.zero_grad()
    y = qmodel(x)
    (y * torch.cos(torch.arange(y.numel()).reshape(y.shape) * 0.7)).sum().backward()
    return y.detach(), {"x": x.grad, **{k: p.grad for k, p in qmodel.named_parameters() if p.grad is not None}}


def same(one, other):
    """Assert that two steps have the same output and nearly the same gradients."""
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for key, grad in one[1].items():
        assert torch.allclose(grad, other[1][key], rtol=1e-4, atol=1e-5 * float(grad.abs().max() + 1e-3)), key
