"""Each family honours every argument of its constructor, in float, quantized and frozen."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import ConversionError
from daqconvert.layers import FrozenLayer, QuantizedLayer, frozen_class, quantized_class
from daqconvert.layers.families import QuantConv2d
from daqconvert.spec import Settings
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


def test_each_registered_class_is_found_by_exact_type_alone():
    class Mine(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 1)

    class Other(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    class Patched(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight * 2, bias)

    assert quantized_class(nn.Conv2d) is QuantConv2d
    assert issubclass(quantized_class(Mine), Mine) and quantized_class(Mine).original is Mine  # computes as Conv2d
    assert issubclass(frozen_class(Mine), Mine) and frozen_class(Mine) is frozen_class(Mine)
    assert quantized_class(Other) is None and quantized_class(Patched) is None
    assert quantized_class(nn.Bilinear) is None
    for cls in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    ):
        assert issubclass(quantized_class(cls), (cls, QuantizedLayer)) and quantized_class(cls).original is cls
        assert issubclass(frozen_class(cls), (cls, FrozenLayer)) and frozen_class(cls).original is cls
    with pytest.raises(ConversionError, match="expected exactly Conv2d, found Mine"):
        QuantConv2d.convert(Mine(1), Settings(grid="integer", normalize=False), "conv", None)


def test_timm_layers_keep_their_padding():
    from timm.layers import Conv2dSame

    layer, x = Conv2dSame(3, 4, 3, stride=2), torch.randn(2, 3, 7, 8)
    qlayer = dq.quantize(layer)
    dq.calibrate(qlayer, [x])
    assert qlayer(x).shape == layer(x).shape == (2, 4, 4, 4)
    assert (qlayer(x) - layer(x)).abs().max() < 0.05
    assert torch.equal(dq.freeze(qlayer)(x), qlayer(x))


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
