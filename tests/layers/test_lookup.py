"""Which class replaces which: by exact type, or derived where a subclass computes the same."""

import pytest
from torch import nn

from daqconvert.errors import ConversionError
from daqconvert.layers import FrozenLayer, QuantizedLayer, frozen_class, quantized_class
from daqconvert.layers.families import QuantConv2d
from daqconvert.spec import Settings


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
