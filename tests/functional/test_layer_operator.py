"""A layer as one autograd function: it computes what its parts do, with and without kernels, and keeps little."""

from __future__ import annotations

import copy

import pytest
import torch

from daqconvert.errors import DaqError
from daqconvert.functional import native
from helpers.layer_steps import LAYERS, SETTINGS, quantized, run, same

each_layer = pytest.mark.parametrize("kind", LAYERS)


def hooked(qmodel):
    for module in qmodel.modules():
        if type(module).__name__.endswith("Quantizer"):
            module.register_forward_hook(lambda *_: None)
    return qmodel


@each_layer
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_one_step_is_what_its_parts_are(kind, settings, monkeypatch):
    qmodel, x = quantized(kind, **settings)
    found = run(qmodel, x)
    same(run(hooked(copy.deepcopy(qmodel)), x), found)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        same(run(copy.deepcopy(qmodel), x), found)
    with torch.no_grad():
        assert torch.equal(qmodel.eval()(x), found[0])


def test_kept_for_the_backward_are_the_input_the_weight_and_bytes():
    qmodel, x = quantized()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = qmodel(x.requires_grad_())
    layer = qmodel[0]
    large = [t for t in kept if t.numel() >= min(x.numel(), layer.weight.numel())]
    floats = {t.data_ptr() for t in large if t.is_floating_point()}
    assert floats == {x.data_ptr(), layer.weight.data_ptr()}
    assert sorted((t.dtype, t.shape) for t in large if not t.is_floating_point()) == sorted(
        [(torch.uint8, x.shape), (torch.uint8, layer.weight.shape)]
    )
    y.sum().backward()


def test_a_hook_may_change_the_operand():
    qmodel, x = quantized()
    qmodel[0].input_quantizer.register_forward_hook(lambda module, args, out: out.mul_(2))
    doubled = run(qmodel, x)
    other, _ = quantized()
    bias = other[0].bias.detach().reshape(-1, 1, 1)
    expected = run(other, x)
    assert torch.allclose(doubled[0] - bias, 2 * (expected[0] - bias), atol=1e-6)
    assert torch.allclose(doubled[1]["0.weight"], 2 * expected[1]["0.weight"], atol=1e-5)


def test_a_frozen_weight_and_frozen_bounds():
    qmodel, x = quantized()
    expected = run(qmodel, x)
    for frozen in (["0.weight"], ["0.output_scale", "0.weight_quantizer.upper"], ["0.bias"]):
        for key, parameter in qmodel.named_parameters():
            parameter.requires_grad_((key not in frozen and not key.endswith("lower")) or key in expected[1])
            if key in frozen:
                parameter.requires_grad_(False)
        grads = {key: grad for key, grad in expected[1].items() if key not in frozen}
        same(run(qmodel, x), (expected[0], grads))


def test_a_second_derivative_is_refused():
    qmodel, x = quantized()
    (grad,) = torch.autograd.grad(qmodel(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(DaqError, match="no second derivative"):
        grad.sum().backward()
