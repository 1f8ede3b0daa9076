"""A layer as one step of autograd: the same as its parts, little kept, weights quantized when they change."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.errors import DaqError
from daqconvert.functional import fused_weight, native
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
}
each_layer = pytest.mark.parametrize("kind", LAYERS)
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
    """Output and all gradients of one step."""
    x = x.clone().requires_grad_()
    qmodel.zero_grad()
    y = qmodel(x)
    (y * torch.cos(torch.arange(y.numel()).reshape(y.shape) * 0.7)).sum().backward()
    return y.detach(), {"x": x.grad, **{k: p.grad for k, p in qmodel.named_parameters() if p.grad is not None}}


def same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for key, grad in one[1].items():
        assert torch.allclose(grad, other[1][key], rtol=1e-4, atol=1e-5 * float(grad.abs().max() + 1e-3)), key


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed", "reflect"])
def test_torch_compile_gives_the_same_codes_and_outputs(kind, fresh_compiler):
    qmodel, x = quantized(kind)
    found = run(qmodel, x)
    same(run(torch.compile(copy.deepcopy(qmodel), fullgraph=True), x), (found[0], _named_as_compiled(found[1])))


def _named_as_compiled(grads):
    return {key if key == "x" else f"_orig_mod.{key}": grad for key, grad in grads.items()}


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


# ------------------------------------------------------------------------------ values of weights, when they change


@pytest.fixture
def computed(monkeypatch):
    """How often a weight was quantized, not expanded from known codes."""
    seen = []
    forward = fused_weight.forward
    monkeypatch.setattr(
        fused_weight, "forward", lambda *args: (seen.append(1) if args[5] is None else None) or forward(*args)
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
