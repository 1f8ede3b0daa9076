"""Gradients of whole layers against autograd of the paper's formulas, written out in float64."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.functional import slope_coefficients
from helpers.cases import GEOMETRIES
from helpers.literal_quantizers import SETTINGS, literal_input, literal_weight


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("rounding", ["ste", "daq", "daq-paper"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("name", ["conv2d", "grouped-dilated", "transposed2d", "linear"])
def test_value_and_gradients(name, settings, signed, rounding, granularity):
    kind, _, slope_kind = rounding.partition("-")
    settings = settings | {"granularity": granularity, "rounding": kind, "slope": slope_kind or "unit"}
    settings |= {"w_gamma": 2.0, "w_sigma": 1.0, "a_gamma": 3.0, "a_sigma": 0.5}
    cls, args, kwargs, shape = GEOMETRIES[name]
    x = torch.randn(5, *shape, dtype=torch.float64)
    x = x if signed else x.abs()
    bits = {"first": {"a_bits": 3} | settings, "last": {"a_bits": 3} | settings}
    layer = dq.quantize(cls(*args, **kwargs, dtype=torch.float64), **bits)
    dq.calibrate(layer, [x], method="percentile")
    with torch.no_grad():  # so that both ends clip, and no grid is symmetric by chance
        for key, parameter in layer.named_parameters():
            if key not in ("weight", "bias"):
                parameter.mul_(0.6 + 0.2 * torch.rand_like(parameter))
    layer.output_scale.data.mul_(torch.where(torch.rand_like(layer.output_scale) < 0.5, -1.0, 1.0))

    parameters = {key: p.detach().clone().requires_grad_(p.requires_grad) for key, p in layer.named_parameters()}
    c = None if kind == "ste" else slope_coefficients(2.0, 1.0, unit=slope_kind != "paper")
    a = None if kind == "ste" else slope_coefficients(3.0, 0.5, unit=slope_kind != "paper")
    w_q, inputs = literal_weight(layer, parameters, c), [x.clone().requires_grad_() for _ in range(2)]
    x_q = literal_input(layer, inputs[0], parameters, a)
    scale = parameters["output_scale"].abs()
    expected = layer.accumulate(x_q, w_q) * (scale.reshape(-1, *[1] * layer.output_dims) if scale.dim() else scale)
    if layer.bias is not None:
        expected = expected + parameters["bias"].reshape(-1, *[1] * layer.output_dims)
    out = layer(inputs[1])
    grad = torch.randn_like(out)
    expected.backward(grad)
    out.backward(grad)

    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **close)
    if not signed:
        assert layer.input_quantizer.lower.grad.tolist() == [0.0]
        parameters["input_quantizer.lower"].grad = torch.zeros(1, dtype=torch.float64)
    for key, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, parameters[key].grad, **close, msg=lambda m, key=key: f"{key}: {m}"
            )
            assert parameter.grad.any() or (key == "input_quantizer.lower" and not signed), key


def test_the_gradient_of_upper_by_hand():
    """One weight inside the clip, one outside; one input each; the integer grid with STE."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.5, 3.0]])
    bits = {"w_bits": 3, "a_bits": None, "rounding": "ste", "granularity": "tensor"}
    qlayer = dq.quantize(layer, first=bits, last=bits)
    qlayer.weight_quantizer.upper.data.fill_(1.5)  # m = 3: step 0.5, so the codes are 1 and 3
    out = qlayer(torch.tensor([[1.0, 10.0]]))
    out.sum().backward()
    assert out.item() == 0.5 + 10 * 1.5
    # inside: q / m - v / upper = 1/3 - 1/3; outside: the end of the range moves with upper
    assert abs(qlayer.weight_quantizer.upper.grad.item() - (0.0 + 10.0)) < 1e-6
    assert qlayer.weight.grad.tolist() == [[1.0, 0.0]]


def test_the_gradient_at_the_ends_of_the_clip():
    """A weight on its bound gets a gradient; an input on its bound gets none, as recorded from the authors' layer."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[-1.5, 1.5, 1.6, 0.5]])
    bits = {"w_bits": 3, "a_bits": 2, "rounding": "ste", "granularity": "tensor"}
    qlayer = dq.quantize(nn.Sequential(nn.ReLU(), layer), first=bits, last=bits)[1]
    qlayer.weight_quantizer.upper.data.fill_(1.5)
    qlayer.input_quantizer.set_bounds(0.0, 3.0)
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    qlayer(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.5, 1.5, 0.0]]
    assert qlayer.weight.grad.tolist() == [[0.0, 1.0, 0.0, 3.0]]
    qlayer.zero_grad()
    qlayer(torch.ones(1, 4)).sum().backward()
    assert qlayer.weight.grad.tolist() == [[1.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernels", "plain"])
@pytest.mark.parametrize("rounding", ["daq", "ste", "ewgs", "dsq"])
@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_the_bound_of_a_symmetric_input_gets_the_gradient_of_both_ends(name, rounding, dtype):
    """In a layer's fused step as well, where `lower` follows from `upper`; by the chain rule from two free bounds."""
    cls, args, kwargs, shape = GEOMETRIES[name]
    x, layer = torch.randn(5, *shape, dtype=dtype), cls(*args, **kwargs, dtype=dtype)
    settings = {"w_bits": 4, "a_bits": 4, "rounding": rounding, "first": {}, "last": {}}
    tied, free = (dq.quantize(layer, **settings, symmetric=symmetric) for symmetric in (True, False))
    dq.calibrate(tied, [x])
    dq.calibrate(free, [x])
    own = tied.input_quantizer
    free.input_quantizer.set_bounds(own.lower.item(), own.upper.item())
    free.output_scale.data.copy_(tied.output_scale)
    grad = torch.randn_like(tied(x))
    for model in (tied, free):
        model(x).backward(grad)
    ratio, both = 8 / 7, free.input_quantizer
    assert [key for key, _ in own.named_parameters()] == ["upper"] and own.upper.grad.abs() > 0
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(own.upper.grad, both.upper.grad - ratio * both.lower.grad, **close)
    torch.testing.assert_close(tied.weight.grad, free.weight.grad, **close)
