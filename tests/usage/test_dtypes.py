"""float16, bfloat16 and autocast: the dtype stays, values are finite, everything is covered, frozen is exact."""

from __future__ import annotations

import copy

import pytest
import torch

import daqconvert as dq
from helpers.converted_networks import NETWORKS, batch, float_network, quantized

LARGE = ("resnet", "nfnet")  # twelve seconds for these two
each_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in NETWORKS]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def check(qmodel, x, dtype):
    """Evaluate, freeze and count a quantized model."""
    with torch.no_grad():
        expected = qmodel(x)
        assert expected.dtype == dtype and expected.isfinite().all() and expected.any()
        assert torch.equal(dq.freeze(qmodel)(x), expected)
    assert dq.coverage(qmodel, x).share == 1.0
    return expected


@each_dtype
@each_network
def test_cast_before_quantization(name, dtype):
    model, x = float_network(name).to(dtype), batch(name).to(dtype)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x])
    found = check(qmodel.eval(), x, dtype)
    assert {p.dtype for p in qmodel.parameters()} == {dtype}
    with torch.no_grad():
        noise, signal = (found - model(x)).float(), model(x).float()
    assert noise.square().mean() < 0.05 * signal.square().mean()  # 13 dB: float16 and bfloat16 are coarse themselves


@each_dtype
@each_network
def test_cast_after_calibration(name, dtype):
    qmodel, x = quantized(name, 8).to(dtype), batch(name).to(dtype)
    check(qmodel, x, dtype)
    frozen = dq.freeze(quantized(name, 8))
    wide = frozen(batch(name))
    cast = copy.deepcopy(frozen).to(dtype)(x)
    assert cast.dtype == dtype and (cast - wide).square().mean() < 0.05 * wide.square().mean()


@each_network
def test_autocast(name):
    model, qmodel, x = float_network(name), quantized(name, 8), batch(name)
    with torch.autocast("cpu", torch.bfloat16):
        dtype = model(x).dtype  # with gradients: without, torch's fused encoder layer gives another dtype
        check(qmodel, x, dtype)
        qmodel.train()(x).float().square().mean().backward()
    gradients = [p.grad for p in qmodel.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients)
