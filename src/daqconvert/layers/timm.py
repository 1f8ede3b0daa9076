"""timm's layers with a forward of their own, quantized and frozen: `Conv2dSame` and `timm.layers.linear.Linear`.

This module is imported only if timm has been imported (`lookup`).
"""

from __future__ import annotations

from typing import Any

from timm.layers import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from timm.layers.padding import pad_same
from torch import Tensor

from daqconvert.functional.products import ConvolutionProducts, PaddedProducts
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.families import LinearOp
from daqconvert.layers.frozen import FrozenLayer
from daqconvert.layers.registry import register


class Conv2dSameOp:
    """A convolution with TensorFlow's "same" padding, which depends on the size of the input.

    The padding is applied to the integer-valued operand, in which 0 is exactly zero.
    """

    original = Conv2dSame
    output_dims = 2

    def accumulate(self: Any, x: Tensor, w: Tensor, *args: Any) -> Tensor:
        """Return the convolution of the padded `x` with `w`, without bias."""
        found: Tensor = self.products(*args)(x, w)
        return found

    def products(self: Any, *args: Any) -> PaddedProducts:
        """Return the padded convolution as an operation whose gradients are known."""
        kernel, stride, dilation = list(self.kernel_size), self.stride, self.dilation
        known = ConvolutionProducts(stride, (0, 0), dilation, self.groups)
        return PaddedProducts(lambda x: pad_same(x, kernel, stride, dilation), known)


class TimmLinearOp(LinearOp):
    """The bare product of timm's `Linear`, which differs from torch's under TorchScript only."""

    original = TimmLinear


@register(Conv2dSame)
class QuantConv2dSame(Conv2dSameOp, QuantizedLayer, Conv2dSame):
    """Quantized `timm.layers.Conv2dSame`."""


@register(Conv2dSame)
class FrozenConv2dSame(Conv2dSameOp, FrozenLayer, Conv2dSame):
    """Frozen `timm.layers.Conv2dSame`."""


@register(TimmLinear)
class QuantTimmLinear(TimmLinearOp, QuantizedLayer, TimmLinear):
    """Quantized `timm.layers.linear.Linear`."""


@register(TimmLinear)
class FrozenTimmLinear(TimmLinearOp, FrozenLayer, TimmLinear):
    """Frozen `timm.layers.linear.Linear`."""
