"""Each family honours every argument of its constructor, in float, quantized and frozen."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from helpers.cases import GEOMETRIES


def make(name, **settings):
    cls, args, kwargs, shape = GEOMETRIES[name]
    layer, x = cls(*args, **kwargs), torch.randn(6, *shape)
    both = {"first": settings, "last": settings}
    qlayer = dq.quantize(layer, **both)
    dq.calibrate(qlayer, [x])
    return layer, qlayer.eval(), x


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_layer_computes_the_convolution_of_its_dequantized_operands(name):
    layer, qlayer, x = make(name, w_bits=4, a_bits=4)
    step = qlayer.weight_quantizer.scale().reshape(qlayer.weight_quantizer.layout.bound_view)
    operand = qlayer.weight_quantizer(qlayer.weight).reshape(qlayer.weight_quantizer.layout.view)
    plain = type(layer)(*GEOMETRIES[name][1], **GEOMETRIES[name][2])
    plain.load_state_dict(layer.state_dict() | {"weight": (operand * step).reshape(layer.weight.shape)})
    on_grid = qlayer.input_quantizer(x) * qlayer.input_quantizer.scale()
    torch.testing.assert_close(qlayer(x), plain(on_grid), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(qlayer(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_eight_bits_come_close(name):
    layer, qlayer, x = make(name, w_bits=8, a_bits=8)
    noise = (qlayer(x) - layer(x)).square().mean() / layer(x).var()
    assert noise < 1e-3  # 30 dB


@pytest.mark.parametrize("name", GEOMETRIES)
def test_unbatched_inputs(name):
    layer, qlayer, x = make(name, w_bits=4, a_bits=4)
    frozen = dq.freeze(qlayer)
    for one in x[:2]:
        if isinstance(layer, nn.Linear):
            one = one.reshape(-1, 4)[0]
        assert qlayer(one).shape == layer(one).shape
        assert torch.equal(frozen(one), qlayer(one))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_an_empty_batch(name):
    layer, qlayer, x = make(name, w_bits=4, a_bits=4)
    assert qlayer(x[:0]).shape == dq.freeze(qlayer)(x[:0]).shape == layer(x[:0]).shape


@pytest.mark.parametrize("name", [n for n in GEOMETRIES if n.startswith("transposed")])
def test_output_channels_of_a_transposed_convolution(name):
    """Bounds belong to one output channel: when the weights of a channel are scaled, only its bound moves."""
    layer, qlayer, _ = make(name, w_bits=4, a_bits=4)
    columns, groups = layer.weight.shape[1], layer.groups
    for channel in range(layer.out_channels):
        group, column = divmod(channel, columns)
        rows = slice(group * layer.in_channels // groups, (group + 1) * layer.in_channels // groups)
        changed = layer.weight.detach().clone()
        changed[rows, column] *= 3.0
        before = qlayer.weight_quantizer.upper.detach().clone()
        quantizer = make(name, w_bits=4, a_bits=4)[1].weight_quantizer
        quantizer.initialize(layer.weight)
        quantizer.initialize(changed)
        ratio = quantizer.upper / before
        expected = torch.ones(layer.out_channels)
        expected[channel] = 3.0
        torch.testing.assert_close(ratio.detach(), expected)


def test_float16_does_not_overflow():
    """1024 products of 255 and 255 add up to a thousand times 65504, so the layer has to divide before it adds."""
    layer = nn.Linear(1024, 4, dtype=torch.float16)
    bits = {"w_bits": 8, "a_bits": 8, "grid": "midrise", "normalize": False}
    qlayer = dq.quantize(layer, first=bits, last=bits)
    layer.weight.data.fill_(0.02)
    dq.load_float(qlayer, layer.state_dict())
    x = torch.ones(2, 1024, dtype=torch.float16)
    dq.calibrate(qlayer, [x])
    torch.testing.assert_close(qlayer(x), layer(x), rtol=0.01, atol=0.05)


def test_the_sign_of_an_output_scale_does_not_matter():
    _, qlayer, x = make("conv2d", w_bits=4, a_bits=4)
    expected = qlayer(x)
    qlayer.output_scale.data.neg_()
    assert torch.equal(qlayer(x), expected)


def test_bias_is_added_in_float_after_the_scale():
    _, qlayer, x = make("conv2d", w_bits=2, a_bits=2)
    before = qlayer(x)
    with torch.no_grad():
        qlayer.bias.add_(0.123)
        qlayer.output_scale.mul_(2.0)
    bias = qlayer.bias.detach().reshape(-1, 1, 1)
    torch.testing.assert_close(qlayer(x) - bias, 2.0 * (before - bias + 0.123))
