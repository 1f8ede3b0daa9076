"""LSQ against the formulas of its paper, written out in float64, and the widths it cannot have."""

import math

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import PolicyError
from helpers.cases import GEOMETRIES
from helpers.literal_quantizers import CLOSE


def test_an_unsigned_input_of_lsq_needs_two_bits():
    both = {"w_bits": 4, "a_bits": 4, "rounding": "lsq"}
    qmodel = dq.quantize(nn.Sequential(nn.ReLU(), nn.Linear(8, 4)), first=both, last=both)
    dq.calibrate(qmodel, [torch.randn(4, 8)])
    with pytest.raises(PolicyError, match="a_bits"):
        qmodel[1].input_quantizer.set_bits(1)


class Lsq(torch.autograd.Function):
    """Equations 1-3 of the paper, for a step that broadcasts against `v`."""

    @staticmethod
    def forward(ctx, v, s, low, high, count):
        ctx.save_for_backward(v, s)
        ctx.known = low, high, count
        return torch.round((v / s).clamp(-low, high)) * s

    @staticmethod
    def backward(ctx, grad):
        v, s = ctx.saved_tensors
        low, high, count = ctx.known
        x = v / s
        below, above = x <= -low, x >= high
        to_step = torch.where(below, -float(low), torch.where(above, float(high), torch.round(x) - x))
        share = (grad * to_step).sum_to_size(s.shape) / math.sqrt(count * high)
        return torch.where(below | above, 0.0, grad), share, None, None, None


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["conv2d", "transposed2d", "linear"])
def test_lsq(name, bits, signed, granularity):
    cls, args, kwargs, shape = GEOMETRIES[name]
    x = torch.randn(5, *shape, dtype=torch.float64)
    x = x if signed else x.abs()
    both = {"w_bits": bits, "a_bits": bits, "rounding": "lsq", "granularity": granularity}
    layer = dq.quantize(cls(*args, **kwargs, dtype=torch.float64), first=both, last=both)
    dq.calibrate(layer, [x])
    of_weight, of_input = layer.weight_quantizer, layer.input_quantizer
    high = 2 ** (bits - 1) - 1
    ends = (high + 1, high) if signed else (0, 2**bits - 1)
    rows = of_weight.layout.rows(layer.weight.detach()) if granularity == "channel" else layer.weight.detach()[None]
    start = 2 * rows.flatten(1).abs().mean(1) / math.sqrt(high)
    torch.testing.assert_close(of_weight.step.detach(), start.reshape(of_weight.step.shape), **CLOSE)
    assert of_input.step.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(ends[1]), rel=1e-6)
    with torch.no_grad():
        of_weight.step.mul_(0.7)
        of_input.step.mul_(0.6)

    step = of_weight.step.detach().clone().requires_grad_()
    a_step = of_input.step.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    view = of_weight.layout.view if granularity == "channel" else weight.shape
    spread = step.reshape(of_weight.layout.bound_view) if granularity == "channel" else step
    w_q = Lsq.apply(weight.reshape(view), spread, high + 1, high, weight.numel() / step.numel()).reshape(weight.shape)
    expected = layer.accumulate(Lsq.apply(inputs[0], a_step, *ends, x[0].numel()), w_q)
    if layer.bias is not None:
        expected = expected + layer.bias.detach().reshape(-1, *[1] * layer.output_dims)
    out = layer(inputs[1])
    grad = torch.randn_like(out)
    expected.backward(grad)
    out.backward(grad)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out, expected, **close)
    for found, wanted in (
        (inputs[1], inputs[0]), (layer.weight, weight), (of_weight.step, step), (of_input.step, a_step)
    ):  # fmt: skip
        torch.testing.assert_close(found.grad, wanted.grad, **close)
        assert found.grad.any()
    layer.requires_grad_(True)  # as code that unfreezes a whole model does
    assert not layer.output_scale.requires_grad and layer.output_scale.eq(1.0).all()
    of_weight.step.data.mul_(0.01)
    codes = of_weight.codes(layer.weight)
    assert int(codes.min()) == 0 and int(codes.max()) == 2**bits - 1  # both ends of the grid
