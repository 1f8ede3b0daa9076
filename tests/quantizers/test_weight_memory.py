"""A weight is quantized once until it changes, and no change is missed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.functional import native, weight_operator
from helpers.layer_steps import SETTINGS, compiled, quantized, run


@pytest.fixture
def computed(monkeypatch):
    """How often a weight was quantized, not expanded from known codes."""
    seen = []
    forward = weight_operator.forward
    monkeypatch.setattr(
        weight_operator,
        "forward",
        lambda weight, grid, known=None: (seen.append(1) if known is None else None) or forward(weight, grid, known),
    )
    return seen


def expected(qmodel, x):
    """What a copy without a memory computes."""
    return copy.deepcopy(qmodel)(x)


@compiled
def test_a_weight_is_quantized_once_until_it_changes(computed):
    qmodel, x = quantized()
    for _ in range(3):
        qmodel(x).sum().backward()
    with torch.no_grad():
        qmodel.eval()(x)
    assert len(computed) == 1
    gradient = qmodel[0].weight.grad / 3
    qmodel.train().zero_grad()
    qmodel(x).sum().backward()
    assert torch.allclose(qmodel[0].weight.grad, gradient, rtol=1e-5) and len(computed) == 1


@compiled
@pytest.mark.parametrize("settings", [{}, SETTINGS["paper"]], ids=["default", "paper"])
def test_what_inference_mode_has_computed_may_be_trained_with(computed, settings):
    qmodel, x = quantized(**settings)
    qmodel[0].weight_quantizer._memory = None  # calibration may have filled it
    computed.clear()
    with torch.inference_mode():
        qmodel.eval()(x)
    run(qmodel.train(), x)
    assert len(computed) == 1


@compiled
def test_a_shared_module_is_quantized_once_a_forward(computed):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    qmodel = dq.quantize(nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU(), conv), w_bits=4, a_bits=4)
    x = torch.randn(2, 4, 5, 5)
    dq.calibrate(qmodel, [x])
    computed.clear()
    qmodel(x)
    assert len(computed) <= 1


def _step(layer):
    torch.optim.SGD(layer.parameters(), lr=0.1, foreach=True).step()


def _fused_step(layer):
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()


def _load(layer):
    layer.load_state_dict({k: v * -1.0 if k == "weight" else v for k, v in layer.state_dict().items()})


def _assign(layer):
    state = {k: v.clone() * (-1.0 if k == "weight" else 1) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _swap(layer):
    layer.weight.data, layer.kept = layer.weight.data * -1.0, layer.weight.data


def _swap_twice(layer):
    data = layer.weight.data
    layer.weight.data = data * -1.0
    layer(torch.zeros(1, 4, 9, 9))
    layer.weight.data = data
    layer.weight.data[0] *= -1.0


CHANGES = {
    "optimizer step": _step,
    "fused optimizer step": _fused_step,
    "load_state_dict": _load,
    "load_state_dict(assign=True)": _assign,
    ".data write": lambda layer: layer.weight.data.mul_(-1.0),
    ".data write of one": lambda layer: layer.weight.data.view(-1)[7:8].neg_(),
    ".data of two signs": lambda layer: (
        layer.weight.data.view(-1)[[3, 35]].neg_() is layer.weight.data.view(-1)[::32].neg_()
    ),
    "numpy write": lambda layer: layer.weight.detach().numpy().__imul__(-1.0),
    "rows exchanged": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "EMA swap": _swap,
    "EMA swap and back": _swap_twice,
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * -1.0)),
    "bound": lambda layer: layer.weight_quantizer.upper.data.mul_(0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("settings", [{}, SETTINGS["paper"]], ids=["default", "paper"])
def test_no_change_is_missed(change, settings):
    qmodel, x = quantized(**settings)
    before = qmodel(x)
    before.sum().backward()
    change(qmodel[0])
    after = qmodel(x)
    assert torch.equal(after, expected(qmodel, x))
    if "one" not in change.__name__:
        assert not torch.equal(after, before)


def test_disabled_and_back():
    qmodel, x = quantized()
    before = qmodel(x)
    with dq.disabled(qmodel):
        assert torch.equal(qmodel(x), F.conv2d(x, qmodel[0].weight, qmodel[0].bias, padding=1, dilation=2))
        qmodel[0].weight.data.mul_(0.5)
    assert not torch.equal(qmodel(x), before) and torch.equal(qmodel(x), expected(qmodel, x))


def test_a_copy_has_a_memory_of_its_own():
    qmodel, x = quantized()
    before = qmodel(x)
    other = copy.deepcopy(qmodel)
    other[0].weight.data.mul_(0.5)
    assert torch.equal(qmodel(x), before) and not torch.equal(other(x), before)
    assert torch.equal(other(x), expected(other, x)) and torch.equal(qmodel(x), before)


def test_threads_with_weights_of_their_own():
    qmodel, x = quantized()
    weights = [qmodel[0].weight.detach() * factor for factor in (1.0, 0.5)]
    right = [torch.func.functional_call(qmodel, {"0.weight": weight}, (x,)) for weight in weights]
    wrong = []

    def work(i):
        for _ in range(50):
            y = qmodel[0].weight_quantizer(weights[i])
            if not torch.equal(y, copy.deepcopy(qmodel[0].weight_quantizer)(weights[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not torch.equal(*right)


def test_nothing_is_remembered_without_a_fingerprint(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    qmodel, x = quantized()
    qmodel(x)
    assert qmodel[0].weight_quantizer._memory is None
